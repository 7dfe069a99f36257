"""Types of the page's JavaScript, checked by tsc: the comments of its modules, and the declarations for `client.js`."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.page.steps import NODE_MODULES
from tests.processes import ROOT

pytestmark = pytest.mark.needs("node")

WEB = ROOT / "chatserver" / "web"
CLIENT = (WEB / "client.js").read_text()
DECLARATIONS = (WEB / "client.d.ts").read_text()
OPTIONS = "--noEmit --strict --target es2023 --module esnext --moduleResolution bundler --lib es2023,dom,dom.iterable"

AGREEMENT = """
import * as actual from "./actual.js";
import * as declared from "./declared.js";

// Identity, not assignability: a missing optional parameter or option is a difference, too.
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends (<T>() => T extends B ? 1 : 2) ? true : false;
type Differences<A, B> = {
  [K in keyof A | keyof B]: K extends keyof A & keyof B ? (Same<A[K], B[K]> extends true ? never : K) : K
}[keyof A | keyof B];

// The public members, without those of EventTarget. The two classes Api are never the same: both have private members.
type Public<T> = { -readonly [K in Exclude<keyof T, keyof EventTarget | "api">]: T[K] };
type Classes = "Api" | "ApiError" | "Conversation";
type Functions<T> = Omit<T, Classes>;
type OptionsOf<T> = T extends new (api: any, ...rest: infer R) => unknown ? R : never;

type Found =
  | Differences<Functions<typeof actual>, Functions<typeof declared>>
  | Exclude<Classes, keyof typeof actual & keyof typeof declared>
  | Differences<Public<actual.Api>, Public<declared.Api>>
  | Differences<Public<actual.ApiError>, Public<declared.ApiError>>
  | Differences<Public<actual.Conversation>, Public<declared.Conversation>>
  | Differences<ConstructorParameters<typeof actual.Api>, ConstructorParameters<typeof declared.Api>>
  | Differences<ConstructorParameters<typeof actual.ApiError>, ConstructorParameters<typeof declared.ApiError>>
  | Differences<OptionsOf<typeof actual.Conversation>, OptionsOf<typeof declared.Conversation>>
  | Differences<Types<"actual">, Types<"declared">>;

type Types<From> = From extends "actual"
  ? [actual.Status, actual.Message, actual.Summary, actual.Turn, actual.Unsent, actual.Me, actual.State,
     actual.GetHeaders]
  : [declared.Status, declared.Message, declared.Summary, declared.Turn, declared.Unsent, declared.Me, declared.State,
     declared.GetHeaders];

export const none: never = null as unknown as Found;
export const api: declared.Api = new actual.Api("");
export const conversation: Public<declared.Conversation> = new actual.Conversation(new actual.Api(""), "");
"""

CONSUMER = """
import { Api, ApiError, Conversation, type Message, newId, type State } from "./client.js";

const api = new Api("https://chat.example/");
const conversation = new Conversation(api, newId(), { fresh: true });
conversation.addEventListener("change", () => show(conversation.messages, conversation.state));
conversation.addEventListener("end", (event) => show([event.detail], "live"));
conversation.addEventListener("sent", ({ detail }) => detail.trim());
conversation.open();
await conversation.say("Hello!").catch((error) => error instanceof ApiError && error.isUnanswered);
const { conversations, nextCursor } = await api.list(undefined, 5);
await api.list(nextCursor);
conversations.map((each) => each.status === "idle" && each.messageCount);

function show(messages: Message[], state: State) {
  console.log(messages.at(-1)?.error?.code, messages.map((each) => each.id?.length), state);
}

// @ts-expect-error -- A message is a text.
conversation.say(42);
// @ts-expect-error -- Without a key, a lost answer could double the message.
api.say(conversation.id, "Hello!");
// @ts-expect-error -- The state only changes by the stream.
conversation.state = "live";
// @ts-expect-error -- So do the messages.
conversation.messages = [];
// @ts-expect-error -- There is no such state.
if (conversation.state === "closed") conversation.open();
// @ts-expect-error -- The id may be unknown yet.
conversation.messages[0].id.length;
// @ts-expect-error -- The detail of `sent` is a text.
conversation.addEventListener("sent", (event) => event.detail.content);
// @ts-expect-error -- There is no such option.
new Conversation(api, newId(), { resume: true });
// @ts-expect-error -- `limit` is a number.
api.history(newId(), { limit: "5" });
// @ts-expect-error -- A position is needed.
api.streamUrl(newId());
"""


def check(*files: Path, options: str = "") -> subprocess.CompletedProcess[str]:
    tsc = NODE_MODULES / ".bin" / "tsc"
    command = [str(tsc), *OPTIONS.split(), "--types", "", *options.split(), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def compare(folder: Path, client: str, declarations: str) -> str:
    """Return the differences that tsc finds between a client and declarations; empty if there are none."""
    (folder / "actual.js").write_text(client)
    (folder / "declared.d.ts").write_text(declarations)
    (folder / "agreement.ts").write_text(AGREEMENT)
    return check(folder / "agreement.ts", options="--allowJs --checkJs").stdout


def test_types_in_the_comments_hold() -> None:
    checked = check(*sorted(WEB.glob("*.js")), WEB / "client.d.ts", options="--allowJs --checkJs")
    assert checked.returncode == 0, checked.stdout


def test_declarations_agree_with_the_client(tmp_path: Path) -> None:
    assert compare(tmp_path, CLIENT, DECLARATIONS) == ""
    events = re.search(r"interface ConversationEventMap \{(.*?)\n\}", DECLARATIONS, re.DOTALL)
    assert events
    conversation = CLIENT.partition("export class Conversation ")[2]
    fired = set(re.findall(r'new (?:Custom)?Event\("(\w+)"', conversation))
    assert set(re.findall(r"^  (\w+):", events[1], re.M)) == fired


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  list(cursor, limit = 30) {", "  conversations(cursor, limit = 30) {"),
        ("history(id, { limit, before } = {})", "history(id, { limit, before } = {}, signal = null)"),
        ("{{limit?: number, before?: string}}", "{{limit?: number, before?: string, after?: string}}"),
        ("@returns {Promise<Turn>}", "@returns {Promise<Turn|null>}"),
        ('"idle"|"streaming"} status', '"idle"|"streaming"|"paused"} status'),
        ("  get busy() {", "  get isBusy() {"),
        ("{fresh?: boolean, listed?: boolean}", "{fresh?: boolean, listed?: boolean, history?: boolean}"),
        ('message, retryAfterS = 0, loginUrl = "")', 'message, retryAfterS, loginUrl = "")'),
        ("export function isId(/** @type {string} */ text) {", "export function isId(/** @type {string?} */ text) {"),
        ("export function newId() {", "export const VERSION = 1;\nexport function newId() {"),
    ],
    ids=[
        "renamed-method",
        "new-parameter",
        "new-option",
        "other-result",
        "other-field",
        "renamed-getter",
        "new-option-of-the-constructor",
        "required-parameter",
        "other-parameter",
        "new-export",
    ],
)
def test_client_that_differs_from_its_declarations_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert old in CLIENT
    assert "agreement.ts" in compare(tmp_path, CLIENT.replace(old, new), DECLARATIONS)


def test_declarations_accept_a_right_use_and_refuse_a_wrong_one(tmp_path: Path) -> None:
    (tmp_path / "client.d.ts").write_text(DECLARATIONS)
    (tmp_path / "consumer.ts").write_text(CONSUMER)

    checked = check(tmp_path / "consumer.ts", options="--noUnusedLocals --exactOptionalPropertyTypes")

    assert checked.returncode == 0, checked.stdout
