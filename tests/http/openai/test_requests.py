"""The requests of the OpenAI source."""

import asyncio

import pytest

from chatserver.sources import Message, Prompt
from tests.http.openai.provider import (
    STORY,
    LLMock,
    Outcome,
    ask,
    listen,
    opened,
    settings,
)


def test_a_plain_answer_arrives_in_pieces(llm: LLMock) -> None:
    llm.script({"type": "reply", "text": STORY})
    outcome = ask(settings(llm.url))
    assert outcome.text == STORY
    assert outcome.error is None
    assert len(outcome.pieces) > 10
    [request] = llm.requests()
    assert request["body"] == {
        "model": "gpt-4.1-mini",
        "stream": True,
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert llm.verdict() == []


def test_the_settings_are_sent(llm: LLMock) -> None:
    ask(
        settings(
            llm.url,
            openai_model="another",
            openai_system_prompt="Be brief.",
            openai_temperature=0.0,
            openai_max_tokens=77,
        ),
        "one",
        "two",
        "three",
    )
    [request] = llm.requests()
    assert request["body"] == {
        "model": "another",
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 77,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
    }


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (16, ["five", "six!", "last"]),  # "four" is an answer without its question
        (12, ["five", "six!", "last"]),
        (11, ["last"]),
        (1, ["last"]),
        (1_000, ["one", "two", "three", "four", "five", "six!", "last"]),
    ],
)
def test_the_newest_messages_that_fit_are_sent_and_the_question_always(
    llm: LLMock, room: int, expected: list[str]
) -> None:
    ask(settings(llm.url, openai_history_chars=room), "one", "two", "three", "four", "five", "six!", "last")
    [request] = llm.requests()
    assert [message["content"] for message in request["body"]["messages"]] == expected


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        pytest.param(["one", "", "three"], ["user: one\n\nthree"], id="reply-without-text"),
        pytest.param(["one", " \n\t", "three"], ["user: one\n\nthree"], id="blank-reply"),
        pytest.param(
            ["one", "two", "three", "", "five", "", "seven"],
            ["user: one", "assistant: two", "user: three\n\nfive\n\nseven"],
            id="two-questions-without-an-answer",
        ),
        pytest.param(
            ["one", "two", " ", "four", "five"],
            ["user: one", "assistant: two\n\nfour", "user: five"],
            id="blank-question-of-another-application",
        ),
        pytest.param(["", "two", "three"], ["user: three"], id="answer-without-its-question"),
        pytest.param(["", "two", "", "four", "five"], ["user: five"], id="two-answers-without-their-questions"),
        pytest.param(
            ["  one\n", "two", " three "], ["user:   one\n", "assistant: two", "user:  three "], id="verbatim"
        ),
    ],
)
def test_roles_alternate_and_nothing_blank_is_sent(llm: LLMock, said: list[str], sent: list[str]) -> None:
    ask(settings(llm.url), *said)
    [request] = llm.requests()
    assert [f"{message['role']}: {message['content']}" for message in request["body"]["messages"]] == sent


@pytest.mark.parametrize(
    "messages", [[], [Message("user", " ")], [Message("user", "one"), Message("assistant", "two")]]
)
def test_a_prompt_without_a_question_fails_and_nothing_is_sent(llm: LLMock, messages: list[Message]) -> None:
    async def run() -> Outcome:
        async with opened(settings(llm.url)) as source:
            return await listen(source, Prompt(messages, turn=1))

    assert asyncio.run(run()).code == "source_failed"
    assert llm.requests() == []
