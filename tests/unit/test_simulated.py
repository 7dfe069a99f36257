"""The simulated source: its text, its tokens and its pace."""

import asyncio
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.settings import Settings
from chatserver.sources import Message, Prompt
from chatserver.sources.simulated import CLOSINGS, CODE, LISTS, OPENINGS, THOUGHTS, Simulated, compose, quote, tokenise
from tests.clients import Client, new_id
from tests.processes import Server

QUESTIONS = [
    "hello",
    "¿Qué tal?",
    "tell me a story " * 200,
    "x" * 32_000,
    "a " * 16_000,
    "日本語で" * 500,
    "👩‍👩‍👧‍👦" * 200,
]


def simulated(delay_ms: int, tokens: int | None = None) -> Simulated:
    return Simulated(Settings(simulated_token_delay_ms=delay_ms, simulated_tokens=tokens))


def prompt(question: str, turn: int = 1) -> Prompt:
    return Prompt((Message("user", question),), turn)


async def tokens_of(source: Simulated, question: str, turn: int = 1) -> list[str]:
    return [token async for token in source.reply(prompt(question, turn))]


def is_inner(char: str) -> bool:
    """Return whether a character is displayed as a part of the one before it."""
    return unicodedata.category(char).startswith("M") or char == "\u200d" or "\U0001f3fb" <= char <= "\U0001f3ff"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question[:8])
@pytest.mark.parametrize("turn", range(1, 30))
def test_each_answer_is_60_to_150_words_with_quote_list_code_and_non_ascii(question: str, turn: int) -> None:
    text = compose(question, turn)
    assert 60 <= len(text.split()) <= 150
    assert f"> {quote(question)}\n" in text
    lines = text.split("\n")
    assert sum(line.startswith(("- ", "1. ", "2. ", "3. ")) for line in lines) >= 3
    fences = [line for line in lines if line.startswith("```")]
    assert len(fences) == 2
    assert len(fences[0]) > 3
    assert fences[1] == "```"
    assert not text.replace(quote(question), "").isascii()


def test_every_part_that_can_be_chosen_keeps_the_promise_of_the_length() -> None:
    parts = (OPENINGS, THOUGHTS, LISTS, CODE, CLOSINGS)
    filled = 2  # "{words}" and "{chars}" become two words each
    for words in (str.split, re.compile(r"\w+").findall):  # with and without punctuation that stands alone
        shortest = sum(min(len(words(text)) for text in options) for options in parts)
        longest = sum(max(len(words(text)) for text in options) for options in parts)
        assert shortest + len(words("> one")) >= 60
        assert longest + filled + len(words(f"> {quote('a ' * 99)}")) <= 150


def test_the_answer_is_the_same_again_and_varies_with_the_question_and_the_turn() -> None:
    source = simulated(0)
    first = asyncio.run(tokens_of(source, "hello"))
    assert first == asyncio.run(tokens_of(simulated(0), "hello"))
    answers = {compose(question, turn) for question in ("hello", "goodbye") for turn in range(1, 11)}
    assert len(answers) == 20
    shapes = Counter(compose("hello", turn).split("\n\n")[2] for turn in range(1, 60))
    assert len(shapes) == len(THOUGHTS), "each part gets its turn"


def test_a_short_question_is_quoted_whole_and_a_long_one_in_part() -> None:
    assert quote("  how\r\n\r\nare   you? ") == "how are you?"
    assert quote("y" * 90) == "y" * 90
    assert quote("y" * 91) == "y" * 90 + " …"
    assert quote("one two " * 6) == ("one two " * 6).strip()
    assert quote("one two " * 7) == ("one two " * 6).strip() + " …"
    assert quote("incomprehensibilities " * 5) == ("incomprehensibilities " * 4).strip() + " …"
    assert quote("a" * 89 + "e\u0301" + "b") == "a" * 89 + " …", "not between a letter and its accent"
    assert quote("\u0301" * 200).endswith(" …")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 1000))
def test_tokens_joined_are_the_text_and_none_starts_within_a_character(question: str, turn: int) -> None:
    for text in (question, compose(question, turn)):
        tokens = list(tokenise(text))
        assert "".join(tokens) == text
        assert all(tokens)
        assert not any(is_inner(token[0]) for token in tokens[1:])
        assert not any(token.endswith("\u200d") for token in tokens[:-1])


def test_tokens_look_like_a_models() -> None:
    assert list(tokenise("Hello there, world! 2026\n\n- a")) == [
        "Hello",
        " there",
        ",",
        " world",
        "!",
        " 202",
        "6",
        "\n\n",
        "-",
        " a",
    ]
    assert list(tokenise("incomprehensible")) == ["incompreh", "ensible"]
    assert list(tokenise("🇪🇸🇫🇷 👍🏽 👩‍🚀 e\u0301te\u0301")) == ["🇪🇸", "🇫🇷", " 👍🏽", " 👩‍🚀", " e\u0301", "te\u0301"]
    assert list(tokenise("a\r\nb")) == ["a", "\r\n", "b"]
    tokens = list(tokenise(compose("hello", 1)))
    assert 100 < len(tokens) < 400
    assert max(map(len, tokens)) <= 12


@pytest.mark.parametrize("count", [1, 20, 5_000])
def test_a_set_number_of_tokens_is_kept_whatever_the_question(count: int) -> None:
    source = simulated(0, count)
    for question in ("hello", "long " * 1000):
        tokens = asyncio.run(tokens_of(source, question))
        assert len(tokens) == count
        assert all(tokens)


