"""The limits of an owner as response headers (draft-ietf-httpapi-ratelimit-headers-10)."""

from collections.abc import Sequence

from chatserver.limits import WINDOW_S, Quota


def rate_limit_headers(quotas: Sequence[Quota]) -> dict[str, str]:
    """Return `RateLimit-Policy` and `RateLimit`: structured fields (RFC 9651), lists with one item for each limit.

    A limit has the quota `q`, of turns within `w` seconds or of replies at once, and the remaining quota `r`. In `t`
    seconds at least one more turn is left; replies have no such time.
    """
    if not quotas:
        return {}
    return {
        "RateLimit-Policy": ", ".join(map(_policy, quotas)),
        "RateLimit": ", ".join(map(_state, quotas)),
    }


def _policy(quota: Quota) -> str:
    unit = 'qu="concurrent-requests"' if quota.reset_s is None else f"w={WINDOW_S}"
    return f'"{quota.policy}";q={quota.limit};{unit}'


def _state(quota: Quota) -> str:
    reset = "" if quota.reset_s is None else f";t={quota.reset_s}"
    return f'"{quota.policy}";r={quota.remaining}{reset}'
