"""`python -m fuzz`: every target for its share of the inputs, two side by side, and a summary.

Each target is a process (child.py) that starts from the kept corpus and its own seeds, in a folder
of its own. The same seed and corpus give the same run. An input that fails is written to
build/fuzz/TARGET-crash-... with the traceback; the other targets go on.

    python -m fuzz --target handshake --runs 1000000 --seed 1
    python -m fuzz --total 10000000
    python -m fuzz --keep           # put what is new into the kept corpus, and make it small again
    python -m fuzz --replay FILE --target image
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from fuzz.targets import TARGETS, Target

BUILD = pathlib.Path("build/fuzz")

# Seconds that an input may take, and MiB that a process may hold, before that is a failure.
SLOWEST, LARGEST = 20, 2048


@dataclass
class Result:
    """What became of one target."""

    target: str
    inputs: int
    seconds: float
    corpus: int
    features: int
    failures: int

    def line(self) -> str:
        """A row of the summary."""
        rate = self.inputs / self.seconds if self.seconds else 0
        return (
            f"{self.target:15} {self.inputs:11,} {self.seconds:8.0f} {rate:8,.0f}"
            f" {self.corpus:7} {self.features:9} {self.failures:9}"
        )


HEADING = (
    f"{'target':15} {'inputs':>11} {'seconds':>8} {'a second':>8}"
    f" {'corpus':>7} {'features':>9} {'failures':>9}"
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz, coverage-guided (make fuzz).")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all in turn")
    parser.add_argument("--runs", type=int, help="inputs for each target")
    parser.add_argument(
        "--total",
        type=int,
        default=1_000_000,
        help="inputs for all, by their shares; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="at once; default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="add what is new to the kept corpus")
    parser.add_argument(
        "--replay", type=pathlib.Path, metavar="FILE", help="run one input through the --target"
    )
    return parser.parse_args(argv)


def runs_of(target: Target, options: argparse.Namespace) -> int:
    """How many inputs it gets."""
    return int(options.runs) if options.runs else max(1, int(options.total) * target.share // 100)


def fuzz(target: Target, runs: int, seed: int) -> Result:
    """Run the child; print what failed."""
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    write_start(target, folder)
    log = BUILD / f"{target.name}.log"
    flags = [
        f"-runs={runs}",
        "-reload=0",  # of the folder, once a second: no two runs would be the same
        f"-seed={seed}",
        f"-max_len={target.longest}",
        f"-timeout={SLOWEST}",
        f"-rss_limit_mb={LARGEST}",
        "-print_final_stats=1",
        f"-dict={write_dictionary(target)}",
        f"-artifact_prefix={BUILD}/{target.name}-",
    ]
    # The order of sets and dicts must be the same in each run.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    began = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(
            [sys.executable, "-m", "fuzz.child", target.name, *flags, str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        ).returncode
    seconds = time.monotonic() - began
    text = log.read_text(errors="replace")
    result = read_log(target, text, seconds, code)
    if result.failures:
        print(f"--- {target.name} failed, {log} has more:", *text.splitlines()[-40:], sep="\n")
    return result


def write_start(target: Target, folder: pathlib.Path) -> None:
    """What the run begins with: the kept corpus and the seeds. In another process, so that nothing
    of the package is loaded in this one."""
    code = (
        "import sys, pathlib; from fuzz.targets import TARGETS; target = TARGETS[sys.argv[1]];"
        "[pathlib.Path(sys.argv[2], f'start{number:04}').write_bytes(data)"
        " for number, data in enumerate(target.module.seeds() + target.corpus)];"
        "pathlib.Path(sys.argv[2] + '.dict').write_text(''.join("
        "'\"' + ''.join(f'\\\\x{byte:02x}' for byte in word) + '\"\\n'"
        " for word in target.module.DICTIONARY))"
    )
    subprocess.run([sys.executable, "-c", code, target.name, str(folder)], check=True)


def write_dictionary(target: Target) -> pathlib.Path:
    """Where `write_start` has put it."""
    return BUILD / f"{target.name}.dict"


def read_log(target: Target, text: str, seconds: float, code: int) -> Result:
    """From what libFuzzer says at the end."""
    done = re.findall(r"^stat::number_of_executed_units:\s*(\d+)", text, re.MULTILINE)
    state = re.findall(r"^#\d+\s+\w+\s+cov: \d+ ft: (\d+) corp: (\d+)/", text, re.MULTILINE)
    features, corpus = state[-1] if state else (0, 0)
    inputs = int(done[-1]) if done else 0
    return Result(target.name, inputs, seconds, int(corpus), int(features), int(code != 0))


def replay(target: Target, file: pathlib.Path) -> None:
    """One input, in this process."""
    target.function(file.read_bytes())
    print(f"{target.name}: {file} does what it should")


def main(argv: list[str]) -> int:
    """0: no input failed."""
    options = parse(argv)
    targets = [TARGETS[name] for name in options.target or TARGETS]
    if options.replay is not None:
        replay(targets[0], options.replay)
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    targets.sort(key=lambda target: -runs_of(target, options) * target.cost)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(fuzz, target, runs_of(target, options), options.seed) for target in targets
        ]
        print(HEADING)
        results = []
        for job in concurrent.futures.as_completed(jobs):
            results.append(job.result())
            print(results[-1].line(), flush=True)
    seconds = max(result.seconds for result in results)
    failures = sum(result.failures for result in results)
    inputs = sum(result.inputs for result in results)
    print(
        f"{inputs:,} inputs, seed {options.seed}, {failures} failures; the longest {seconds:.0f} s"
    )
    if options.keep and not failures:
        for target in targets:
            subprocess.run(
                [sys.executable, "-m", "fuzz.keep", target.name, str(BUILD / target.name)],
                check=True,
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