def test_replies_at_delay_0_take_turns_and_leave_the_loop_to_others() -> None:
    async def run() -> None:
        source = simulated(0, 100)
        said: Counter[int] = Counter()
        spread = 0

        async def consume(number: int) -> None:
            nonlocal spread
            async for _ in source.reply(prompt("hello")):
                said[number] += 1
                spread = max(spread, max(said.values()) - min(said[n] for n in range(50)))

        passes = 0
        replies = asyncio.gather(*(consume(number) for number in range(50)))
        while not replies.done():
            await asyncio.sleep(0)
            passes += 1
        await replies
        assert set(said.values()) == {100}
        assert spread <= 1, "none is a token ahead of another"
        assert passes >= 100, "something else runs between two tokens"

    asyncio.run(run())


def test_the_pace_is_the_delay_without_drift() -> None:
    async def run() -> float:
        started = time.monotonic()
        assert len(await tokens_of(simulated(10, 50), "hello")) == 50
        return time.monotonic() - started

    # Once out of ten, since the machine may be busy; the drift of plain sleeps would be there each time.
    assert any(0.49 <= asyncio.run(run()) < 0.54 for _ in range(10))


def test_many_that_fall_due_at_once_are_woken_in_parts() -> None:
    async def run() -> list[int]:
        # Long enough for all of them to begin before the first is due.
        source = simulated(200, 1)
        said = 0

        async def consume() -> None:
            nonlocal said
            async for _ in source.reply(prompt("hello")):
                said += 1

        replies = [asyncio.create_task(consume()) for _ in range(700)]
        replies[5].cancel()
        in_a_turn = []
        while not all(each.done() for each in replies):
            before = said
            await asyncio.sleep(0)
            in_a_turn.append(said - before)
        return in_a_turn

    in_a_turn = asyncio.run(run())
    assert sum(in_a_turn) == 699
    assert max(in_a_turn) == 200, "the others wait for the next turn of the loop"


def test_tokens_due_in_a_stall_are_sent_right_after_it() -> None:
    async def run(stall_s: float) -> list[float]:
        times = []
        async for _ in simulated(30, 30).reply(prompt("hello")):
            times.append(time.monotonic())
            if len(times) == 2:
                time.sleep(stall_s)
        return times

    def whole_run_is(least_s: float, most_s: float, stall_s: float) -> bool:
        times = asyncio.run(run(stall_s))
        return least_s <= times[-1] - times[0] < most_s

    # Once out of ten, since the machine may be busy.
    assert any(whole_run_is(0.84, 0.96, stall_s=0.3) for _ in range(10)), "29 intervals: the stall is made good"
    assert any(whole_run_is(1.34, 1.46, stall_s=1.0) for _ in range(10)), "half a second of it is"


def test_a_reply_can_be_cancelled_or_closed_anywhere() -> None:
    async def run() -> None:
        source = simulated(30_000)
        task = asyncio.create_task(tokens_of(source, "hello"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with aclosing(simulated(0).reply(prompt("hello"))) as reply:
            assert await anext(reply)
        assert [token async for token in reply] == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_replies_that_share_a_timer_do_not_depend_on_each_other() -> None:
    async def run() -> None:
        source = simulated(1, 2000)
        said: Counter[int] = Counter()

        async def say(number: int) -> None:
            async for _ in source.reply(prompt("hello")):
                said[number] += 1
                if number % 2 and said[number] == number:
                    # Cancelled while it sleeps, its next token falling due with those of others.
                    asyncio.get_running_loop().call_soon(tasks[number].cancel)

        tasks = [asyncio.create_task(say(number)) for number in range(100)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in done[1::2])
        assert all(said[number] == 2000 for number in range(0, 100, 2))

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started >= 1.5


@pytest.mark.alone
def test_200_replies_at_delay_0_leave_room_for_all_streams_and_healthz(make_server: Callable[..., Server]) -> None:
    """That no reply, and no request, waits for another one's end."""
    server = make_server(SIMULATED_TOKEN_DELAY_MS=0, SIMULATED_TOKENS=2000, DATABASE_TIMEOUT_S=60).start()

    async def run() -> None:
        client = Client(server.url)
        conversations = [new_id() for _ in range(200)]
        received: Counter[str] = Counter()

        async def watch(conversation_id: str) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"GET /chat/stream/{conversation_id}?until=done HTTP/1.0\r\n\r\n".encode())
            while data := await reader.read(65536):
                received[conversation_id] += data.count(b"event: token")
            writer.close()
            await writer.wait_closed()

        watching = [asyncio.create_task(watch(each)) for each in conversations]
        while len(received) < 200:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(client.say("hello", each) for each in conversations))
        answers = 0
        while True:
            before = received.copy()
            response = await client.http.get("/healthz")
            assert response.status_code == 200
            # Replies that started while the others were being posted may be nearly complete.
            going = [each for each in conversations if received[each] < 1900]
            if len(going) < 100:
                break
            answers += 1
            assert answers == 1 or all(received[each] > before[each] for each in going)
        assert answers >= 3
        await asyncio.gather(*watching)
        for each in conversations:
            assert len((await client.history(each))["messages"]) == 2
        await client.close()

    asyncio.run(run())
