"""The cost of the list: MongoDB looks at no more keys and documents than a page has, among those of other owners."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from bson import ObjectId
from motor.motor_asyncio import AsyncIOMotorClient

from chatserver.records import Place, Summary
from chatserver.store import Store, client_options, new_id
from tests.apps import Database
from tests.unit.test_store import Commands

pytestmark = [pytest.mark.gen_test, pytest.mark.process]

LIMIT = 21
MOST = LIMIT + 6
"""Each query may look at a key or two beyond its results, to see that there are no more."""
TIME = datetime(2026, 1, 1, tzinfo=UTC)
UNDATED: Any = object()


def conversations(owner: str | None, times: Sequence[Any]) -> list[dict[str, Any]]:
    """Return an owner's conversations with some values of `updatedAt`."""
    made = []
    for time in times:
        document: dict[str, Any] = {"_id": ObjectId(new_id()), "messages": [], "createdAt": TIME}
        document |= {} if time is UNDATED else {"updatedAt": time}
        made.append(document | ({} if owner is None else {"owner": owner}))
    return made


def dates(count: int) -> list[datetime]:
    random = Random(count)
    return [TIME + timedelta(seconds=random.randrange(10**6)) for _ in range(count)]


OWNERS: dict[str | None, list[Any]] = {
    "few": dates(5),
    "many": dates(500),
    "one moment": [TIME] * 500,
    "undated": [UNDATED] * 500,
    "both": [*dates(300), *[UNDATED] * 300],
    "numbers": [*range(500)],
    None: [*dates(300), *[UNDATED] * 300],
}


@pytest.fixture
def commands(database: Database) -> Commands:
    """A record of commands, after the database was filled with conversations of `OWNERS` and of others."""
    for owner, times in OWNERS.items():
        database.conversations.insert_many(conversations(owner, times))
    for number in range(5):
        others = [*dates(1500), *[UNDATED] * 400, *range(100)]
        database.conversations.insert_many(conversations(f"other {number}", others))
    return Commands()


def open_store(database: Database, commands: Commands) -> Store:
    client: Any = AsyncIOMotorClient(database.uri, event_listeners=[commands], **client_options(4.0))
    return Store(client, database.uri, timeout_s=4.0, lease_ms=10_000, history=50)


def examined(database: Database, finds: Sequence[Any]) -> tuple[int, int]:
    """Return how many keys and documents MongoDB looks at for some queries."""
    keys = documents = 0
    for find in finds:
        query = {name: find[name] for name in ("find", "filter", "sort", "limit", "projection")}
        stats = database.db.command("explain", query, verbosity="executionStats")["executionStats"]
        keys += stats["totalKeysExamined"]
        documents += stats["totalDocsExamined"]
    return keys, documents


@pytest.mark.parametrize("owner", OWNERS, ids=str)
async def test_no_page_looks_at_more_than_it_shows(database: Database, commands: Commands, owner: str | None) -> None:
    store = open_store(database, commands)
    await store.build_indexes()
    seen: list[Summary] = []
    after: Place | None = None
    while True:
        commands.sent.clear()
        page = await store.summaries(owner, LIMIT, after)
        finds = [each for each in commands.sent if "find" in each]
        seen += page

        assert max(examined(database, finds)) <= MOST, finds
        if len(page) < LIMIT:
            break
        after = page[-1].place
    await store.close()
    assert len({each.id for each in seen}) == len(seen) == len(OWNERS[owner])


@pytest.mark.parametrize("owner", ["few", "many", None], ids=str)
async def test_keys_of_an_owner_are_read_from_an_index(
    database: Database, commands: Commands, owner: str | None
) -> None:
    store = open_store(database, commands)
    await store.build_indexes()
    first = await store.keys(owner, LIMIT)
    second = await store.keys(owner, LIMIT, first[-1])
    finds = [each for each in commands.sent if "find" in each]
    await store.close()

    assert max(examined(database, finds)) <= 2 * LIMIT
    ids = [each.id for each in [*first, *second]]
    assert ids == sorted(ids) and len(set(ids)) == len(ids) == min(2 * LIMIT, len(OWNERS[owner]))


async def test_list_and_keys_work_while_the_indexes_are_missing(database: Database, commands: Commands) -> None:
    store = open_store(database, commands)
    for owner, times in OWNERS.items():
        assert len(await store.summaries(owner, 1000, None)) == len(times)
        assert len(await store.keys(owner, 1000)) == len(times)
    await store.close()
