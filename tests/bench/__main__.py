"""`python -m bench`: options, the rounds, what is printed.  See the package for the method."""

import argparse
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import peers
from bench import report
from bench.cases import CASES, Case
from bench.clients import Sample, measure
from bench.images import Images
from bench.servers import OURS, SERVERS

NEEDED = ("qemu-img", "qemu-nbd", "nbdkit", "nbdcopy", "fio")
FAMILIES = {name: server.family for name, server in SERVERS.items()}

Results = dict[str, dict[str, list[Sample]]]


def names_in(table: Mapping[str, object]) -> "argparse._ActionType":
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in table:
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(table)}")
        return names
    return parse


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure nbdserve beside qemu-nbd and nbdkit (make bench).",
        epilog="Image files go to $TMPDIR, or /var/tmp: 5 GiB on a real disk.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--runtime", type=float, default=3.0, metavar="SECONDS",
                        help="of each timed run; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 s: a first look")
    parser.add_argument("--only", type=names_in(CASES), default=list(CASES),
                        metavar="CASE[,CASE]", help=", ".join(CASES))
    parser.add_argument("--servers", type=names_in(SERVERS), default=list(SERVERS),
                        metavar="SERVER[,SERVER]", help=", ".join(SERVERS))
    parser.add_argument("--server-args", type=shlex.split, default=[], metavar="'OPTION ...'",
                        help="further options for nbdserve serve")
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("build/bench.json"),
                        metavar="PATH", help="every sample; default: %(default)s")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.runtime = 2, 2.0
    return options


def run_once(name: str, case: Case, images: Images, options: argparse.Namespace) -> Sample:
    server = SERVERS[name]
    image = images.for_case(case.disk, server.copy)
    with server.start(image, case.cache, options.server_args) as where:
        sample = measure(case, where, images, seconds=options.runtime)
    image.settle()
    return sample


def able(servers: Sequence[str], images: Images, options: argparse.Namespace) -> list[str]:
    """Those with a case to run that start here; io_uring, for one, containers often forbid."""
    found = []
    for name in servers:
        server = SERVERS[name]
        case = next((CASES[c] for c in options.only if c in server.cases), None)
        if case is None:
            continue
        image = images.for_case(case.disk, server.copy)
        try:
            with server.start(image, case.cache, options.server_args):
                found.append(name)
        except peers.PeerFailed as error:
            if name == OURS:
                raise
            print(f"*** {name} is left out, it does not start here: {error}", file=sys.stderr)
    return found


def run_rounds(images: Images, options: argparse.Namespace) -> Results:
    servers = able(options.servers, images, options)
    results: Results = {name: {} for name in options.only}
    for number in range(options.rounds):
        for name in options.only:
            case = CASES[name]
            entrants = [server for server in servers if name in SERVERS[server].cases]
            turn = number % max(len(entrants), 1)
            for server in entrants[turn:] + entrants[:turn]:
                sample = run_once(server, case, images, options)
                results[name].setdefault(server, []).append(sample)
                print(f"round {number + 1}/{options.rounds}  {name:14}{server:14}"
                      f"{sample.rate:>12,.0f} {case.unit.value}", file=sys.stderr, flush=True)
    # The order of the servers' first turns differs between cases; the table has one order.
    return {name: {s: rounds[s] for s in servers if s in rounds}
            for name, rounds in results.items()}


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    def version(program: str) -> str:
        return peers.run(program, "--version").stdout.partition("\n")[0]

    return {
        "rounds": options.rounds,
        "runtime_seconds": options.runtime,
        "server_args": options.server_args,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{program: version(program) for program in ("qemu-nbd", "nbdkit", "nbdcopy", "fio")},
    }


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    missing = [program for program in NEEDED if not peers.have(program)]
    if missing:
        print(f"bench: not installed here: {', '.join(missing)}", file=sys.stderr)
        return 1
    place = os.environ.get("TMPDIR", "/var/tmp")
    try:
        with tempfile.TemporaryDirectory(prefix="nbdserve-bench-", dir=place) as folder:
            results = run_rounds(Images(pathlib.Path(folder)), options)
    except (peers.PeerFailed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(report.table(results, CASES, FAMILIES, OURS))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(
        report.document(results, CASES, FAMILIES, OURS, conditions(options)), indent=1) + "\n")
    print(f"every sample: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
