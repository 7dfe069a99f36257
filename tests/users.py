"""Users: settings of a server that takes their tokens, and the tokens."""

import time
from typing import Any

import jwt

SECRET = "a secret of at least 32 characters"
USERS: dict[str, Any] = {"auth": "jwt", "auth_secret": (SECRET,)}
"""The fields of `Settings` of a server with users."""


def token(owner: str, seconds: float = 600, **claims: Any) -> str:
    """Return a user's token that expires after a number of seconds, rounded up to the clock's next whole second."""
    return jwt.encode({"sub": owner, "exp": int(-(-(time.time() + seconds) // 1)), **claims}, SECRET, "HS256")


def bearer(owner: str, seconds: float = 600) -> dict[str, str]:
    """Return the header of a user's request."""
    return {"Authorization": f"Bearer {token(owner, seconds)}"}
