"""Servers that each break one promise, and the tests that must fail: `python -m tests.mutants NAME`.

The promises are those to the owners, and those that several servers keep among each other.

`python -m tests.mutants none` runs all of these tests with the server as it is.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from tornado.httputil import HTTPHeaders

from chatserver import auth, store
from chatserver.auth import Caller, Credential
from chatserver.branches import Tree
from chatserver.errors import NoForwardedUser, Unauthenticated
from chatserver.handlers import base, identity
from chatserver.handlers.identity import TokenIdentity
from chatserver.hub import Hub, LiveConversation
from chatserver.records import Key
from chatserver.replies.leases import Leases
from chatserver.settings import Settings
from chatserver.store.collection import Condition, Conversations
from chatserver.store.running import RunningReplies
from chatserver.store.turns import State, Turns
from chatserver.streams import Connection, Streams

SEVERAL = "tests/http/test_several_servers.py"
BELOW_HTTP, HTTP = "tests/unit/test_owners.py", "tests/http/test_owners.py"


def hub_keyed_by_id() -> None:
    """Owners share the live conversation of an id."""

    class ById(dict[Any, LiveConversation]):
        def get(self, key: Key, default: Any = None) -> Any:
            return super().get(key.id, default)

        def __setitem__(self, key: Key, live: LiveConversation) -> None:
            super().__setitem__(key.id, live)

        def __delitem__(self, key: Key) -> None:
            super().__delitem__(key.id)

    init = Hub.__init__

    def init_by_id(self: Hub, *arguments: Any) -> None:
        init(self, *arguments)
        self._conversations = ById()

    Hub.__init__ = init_by_id  # type: ignore[assignment, method-assign]


def streams_counted_by_id() -> None:
    """The streams of all owners on an id share one limit."""
    open_stream = Streams.open

    def open_by_id(self: Streams, conversation: Key, *arguments: Any, **options: Any) -> Connection:
        return open_stream(self, Key(None, conversation.id), *arguments, **options)

    Streams.open = open_by_id  # type: ignore[method-assign]


def id_of_a_key_without_the_owner() -> None:
    """Equal idempotency keys of several owners lead to one conversation."""
    id_for_key = store.id_for_key
    store.id_for_key = lambda owner, key: id_for_key(None, key)


def conversation_created_without_its_owner() -> None:
    """A new conversation is stored without its owner."""
    update_one = Conversations.update_one

    async def without_owner(
        self: Conversations, condition: Condition, change: Mapping[str, Any], *, upsert: bool = False
    ) -> bool:
        if upsert:
            condition = Condition({name: value for name, value in condition.items() if name != "owner"})
        return await update_one(self, condition, change, upsert=upsert)

    Conversations.update_one = without_owner  # type: ignore[method-assign]


def conflict_for_the_id_of_another_owner() -> None:
    """A post to another owner's id is refused with 409 instead of 404."""
    examine = Turns._examine

    async def always_known(self: Turns, *arguments: Any) -> State:
        return await examine(self, *arguments) or State(Tree([]), None)

    Turns._examine = always_known  # type: ignore[assignment, method-assign]


def cookie_after_a_bad_header() -> None:
    """If the Authorization header is refused, the cookie is tried."""
    identify = TokenIdentity.identify

    async def second_chance(self: TokenIdentity, headers: HTTPHeaders, peer: str) -> Caller:
        try:
            return await identify(self, headers, peer)
        except Unauthenticated:
            others = HTTPHeaders({name: value for name, value in headers.get_all() if name != "Authorization"})
            return await identify(self, others, peer)

    TokenIdentity.identify = second_chance  # type: ignore[method-assign]


def leeway_granted_twice() -> None:
    """A token is accepted until twice the leeway after it expires."""
    verify = auth.verify

    def with_leeway(credential: Credential, keys: Any, settings: Settings, now: float) -> Caller:
        caller = verify(credential, keys, settings, now - settings.auth_leeway_s)
        return caller._replace(expires_at=caller.expires_at + settings.auth_leeway_s)

    auth.verify = identity.verify = with_leeway  # type: ignore[attr-defined]


