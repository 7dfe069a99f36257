"""The limits of each owner: the cell rate algorithm, by a clock that the tests move."""

from collections import Counter
from itertools import pairwise

import http_sf
from hypothesis import given
from hypothesis import strategies as st

from chatserver.errors import QuotaExceeded
from chatserver.handlers.ratelimit import rate_limit_headers
from chatserver.limits import Quota, TurnLimit, decrement

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


class Clock:
    """A clock in nanoseconds that stands still until it is moved."""

    def __init__(self, now: int = 7) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


def refusal(limit: TurnLimit, owner: str = "alice") -> QuotaExceeded | None:
    """Take a turn; return the error if it is refused."""
    try:
        limit.take(owner)
    except QuotaExceeded as error:
        return error
    return None


def empty(limit: TurnLimit, owner: str = "alice") -> int:
    """Take all turns that are left; return their number."""
    count = 0
    while refusal(limit, owner) is None:
        count += 1
    return count


def test_allowance_is_taken_at_once_and_restored_evenly() -> None:
    clock = Clock()
    limit = TurnLimit(30, clock)

    assert empty(limit) == 30
    clock.wait(1.999)
    assert empty(limit) == 0
    clock.wait(0.001)
    assert empty(limit) == 1
    clock.wait(59.999)
    assert empty(limit) == 29
    clock.wait(3600)
    assert empty(limit) == 30


def test_owners_have_allowances_of_their_own() -> None:
    limit = TurnLimit(2, Clock())
    empty(limit, "alice")

    assert empty(limit, "bob") == 2


def test_nobody_is_limited_without_a_limit_or_an_owner() -> None:
    unlimited, limit = TurnLimit(0, Clock()), TurnLimit(1, Clock())
    for _ in range(100):
        unlimited.take("alice")
        limit.take(None)

    assert unlimited.quota("alice") is None and limit.quota(None) is None
    assert len(unlimited) == len(limit) == 0


MOVES = st.lists(st.one_of(st.integers(0, 3 * MINUTE), st.integers(0, 180).map(lambda s: s * SECOND)), max_size=120)


@given(per_minute=st.integers(1, 100), moves=MOVES)
def test_no_period_has_more_turns_than_its_allowance(per_minute: int, moves: list[int]) -> None:
    clock = Clock()
    limit = TurnLimit(per_minute, clock)
    accepted: list[int] = []
    for move in moves:
        clock.now += move
        accepted += [clock.now] * empty(limit)

    for first, begin in enumerate(accepted):
        for last in range(first, len(accepted), 7):
            restored = (accepted[last] - begin) * per_minute // MINUTE
            assert last - first + 1 <= per_minute + restored


@given(per_minute=st.integers(1, 1000), moves=st.lists(st.integers(0, 5 * SECOND), max_size=30))
def test_turn_is_accepted_exactly_when_retry_after_says(per_minute: int, moves: list[int]) -> None:
    clock = Clock()
    limit = TurnLimit(per_minute, clock)
    for move in moves:
        clock.now += move
        refusal(limit)
    empty(limit)
    refused, quota = refusal(limit), limit.quota("alice")
    assert refused is not None and quota is not None
    wait = refused.retry_after_s
    assert wait is not None and wait >= 1 and quota == Quota("turns", per_minute, 0, wait)

    clock.wait(wait - 1)
    assert refusal(limit) is not None
    clock.wait(1)
    assert refusal(limit) is None


@given(per_minute=st.integers(1, 50), moves=st.lists(st.integers(0, MINUTE), max_size=30))
def test_state_says_how_many_turns_are_left_and_when_one_more(per_minute: int, moves: list[int]) -> None:
    clock = Clock()
    limit = TurnLimit(per_minute, clock)
    for move in moves:
        clock.now += move
        refusal(limit)
    quota = limit.quota("alice")
    assert quota is not None and quota.reset_s is not None

    if quota.remaining == per_minute:
        assert quota.reset_s == 0
    else:
        clock.wait(quota.reset_s)
        assert (later := limit.quota("alice")) is not None and later.remaining > quota.remaining
        clock.wait(-quota.reset_s)
    assert empty(limit) == quota.remaining


def test_turn_given_back_can_be_taken_again() -> None:
    clock = Clock()
    limit = TurnLimit(3, clock)
    empty(limit)
    limit.give_back("alice")
    assert empty(limit) == 1

    # After a pause the allowance is full, and cannot become more than full.
    clock.wait(120)
    limit.give_back("alice")
    limit.give_back("bob")
    limit.give_back(None)
    assert empty(limit) == empty(limit, "bob") == 3


def test_owners_are_forgotten_when_their_allowance_is_full() -> None:
    clock = Clock()
    limit = TurnLimit(30, clock)
    sizes = []
    for number in range(10_000):
        limit.take(f"owner {number}")
        clock.wait(1)
        sizes.append(len(limit))

    assert max(sizes) <= 2


def test_owner_whose_allowance_stays_empty_keeps_others_in_memory_for_a_minute_only() -> None:
    clock = Clock()
    limit = TurnLimit(30, clock)
    sizes = []
    for number in range(1_000):
        empty(limit, "alice")
        limit.take(f"owner {number}")
        clock.wait(2)
        sizes.append(len(limit))

    assert max(sizes) <= 32


def test_count_forgets_a_name_at_zero() -> None:
    counter = Counter({"alice": 2})
    decrement(counter, "alice")
    assert counter == {"alice": 1}

    decrement(counter, "alice")
    assert len(counter) == 0


def test_headers_are_structured_fields() -> None:
    headers = rate_limit_headers([Quota("turns", 30, 12, 2), Quota("replies", 5, 4)])

    assert http_sf.parse(headers["RateLimit-Policy"].encode(), tltype="list") == [
        ("turns", {"q": 30, "w": 60}),
        ("replies", {"q": 5, "qu": "concurrent-requests"}),
    ]
    assert http_sf.parse(headers["RateLimit"].encode(), tltype="list") == [
        ("turns", {"r": 12, "t": 2}),
        ("replies", {"r": 4}),
    ]
    assert rate_limit_headers([]) == {}


def test_restoring_never_goes_back() -> None:
    clock = Clock()
    limit = TurnLimit(7, clock)
    empty(limit)
    left = []
    for _ in range(700):
        clock.wait(0.1)
        quota = limit.quota("alice")
        assert quota is not None
        left.append(quota.remaining)

    assert all(before <= after for before, after in pairwise(left)) and left[-1] == 7
