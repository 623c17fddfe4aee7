"""From a configuration to a running server: log, fork, trio; the same for every command."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdserve.cli.daemon import detach
from nbdserve.guardian import guardian

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.config import ServeConfig
    from nbdserve.guardian import Guardian
    from nbdserve.server import Ready


def run_server(config: ServeConfig, announcement: Callable[[Ready], str], *, fork: bool) -> None:
    """Serve until stopped.

    :param announcement: what to print on stdout once clients are accepted; "" for nothing.
    :param fork: do it in the background; the caller's process exits once that is ready.
    """
    _occupy_standard_streams()
    logging.basicConfig(
        level=logging.DEBUG if config.verbose else logging.WARNING, format="nbdserve: %(message)s"
    )
    # Until the server takes it, and after that: it is to kill nobody who only asked too early.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if fork:
        config = _with_absolute_paths(config)
    report = detach() if fork else None

    with guardian(keep_stderr=not fork or config.verbose) as our_guardian:
        _run(config, announcement, report, our_guardian)


def _run(
    config: ServeConfig,
    announcement: Callable[[Ready], str],
    report: Callable[[bool], None] | None,
    our_guardian: Guardian | None,
) -> None:
    import trio

    from nbdserve.server import serve

    def on_ready(ready: Ready) -> None:
        _print(announcement(ready))
        if report is not None:
            report(config.verbose)

    async def run() -> None:
        await serve(config, on_ready=on_ready, guardian=our_guardian)

    trio.run(run)


def _occupy_standard_streams() -> None:
    """Nothing of ours shall be opened in the place of one that is closed: a daemon replaces it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)


def _with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """For a daemon, which leaves the directory it was started in once its images are open."""
    where, pid_file = config.listen, config.pid_file
    if where.unix_path is not None:
        where = replace(where, unix_path=os.path.abspath(where.unix_path))
    if pid_file is not None:
        pid_file = os.path.abspath(pid_file)
    return replace(config, listen=where, pid_file=pid_file)


def _print(text: str) -> None:
    """Print at once; that nobody listens is no reason not to serve."""
    try:
        # As bytes: a path need not be valid in the locale's encoding.
        sys.stdout.buffer.write(os.fsencode(text))
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would try to flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
