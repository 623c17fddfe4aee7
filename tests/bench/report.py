"""Samples -> medians, ratios, the table and the JSON document.  Arithmetic only: runs nothing.

The ratio to a family is taken within each round, ours to the family's fastest server there, and
the median of those is reported: a slow minute hits both sides of a quotient.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.cases import Case
from bench.clients import Sample

# One case: server -> its sample in each round, in order; every server has as many.
Rounds = Mapping[str, Sequence[Sample]]


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """Ours to the best of `family`: the median of the rounds, and the range they span."""

    family: str
    median: float
    lowest: float
    highest: float
    target: float | None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "ok" if self.median >= self.target else "MISS"


def median_rate(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.rate for sample in samples)


def median_p99_us(samples: Sequence[Sample]) -> float | None:
    values = [sample.p99_us for sample in samples if sample.p99_us is not None]
    return statistics.median(values) if values else None


def ratios(case: Case, rounds: Rounds, families: Mapping[str, str], ours: str) -> list[Ratio]:
    """One per family measured beside ours, in the order of `families` (server -> family)."""
    if ours not in rounds:
        return []
    found = []
    for family in dict.fromkeys(families[server] for server in rounds if server != ours):
        members = [rounds[server] for server in rounds if families[server] == family]
        quotients = [
            own.rate / max(member.rate for member in opponents)
            for own, *opponents in zip(rounds[ours], *members, strict=True)
        ]
        found.append(Ratio(
            family, statistics.median(quotients), min(quotients), max(quotients),
            case.targets.get(family)))
    return found


def table(
    results: Mapping[str, Rounds], cases: Mapping[str, Case], families: Mapping[str, str],
    ours: str,
) -> str:
    """The cases as lines of text: each server's median rate, then the ratios."""
    servers = [name for name in families if any(name in rounds for rounds in results.values())]
    rows = [["case", "unit", *servers, "ratio to", "", "(range)", "target", ""]]
    for name, rounds in results.items():
        case = cases[name]
        rates = [f"{median_rate(rounds[s]):,.0f}" if s in rounds else "-" for s in servers]
        lines = [
            [r.family, f"{r.median:.2f}", f"({r.lowest:.2f}-{r.highest:.2f})",
             f">= {r.target:g}" if r.target is not None else "-", r.verdict]
            for r in ratios(case, rounds, families, ours)
        ] or [[""] * 5]
        rows.append([name, case.unit.value, *rates, *lines[0]])
        rows += [[""] * (2 + len(servers)) + line for line in lines[1:]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = range(2, 2 + len(servers))  # figures
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def document(
    results: Mapping[str, Rounds], cases: Mapping[str, Case], families: Mapping[str, str],
    ours: str, conditions: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it for a JSON file: every sample, in the order of the rounds."""
    return {
        "conditions": dict(conditions),
        "cases": {
            name: {
                "unit": cases[name].unit.value,
                "servers": {
                    server: {
                        "median": median_rate(samples),
                        "p99_us": median_p99_us(samples),
                        "rounds": [dataclasses.asdict(sample) for sample in samples],
                    }
                    for server, samples in rounds.items()
                },
                "ratios": [
                    {**dataclasses.asdict(ratio), "verdict": ratio.verdict}
                    for ratio in ratios(cases[name], rounds, families, ours)
                ],
            }
            for name, rounds in results.items()
        },
    }
