"""`scripts/token NAME`: prints a token that this server accepts, for trials."""

import argparse
import sys
import time

from chatserver.auth import sign
from chatserver.errors import SetupError
from chatserver.settings import read_settings


def main() -> int:
    """Print the token; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/token", description="Print a token for the owner NAME, signed with AUTH_SECRET."
    )
    parser.add_argument("name", metavar="NAME", help="the owner of the conversations")
    parser.add_argument("--minutes", type=int, default=60, metavar="N", help="how long it is valid (default: 60)")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        if not settings.auth_secret:
            raise SetupError("AUTH_SECRET is not set: this server cannot sign tokens (see .env.example)")
        print(sign(arguments.name, settings, int(time.time()) + 60 * arguments.minutes))
    except (SetupError, ValueError) as error:
        print(f"token: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
