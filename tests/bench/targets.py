"""The targets, the verdicts on them, and the table of all figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.generator import Result

TWINS = ("express", "fastapi", "express-paced", "fastapi-paced")
Runs = Mapping[str, Sequence[Result]]
"""The results of a workload's rounds, by side."""


def _median(runs: Runs, side: str, name: str) -> float:
    return median(float(run[name]) for run in runs[side])


@dataclass(frozen=True)
class Target:
    """A bound for one figure of a side (ours): a number, or a multiple of the figure of another side."""

    workload: str
    figure: str
    most: bool
    """Whether the bound is a maximum; else a minimum."""
    bound: float
    of: str | None = None
    side: str = "ours"

    def judge(self, runs: Runs) -> tuple[bool, str] | None:
        """Return whether the target is met, with a line of text; None if a side was not measured."""
        if self.side not in runs or (self.of and self.of not in runs):
            return None
        value = _median(runs, self.side, self.figure)
        if self.of:
            value /= _median(runs, self.of, self.figure) or float("inf")
        met = value <= self.bound if self.most else value >= self.bound
        relation = "at most" if self.most else "at least"
        unit = f" x {self.of}" if self.of else ""
        side = "" if self.side == "ours" else f" {self.side}"
        return met, f"{self.workload}{side} {self.figure}: {value:.3g}{unit} ({relation} {self.bound:g}{unit})"


TARGETS = (
    Target("A", "us_per_delivery", True, 0.8, "express"),
    Target("B", "rate", False, 3.0, "express"),
    Target("B", "rate", False, 8.0, "fastapi"),
    Target("C", "latency_p99_ms", True, 25.0),
    Target("C", "share", False, 0.99),
    Target("C", "us_per_delivery", True, 0.8, "express"),
    Target("D", "kib_per_stream", True, 12.0),
    Target("D", "connects_per_second", False, 1.0, "express"),
    Target("E", "turns_per_second", False, 1.0, "fastapi"),
    Target("E", "us_per_turn", True, 1.0, "fastapi"),
    *(
        Target("F", f"{what}_us", True, 2.0, "10", side)
        for side in ("100", "1000")
        for what in ("turn", "page", "resume")
    ),
    Target("G", "caught_up_max_ms", True, 2000.0),
    Target("G", "latency_p99_ms", True, 250.0),
    Target("H", "memory_growth_percent", True, 5.0),
    Target("H", "tasks_growth", True, 0.0),
    Target("H", "streams_left", True, 0.0),
    Target("H", "conversations_left", True, 0.0),
)


def verdicts(results: Mapping[str, Runs]) -> list[tuple[bool, str]]:
    """Return a verdict, with a line of text, on each measured target and on each run with errors."""
    found = [target.judge(results[target.workload]) for target in TARGETS if target.workload in results]
    faults = [
        (False, f"{name} {side}, round {number}: {run['errors']} errors, first: {run['first_error']}")
        for name, runs in results.items()
        for side, rounds in runs.items()
        for number, run in enumerate(rounds, 1)
        # A twin that does not keep up is a finding; chatserver must not have a single error.
        if run["errors"] and side not in TWINS
    ]
    return [verdict for verdict in found if verdict is not None] + faults


def table(results: Mapping[str, Runs], titles: Callable[[str], str]) -> str:
    """Return all figures: for each side the median, with minimum and maximum in brackets."""
    lines: list[str] = []
    for name, runs in results.items():
        sides = list(runs)
        lines += ["", titles(name), f"{'':24}" + "".join(f"{side:>34}" for side in sides)]
        figures = [key for key in runs[sides[0]][0] if key != "first_error"]
        for figure in figures:
            cells = [_cell([float(run[figure]) for run in runs[side] if figure in run]) for side in sides]
            lines.append(f"{figure:24}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" [{_number(min(values))} .. {_number(max(values))}]" if len(values) > 1 else ""
    return _number(median(values)) + spread


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
