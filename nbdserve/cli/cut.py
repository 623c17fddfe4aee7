"""``nbdserve cut``: what a power cut leaves, from the log that a power-cut node streamed.

    nbdserve cut disk.log                               what is in the log
    nbdserve cut disk.log -o after.img                  all is lost at the end that may be
    nbdserve cut disk.log -o after.img --moment 117 --seed 3
    nbdserve cut disk.log -o after.img --moment 117 --replay
    nbdserve cut disk.log --all 200 -o outcomes/        one file each, and a line that says which

The log of a server that still runs, or was killed, is as good as any: what is in it is what it had
done. A file that exists is overwritten.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from nbdserve.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from nbdserve.powercut.powercut import Outcome
    from nbdserve.powercut.writelog import WriteLog


@click.command("cut", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", metavar="PATH", help="Write the outcome there: a file, or a folder"
              " of several. Without it the log is listed.")
@click.option("--moment", type=click.IntRange(0), metavar="N",
              help="When the power goes: so many records after the start; else at the end.")
@click.option("--seed", type=click.IntRange(0), metavar="S",
              help="Which outcome; 0: all is lost that may be; 1: nothing is (default: 0).")
@click.option("--replay", is_flag=True, help="Not the power goes but the process: all is there that"
              " had begun.")
@click.option("--all", "limit", type=click.IntRange(1), metavar="LIMIT",
              help="Up to LIMIT distinct outcomes, evenly over the log, into the folder PATH.")
@click.argument("log")
def command(
    output: str | None,
    moment: int | None,
    seed: int | None,
    replay: bool,
    limit: int | None,
    log: str,
) -> None:  # fmt: skip
    """What a disk holds after a power cut, by the write log LOG."""
    chosen = {"--moment": moment, "--seed": seed, "--all": limit, "--replay": replay or None}
    given = [name for name, value in chosen.items() if value is not None]
    if output is None and given:
        raise ConfigError(f"{given[0]}: where to is missing (-o)")
    for one, other in (("--all", "--moment"), ("--all", "--replay"), ("--replay", "--seed")):
        if one in given and other in given:
            raise ConfigError(f"{one} and {other} exclude each other")
    if output is not None and os.path.exists(output) and os.path.samefile(output, log):
        raise ConfigError(f"-o: {output} is the log")
    writes = _load(log)
    if output is None:
        _list(writes)
    elif limit is not None:
        _write_all(writes, output, limit, seed or 0)
    else:
        _outcome(writes, len(writes) if moment is None else moment, seed or 0, replay).save(output)


def _load(path: str) -> WriteLog:
    from nbdserve.powercut.writelog import WriteLog

    try:
        return WriteLog.load(path)
    except ValueError as error:
        raise ImageError(str(error)) from None


def _list(log: WriteLog) -> None:
    """The files, how much there is, and each note with the moment from which on it counts."""
    from nbdserve.powercut.powercut import file_names
    from nbdserve.powercut.records import CHANGES, Kind

    for name, content in zip(file_names(log), log.initial, strict=True):
        click.echo(f"file {name}: {content.size} bytes, {content.data_size} of data at first")
    kinds = [record.kind for record in log.records]
    nb_changes = sum(kind in CHANGES for kind in kinds)
    click.echo(
        f"moments 0 to {len(log)}: {nb_changes} changes,"
        f" {kinds.count(Kind.FLUSHED)} flushes, {kinds.count(Kind.DURABLE)} durable writes"
    )
    for moment, record in enumerate(log.records, start=1):
        if record.kind is Kind.MARK:
            click.echo(f"{moment}: {record.data.decode(errors='replace')}")


def _outcome(log: WriteLog, moment: int, seed: int, replay: bool) -> Outcome:
    from nbdserve.powercut.powercut import outcome_of

    try:
        return outcome_of(log, moment, seed, replay=replay)
    except ValueError as error:
        raise ConfigError(f"--moment: {error}") from None


def _write_all(log: WriteLog, folder: str, limit: int, seed: int) -> None:
    from nbdserve.powercut.powercut import outcomes_of

    os.makedirs(folder, exist_ok=True)
    for number, outcome in enumerate(outcomes_of(log, limit, seed)):
        path = os.path.join(folder, f"{number:04}-moment{outcome.moment}-seed{outcome.seed}")
        outcome.save(path)
        last = f", last note: {outcome.marks[-1]}" if outcome.marks else ""
        click.echo(f"{path}: moment {outcome.moment}, seed {outcome.seed}{last}")
