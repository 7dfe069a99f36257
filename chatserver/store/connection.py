"""The client: its URI and options, and the replica set of a private MongoDB server."""

import asyncio
import re
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure, PyMongoError

from chatserver.errors import SetupError

DEFAULT_DATABASE = "chat-db"
"""The database if the URI names none."""
_SECRET_OPTION = re.compile("[^=]*password|authMechanismProperties", re.IGNORECASE)


def redact_uri(uri: str) -> str:
    """Return a valid MongoDB URI with the database's name and without secrets, as it may be shown and pasted."""
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    # Not as URLs in general: PyMongo accepts a password with a `#`.
    authority, _, database = address.partition("/")
    user, at, hosts = authority.rpartition("@")
    options = "&".join(each for each in query.split("&") if each and not _SECRET_OPTION.match(each))
    shown = f"{scheme}://{user.partition(':')[0]}{at}{hosts}/{database or DEFAULT_DATABASE}"
    return f"{shown}?{options}" if options else shown


def connect(uri: str, timeout_s: float) -> "AsyncIOMotorClient[Any]":
    """Return the one database client of a process.

    :param timeout_s: the longest that a call may take, in seconds
    :raises SetupError: if the URI is wrong
    """
    if not uri.startswith(("mongodb://", "mongodb+srv://")):
        raise SetupError("MONGODB_URI is not a MongoDB URI: it must begin with mongodb:// or mongodb+srv://")
    try:
        client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri, **client_options(timeout_s))
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise SetupError(f"MONGODB_URI is not a MongoDB URI: {error}") from None
    return client


def client_options(timeout_s: float) -> dict[str, Any]:
    """Return the options of a client for durable writes (majority, journaled) and calls bounded in time (seconds)."""
    return {
        "w": "majority",
        "journal": True,
        "readConcernLevel": "majority",
        "tz_aware": True,
        "appname": "chatserver",
        "serverSelectionTimeoutMS": int(timeout_s * 500),
        "connectTimeoutMS": int(timeout_s * 500),
        "heartbeatFrequencyMS": 2000,
    }


async def initiate_replica_set(uri: str, host: str) -> None:
    """Make a lone `mongod` the primary of a replica set of one, under the address it has now; repeatable.

    :raises SetupError: if it does not become primary within 20 seconds
    """
    client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri, directConnection=True, serverSelectionTimeoutMS=5000)
    config = {"_id": "rs0", "members": [{"_id": 0, "host": host}]}
    try:
        try:
            await client.admin.command("replSetInitiate", config)
        except OperationFailure as error:
            if error.code != 23:  # AlreadyInitialized
                raise
            current = (await client.admin.command("replSetGetConfig"))["config"]
            if current["members"][0]["host"] != host:
                current["members"] = config["members"]
                current["version"] += 1
                await client.admin.command("replSetReconfig", current, force=True)
        async with asyncio.timeout(20):
            while not (await client.admin.command("hello"))["isWritablePrimary"]:
                await asyncio.sleep(0.02)
    except (PyMongoError, TimeoutError) as error:
        raise SetupError(f"The private MongoDB server did not become ready: {error}") from error
    finally:
        client.close()
