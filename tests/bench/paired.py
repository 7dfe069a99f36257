"""Compares two versions of a program in pairs, one pair per round. Pure."""

import math
from collections.abc import Sequence
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
    "G": ("us_per_delivery", "caught_up_max_ms"),
}
"""The compared figures, by workload."""
LIMITS = {("A", "us_per_delivery"): 1.03}
"""The largest permitted ratio of a figure to its value before."""


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


def compare(workload: str, ours: Sequence[Result], before: Sequence[Result]) -> tuple[list[str], list[Verdict]]:
    """Return lines about the paired ratios ours / before, and a verdict on each limit.

    A limit is missed only if the whole interval lies above it: noise does not explain that.

    :param ours: the results of the rounds
    :param before: the results of the other checkout, in the same order
    """
    lines: list[str] = []
    verdicts: list[Verdict] = []
    for figure in FIGURES.get(workload, ()):
        pairs = [(one, other) for one, other in zip(ours, before, strict=True) if one.get(figure) and other.get(figure)]
        ratios = [one[figure] / other[figure] for one, other in pairs]
        lines.append(f"{workload} {figure}, ours / before: {_said(ratios)}")
        limit = LIMITS.get((workload, figure))
        found = interval(ratios)
        if limit is not None:
            lines += [_round(number, figure, *pair) for number, pair in enumerate(pairs, 1)]
            if found is not None:
                said = f"{workload} {figure}: {_said(ratios)} x before (at most {limit:g})"
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
