"""The specification: valid, complete, and true."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from tornado.web import RequestHandler

from chatserver import errors, schemas
from chatserver.errors import ChatError, ReplyCode
from chatserver.handlers.openapi import make_openapi, problem_codes
from chatserver.records import INTERRUPTED
from chatserver.settings import Settings
from tests.apps import App, MakeApp, Script
from tests.clients import Event, RawStream, new_id

pytestmark = pytest.mark.gen_test


async def test_document_is_served_and_valid(app: App) -> None:
    document = (await app.client.http.get("/openapi.json")).json()
    validate(document)
    assert document["openapi"] == "3.1.0"
    say = document["components"]["schemas"]["SayRequest"]
    assert say["properties"]["input"]["maxLength"] == app.settings.max_input_chars


async def test_every_route_and_method_is_in_it_and_nothing_else(app: App) -> None:
    served = {}
    for rule in app.server.application.wildcard_router.rules:
        path = re.sub(r"\(\[\^/\]\*\)", "{conversationId}", _matcher(rule).regex.pattern.removesuffix("$"))
        methods = {
            name.lower()
            for name in RequestHandler.SUPPORTED_METHODS
            if name not in ("OPTIONS", "HEAD")
            and getattr(rule.target, name.lower()) is not getattr(RequestHandler, name.lower())
        }
        served[path.replace("\\.", ".")] = methods
    served["/"] = served.pop("/()")
    del served["/web/(.*)"]
    document = make_openapi(Settings())
    assert served == {path: set(item) - {"parameters"} for path, item in document["paths"].items()}


def test_document_says_how_a_user_is_identified() -> None:
    """Nothing of it without users, or if a proxy identifies them."""
    secret = ("x" * 32,)
    for settings, wanted in (
        (Settings(auth="none"), []),
        (Settings(auth="proxy", trusted_proxies=("10.0.0.1",)), []),
        (Settings(auth="jwt", auth_secret=secret), ["bearer"]),
        (Settings(auth="jwt", auth_secret=secret, auth_cookie="__Host-token"), ["bearer", "cookie"]),
    ):
        document = make_openapi(settings)
        validate(document)
        schemes = document["components"].get("securitySchemes", {})
        assert list(schemes) == wanted
        if "cookie" in schemes:
            assert schemes["cookie"]["name"] == "__Host-token"
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if method == "parameters":
                    continue
                needs_user = path.startswith("/chat") or path == "/me"
                assert operation.get("security", []) == ([{name: []} for name in wanted] if needs_user else []), path
                assert ("401" in operation["responses"]) is (needs_user or path == "/metrics"), path


def _matcher(rule: Any) -> Any:
    return rule.matcher


async def test_every_problem_code_and_event_is_described() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ChatError)]
    assert {kind.code for kind in kinds} == set(problem_codes())
    for kind in kinds:
        assert problem_codes()[kind.code] == (kind.status, kind.when)
    document = make_openapi(Settings())
    for code, (status, when) in problem_codes().items():
        assert f"`{code}` ({status}): {when}" in document["info"]["description"]
    stream = document["paths"]["/chat/stream/{conversationId}"]["get"]["responses"]["200"]["description"]
    for event in ("token", "done", "error", "input", "message", "reset", "head", "title"):
        assert f"`{event}`" in stream


async def test_each_operation_documents_the_problem_codes_that_it_answers_with(app: App) -> None:
    told = {
        operation["operationId"]: {
            code
            for status, answer in operation["responses"].items()
            if status >= "400"
            for code in re.findall(r"`(\w+)`", answer["description"])
        }
        for item in make_openapi(Settings())["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    }
    every = told["health"]
    assert {"host_not_allowed", "internal"} <= every and "invalid_request" not in every
    for name in ("openapi", "docs", "page"):
        assert told[name] == every
    assert told["metrics"] == every | {"not_found", "unauthenticated", "invalid_token"}
    assert told["ready"] == every | {"database_unavailable", "draining", "keys_unavailable"}
    who = {"unauthenticated", "invalid_token", "token_expired", "keys_unavailable"}
    assert told["me"] == every | who | {"not_found"}
    assert told["deleteAll"] == every | who | {"not_found", "database_unavailable", "cross_site"}
    assert told["exportConversations"] == every | who | {"database_unavailable"}
    assert told["listConversations"] == every | who | {"invalid_request", "database_unavailable"}
    assert told["say"].isdisjoint({"invalid_id", "nothing_to_retry", "not_a_reply"})
    assert told["show"].isdisjoint({"quota_exceeded", "draining", "not_a_reply"})
    assert told["rename"].isdisjoint({"reply_in_progress", "unsupported_conversation", "draining"})
    assert told["stop"].isdisjoint({"too_many_replies", "draining", "reply_in_progress"})
    # That one is the answer to methods that are not described.
    assert set().union(*told.values()) == set(problem_codes()) - {"method_not_allowed"}
    http, turn = app.client.http, (await app.client.turn("Hello"))[0]
    known, question = turn["conversationId"], turn["messageId"]
    for name, method, path, body in (
        ("say", "POST", "/chat", "{"),
        ("say", "POST", "/chat", "{}"),
        ("say", "POST", "/chat", f'{{"conversationId": "{known}", "input": "hi", "parentId": "{new_id()}"}}'),
        ("listConversations", "GET", "/chat?limit=0", None),
        ("getHistory", "GET", "/chat/1", None),
        ("getHistory", "GET", "/chat/%ff", None),
        ("getHistory", "GET", f"/chat/{known}?limit=0", None),
        ("deleteConversation", "DELETE", f"/chat/{new_id()}", None),
        ("stream", "GET", "/chat/stream/1", None),
        ("stream", "GET", f"/chat/stream/{known}?until=x", None),
        ("stop", "POST", f"/chat/{known}/stop", "[]"),
        ("stop", "POST", f"/chat/{new_id()}/stop", None),
        ("retry", "POST", f"/chat/{known}/retry", f'{{"messageId": "{question}"}}'),
        ("retry", "POST", f"/chat/{known}/retry", f'{{"messageId": "{new_id()}"}}'),
        ("show", "PUT", f"/chat/{known}/head", "{}"),
        ("show", "PUT", f"/chat/{known}/head", f'{{"messageId": "{new_id()}"}}'),
        ("rename", "PATCH", f"/chat/{known}", '{"title": " "}'),
        ("rename", "PATCH", f"/chat/{new_id()}", '{"title": "New"}'),
        ("getHistory", "GET", f"/chat/{known}?branches=all&limit=1", None),
    ):
        response = await http.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert response.json()["code"] in told[name], path


@pytest.mark.parametrize("value", [{"$gt": ""}, 5, None, [], True])
async def test_one_mistake_is_reported_once(value: object) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        schemas.validate("say", {"input": value}, 100)
    assert raised.value.fields == [{"pointer": "/input", "detail": "must be of type string"}]


def check(document: dict[str, Any], name: str, value: object) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    Draft202012Validator(schema).validate(value)


async def test_answers_and_events_are_as_described(app: App, make_app: MakeApp) -> None:
    http = app.client.http
    document = (await http.get("/openapi.json")).json()
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    check(document, "Accepted", answer)
    check(document, "Conversation", await app.client.history(conversation_id))
    check(document, "Stopped", (await http.post(f"/chat/{conversation_id}/stop")).json())
    events = await app.client.events(conversation_id, f"{conversation_id}-0")
    events += [each async for each in app.client.stream(conversation_id, "gone")]
    failing = await make_app(source=Script(errors.SourceError("source_failed", "Out of paper.")))
    events += (await failing.client.turn("Hello"))[1]
    foreign = ObjectId()
    app.database.conversations.insert_one({"_id": foreign, "messages": [{"role": "system", "content": "Be kind."}]})
    async for event in app.client.stream(str(foreign), f"{foreign}-0"):
        events.append(event)
        break
    check(document, "Conversation", await app.client.history(str(foreign)))
    again = await http.post(f"/chat/{conversation_id}/retry", json={"messageId": answer["replyId"]})
    check(document, "Accepted", again.json())
    await app.until_idle()
    check(document, "Conversation", await app.client.history(conversation_id))
    shown = await http.put(f"/chat/{conversation_id}/head", json={"messageId": answer["replyId"]})
    check(document, "Shown", shown.json())
    renamed = await http.patch(f"/chat/{conversation_id}", json={"title": "New"})
    check(document, "Summary", renamed.json())
    opening = app.client.stream(conversation_id)
    events += [await anext(opening) for _ in range(2)]
    raw = await RawStream(app.port, f"/chat/stream/{conversation_id}").open()
    await raw.reader.readuntil(b"event: ping\n")
    ping = (await raw.reader.readline()).removeprefix(b"data: ")
    raw.close()
    events.append(Event("ping", "", json.loads(ping)))
    assert {event.name for event in events} == set(document["components"]["schemas"]["Events"]["properties"])
    for event in events:
        check(document, f"Events/properties/{event.name}", event.data)
    check(document, "Conversation", await app.client.history(conversation_id, limit=1))
    check(document, "Conversation", await app.client.history(conversation_id, branches="all"))
    check(document, "Conversations", (await http.get("/chat", params={"limit": 1})).json())
    check(document, "Stopped", (await http.post(f"/chat/{conversation_id}/stop")).json())
    check(document, "Problem", (await http.get(f"/chat/{new_id()}")).json())
    check(document, "Problem", (await http.post("/chat", json={})).json())
    for path in ("/healthz", "/readyz"):
        check(document, "Health", (await http.get(path)).json())


async def test_documentation_page_needs_no_network_and_names_everything(app: App) -> None:
    response = await app.client.http.get("/docs")
    assert response.status_code == 200 and "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href)=["'](https?:|//)|<script|style=""", response.text)
    assert (await app.client.http.get("/web/docs.css")).headers["Content-Type"].startswith("text/css")
    for name in ("POST /chat", "/chat/stream/{conversationId}", "reply_in_progress", "Idempotency-Key", "SayRequest"):
        assert name in response.text
    for name in ("X-Request-Id", "integer, minimum 1, maximum 100, default 20", "<code>^[!-~]{1,255}$</code>"):
        assert name in response.text


def test_every_code_of_a_failed_reply_is_described() -> None:
    package = Path(errors.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "errors.py")
    written = {*re.findall('"(source_[a-z_]+)"', text)}
    named = {ReplyCode[name].value for name in re.findall(r"ReplyCode\.([A-Z_]+)", text)}

    # These two are not codes of a source.
    assert named | written | {"interrupted", "conversation_full"} == {code.value for code in ReplyCode}
    assert INTERRUPTED.code == ReplyCode.INTERRUPTED
    description = make_openapi(Settings())["info"]["description"]
    for code in ReplyCode:
        assert f"`{code}`: {code.when}" in description


async def test_schema_files_are_schemas() -> None:
    for name in (path.stem for path in Path(schemas.__file__).parent.glob("*.json")):
        Draft202012Validator.check_schema(schemas.load(name))