def stream_without_expiry() -> None:
    """A stream goes on after its token has expired."""
    open_stream = Streams.open

    def open_without_expiry(self: Streams, *arguments: Any, **options: Any) -> Connection:
        options.pop("valid_until", None)
        return open_stream(self, *arguments, **options)

    Streams.open = open_without_expiry  # type: ignore[method-assign]


def origin_not_checked_without_a_body() -> None:
    """A page of another site may send a request that has no body."""
    is_cross_site = base.is_cross_site  # type: ignore[attr-defined]

    def with_body(request: Mapping[str, str], *arguments: Any, **options: Any) -> bool:
        return request.get("Content-Length", "0") != "0" and is_cross_site(request, *arguments, **options)

    base.is_cross_site = with_body  # type: ignore[attr-defined]


def proxy_header_more_than_once() -> None:
    """Of several headers that name the user, the last one counts."""

    def last(headers: HTTPHeaders, name: str) -> str:
        values = headers.get_list(name)
        if not values or not values[-1]:
            raise NoForwardedUser("no header")
        return values[-1]

    identity.forwarded_owner = last  # type: ignore[attr-defined]


def stop_flag_ignored() -> None:
    """A stop that reaches another server than the one that writes the reply is not stored."""

    async def accepted(*_: Any) -> bool:
        return True

    RunningReplies.request_stop = accepted  # type: ignore[assignment, method-assign]


def outage_ignored() -> None:
    """After an outage longer than a lease, the servers of all running replies are presumed dead."""
    Leases._is_sweep_overdue = False  # type: ignore[assignment, method-assign]


class Mutant(NamedTuple):
    """A server that breaks a promise: `apply` changes this process, and then the tests must fail."""

    apply: Callable[[], None]
    tests: str


MUTANTS: dict[str, Mutant] = {
    apply.__name__: Mutant(apply, tests)
    for apply, tests in (
        (hub_keyed_by_id, f"{HTTP}::test_stream_of_another_owners_conversation_is_that_of_an_unknown_one"),
        (streams_counted_by_id, f"{HTTP}::test_streams_of_another_owner_do_not_fill_the_limit_of_a_conversation"),
        (id_of_a_key_without_the_owner, f"{HTTP}::test_same_key_of_two_owners_starts_two_turns"),
        (conversation_created_without_its_owner, f"{BELOW_HTTP}::test_owner_is_stored_with_the_first_turn_and_kept"),
        (
            conflict_for_the_id_of_another_owner,
            f"{HTTP}::test_conversation_of_another_owner_is_answered_as_an_unknown_one",
        ),
        (cookie_after_a_bad_header, f"{HTTP}::test_token_is_taken_from_the_header_or_the_cookie_only"),
        (leeway_granted_twice, "tests/unit/test_auth.py::test_token_expires_after_the_leeway"),
        (stream_without_expiry, f"{HTTP}::test_stream_that_has_expired_while_the_machine_slept_gets_no_token"),
        (origin_not_checked_without_a_body, f"{HTTP}::test_page_of_another_site_cannot_use_the_cookie"),
        (proxy_header_more_than_once, f"{HTTP}::test_proxy_must_name_one_owner"),
        (stop_flag_ignored, f"{SEVERAL}::test_stop_on_another_server_loses_no_text_of_any_stream"),
        (outage_ignored, f"{SEVERAL}::test_outage_longer_than_a_lease_interrupts_no_reply"),
    )
}


def main(name: str) -> int:
    """Apply a mutant and run its tests; return pytest's exit code."""
    tests = [each.tests for each in MUTANTS.values()]
    if name != "none":
        mutant = MUTANTS[name]
        mutant.apply()
        tests = [mutant.tests]
    return pytest.main(["-x", "-p", "no:cacheprovider", *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
