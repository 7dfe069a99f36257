"""Users: settings of a server that takes their tokens, and the tokens."""

import time
from typing import Any

import jwt

SECRET = "a-secret-of-at-least-32-characters"
USERS: dict[str, Any] = {"auth": "jwt", "auth_secret": (SECRET,)}
"""The fields of `Settings` of a server with users."""


def token(owner: object, seconds: float = 600, **claims: object) -> str:
    """Return a user's token that expires in a number of seconds."""
    return jwt.encode({"sub": owner, "exp": time.time() + seconds, **claims}, SECRET, "HS256")


def bearer(owner: object, seconds: float = 600) -> dict[str, str]:
    """Return the header of a user's request."""
    return {"Authorization": f"Bearer {token(owner, seconds)}"}
