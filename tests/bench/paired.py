"""Compares two sides of a workload in pairs, one pair per round. Pure."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from tests.bench.generator import Result

CONFIDENCE = 0.95
Verdict = tuple[bool, str]
"""Whether a limit is met, with a line of text."""
FIGURES = {
    "A": ("us_per_delivery", "latency_p99_ms"),
    "B": ("rate",),
    "C": ("us_per_delivery", "latency_p99_ms"),
    "D": ("kib_per_stream", "us_per_connect", "us_per_keepalive"),
    "E": ("us_per_turn", "turns_per_second"),
    "F": tuple(
        f"{what}_{unit}"
        for what in ("open", "page", "resume", "list", "turn")
        for unit in ("p50_ms", "us", "database_us")
    ),
    "G": ("us_per_delivery", "caught_up_max_ms"),
}
"""The compared figures, by workload."""
LIMITS = {
    ("ours", "before"): {("A", "us_per_delivery"): 1.02, ("C", "us_per_delivery"): 1.02},
    ("users", "ours"): {("D", "us_per_connect"): 1.25, ("E", "us_per_turn"): 1.05},
    ("100-replies", "1-reply"): {("F", "open_p50_ms"): 1.2, ("F", "open_us"): 1.2},
    **{(side, f"{side}-before"): {} for side in ("10", "100", "1000", "10000", "1-reply")},
}
"""The compared pairs of sides, and the largest permitted ratio of the first side's figure to the second side's."""


class Interval(NamedTuple):
    """The median of a sample, and the bounds between which the true median lies."""

    median: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the median of independent values with its interval; None if there are too few values for the confidence.

    Each value lies below the true median with a probability of one half, whatever their distribution. So the number of
    lower values is binomial, and the k-th smallest and the k-th largest enclose the true median unless fewer than k
    values lie on one side of it. For 15 values and 95 %, k is 4.
    """
    ordered = sorted(values)
    count = len(ordered)
    k = 0
    outside = 2 / 2**count
    while outside <= 1 - confidence:
        k += 1
        outside += 2 * math.comb(count, k) / 2**count
    return Interval(median(ordered), ordered[k - 1], ordered[-k]) if k else None


def compare(workload: str, runs: Mapping[str, Sequence[Result]]) -> tuple[list[str], list[Verdict]]:
    """Return lines about the paired ratios of each pair of sides that was measured, and a verdict on each limit.

    A limit is missed only if the whole interval lies above it: noise does not explain that.

    :param runs: the results of the workload's rounds in their order, by side
    """
    lines: list[str] = []
    verdicts: list[Verdict] = []
    for pair in LIMITS:
        if runs.keys() >= {*pair}:
            more_lines, more_verdicts = _compare_pair(workload, pair, runs)
            lines += more_lines
            verdicts += more_verdicts
    return lines, verdicts


def _compare_pair(
    workload: str, sides: tuple[str, str], runs: Mapping[str, Sequence[Result]]
) -> tuple[list[str], list[Verdict]]:
    side, base = sides
    lines: list[str] = []
    verdicts: list[Verdict] = []
    for figure in FIGURES.get(workload, ()):
        rounds = zip(runs[side], runs[base], strict=True)
        pairs = [(one, other) for one, other in rounds if one.get(figure) and other.get(figure)]
        if workload == "F" and not pairs:
            continue
        ratios = [one[figure] / other[figure] for one, other in pairs]
        lines.append(f"{workload} {figure}, {side} / {base}: {_said(ratios)}")
        limit = LIMITS[sides].get((workload, figure))
        found = interval(ratios)
        if limit is not None:
            lines += [_round(number, figure, *pair) for number, pair in enumerate(pairs, 1)]
            if found is not None:
                said = f"{workload} {side} {figure}: {_said(ratios)} x {base} (at most {limit:g})"
                verdicts.append((found.low <= limit, said))
    return lines, verdicts


def _said(ratios: Sequence[float]) -> str:
    found = interval(ratios)
    if found is None:
        few = f"{median(ratios):.3f}, " if ratios else ""
        return f"{few}too few rounds ({len(ratios)}) for an interval"
    return f"{found.median:.3f} [{found.low:.3f} .. {found.high:.3f}]"


def _round(number: int, figure: str, one: Result, other: Result) -> str:
    values = f"{one[figure]:8.3f} /{other[figure]:8.3f} = {one[figure] / other[figure]:.3f}"
    busy = f"load {one['load']:.2f}, {other['load']:.2f}; waiting {one['waiting']:.1%}, {other['waiting']:.1%}"
    return f"  round {number:2}: {values}   {busy}"
