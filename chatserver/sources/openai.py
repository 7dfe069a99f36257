"""Replies by OpenAI, or by any server that speaks its chat completions: the only module that knows the SDK.

Another attempt is made only before the first word of a reply, and only at what may pass by itself: a server that is
away, too busy or that breaks off. After the first word a failure ends the reply; what was said is kept by the caller.
"""

import asyncio
import codecs
import logging
import math
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletionChunk

from chatserver.errors import SetupError, SourceError
from chatserver.settings import Settings
from chatserver.sources import Message, Prompt

OFFICIAL_URL = "https://api.openai.com/v1"
ATTEMPTS = 3
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0  # a server that asks for more is taken at its word: the reply fails and says when to try again
LONGEST_WAIT_SAID_S = 86_400.0  # whatever the server asks
DRAIN_S = 1.0

logger = logging.getLogger(__name__)


class PassingError(SourceError):
    """A failure that another attempt may get over, after `wait_s` seconds if the server said so."""

    def __init__(self, code: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(code, message)
        self.wait_s = wait_s


class OpenAI:
    """Streams chat completions; one client, and so one pool of connections, for all replies."""

    def __init__(self, settings: Settings) -> None:
        """Read the settings, without calling out.

        :raises SetupError: if OPENAI_BASE_URL is no address
        """
        self._model = settings.openai_model
        self._system_prompt = settings.openai_system_prompt
        self._history_chars = settings.openai_history_chars
        url = _address(settings.openai_base_url or OFFICIAL_URL)
        self._options: dict[str, Any] = {}
        if settings.openai_temperature is not None:
            self._options["temperature"] = settings.openai_temperature
        if settings.openai_max_tokens is not None:
            # OpenAI's newer models know only the new name, other servers often only the old one.
            official = url.host.endswith((".openai.com", ".azure.com"))
            self._options["max_completion_tokens" if official else "max_tokens"] = settings.openai_max_tokens
        self._client = openai.AsyncOpenAI(
            api_key=settings.openai_api_key or "unset",
            base_url=url,
            max_retries=0,  # `reply` makes the attempts, with a shorter patience than the SDK's two minutes
            timeout=httpx2.Timeout(settings.openai_read_timeout_s, connect=settings.openai_connect_timeout_s),
        )

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Return the reply's text as it arrives; closing the generator closes the request to the server, too.

        :raises SourceError: with one of the codes of `_understood` and `_stream`
        """
        messages = self._messages(prompt)
        for attempt in range(1, ATTEMPTS + 1):
            speaking = False
            try:
                async with aclosing(self._stream(messages)) as pieces:
                    async for text in pieces:
                        speaking = True
                        yield text
                return
            except PassingError as failure:
                wait_s = failure.wait_s
                if wait_s is None:
                    wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1)
                if speaking or attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                    raise
                logger.info("attempt %d of %d failed (%s), the next in %.1f s", attempt, ATTEMPTS, failure.code, wait_s)
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """Return what is sent: the system prompt and the newest messages that fit, the question in any case."""
        *history, question = prompt.messages
        room = self._history_chars - len(question.content)
        sent: list[Message] = [question]
        for message in reversed(history):
            room -= len(message.content)
            if room < 0:
                break
            if message.content:  # a reply that failed at once has none, and some servers refuse such messages
                sent.append(message)
        if sent[-1].role == "assistant":  # an answer whose question no longer fits; some models insist on an order
            sent.pop()
        if self._system_prompt is not None:
            sent.append(Message("system", self._system_prompt))
        return [{"role": message.role, "content": message.content} for message in reversed(sent)]

    async def _stream(self, messages: list[dict[str, str]]) -> AsyncGenerator[str, None]:
        """Return the text of one attempt."""
        started = False
        try:
            create: Any = self._client.chat.completions.create  # its overloads want literal types for each message
            stream: openai.AsyncStream[ChatCompletionChunk] = await create(
                model=self._model, messages=messages, stream=True, **self._options
            )
            started = True
            # Leaving this block closes the response, whatever ended it: the server stops generating (and billing).
            async with stream:
                # JSON may carry a character beyond the BMP as two escapes, and a chunk may end between them: this
                # decoder joins the halves and turns one that stays alone into U+FFFD, which every store can hold.
                halves = codecs.getincrementaldecoder("utf-16-le")("replace")
                finish: str | None = None
                chunks, refusal = 0, ""
                events = aiter(stream)
                async for chunk in events:
                    chunks += 1
                    text, refused, finish = _parts(chunk)
                    refusal += refused
                    if text := halves.decode(text.encode("utf-16-le", "surrogatepass"), final=finish is not None):
                        yield text
                    if finish is not None:
                        break
                if finish is not None:
                    await _drain(events)
                elif chunks == 0 and "text/event-stream" not in stream.response.headers.get("content-type", ""):
                    raise SourceError(
                        "source_invalid",
                        "The model's server answered, but not with a stream of chat completions: "
                        "check OPENAI_BASE_URL (most end in /v1).",
                    )
        except _UNDERSTOOD as error:
            raise self._understood(error, started) from None  # its text may hold what was said: not into a log
        _judge(finish, refusal)

    def _understood(self, error: Exception, started: bool) -> SourceError:
        """Return what an error of the SDK or below it means, and what to do."""
        if isinstance(error, openai.APIStatusError):
            _log(error)
            return self._refused_request(error)
        if isinstance(error, ValueError | RecursionError):
            return SourceError("source_invalid", "The model's server sent something unreadable. Retry in a moment.")
        if isinstance(error, openai.APITimeoutError) and not isinstance(error.__cause__, httpx2.ConnectTimeout):
            return SourceError(
                "source_timeout",
                "The model's server fell silent. Retry in a moment; OPENAI_READ_TIMEOUT_S sets how long to wait.",
            )
        if isinstance(error, openai.APIConnectionError | httpx2.TransportError | OSError):
            _log(error)
            return _cut() if started else _unavailable("cannot be reached")
        # The SDK's plain APIError: an error that the server reported in the middle of the stream.
        _log(error)
        return SourceError(
            "source_failed", "The model's server reported an error while it answered. Retry in a moment."
        )

    def _refused_request(self, error: openai.APIStatusError) -> SourceError:
        """Return what an HTTP error status means."""
        status = error.status_code
        if status == 401:
            return SourceError(
                "source_authentication", "The model's server does not accept the key: check OPENAI_API_KEY."
            )
        if status == 403:
            return SourceError(
                "source_authentication",
                f"The key may not use the model {self._model}: check OPENAI_API_KEY, OPENAI_MODEL and the account.",
            )
        if status == 429 and error.code == "insufficient_quota":
            return SourceError(
                "source_rate_limited", "The account at the model's server has no credit left: add some, then retry."
            )
        wait_s = _retry_after(error.response.headers)
        later = "in a minute" if wait_s is None else f"in {math.ceil(wait_s)} s"
        if status == 429:
            return PassingError(
                "source_rate_limited", f"The model's server is asked too often or for too much. Retry {later}.", wait_s
            )
        if status >= 500 or status in (408, 409):
            return _unavailable(f"is in trouble ({status})", later, wait_s)
        if error.code in ("content_filter", "content_policy_violation"):
            return SourceError("source_refused", "The model's server refused to answer this. Put it in other words.")
        if error.code == "context_length_exceeded":
            return SourceError(
                "source_failed",
                f"This conversation is too long for the model {self._model}: start a new one, or lower "
                "OPENAI_HISTORY_CHARS.",
            )
        if status == 404:
            return SourceError(
                "source_failed",
                f"The model's server knows nothing of the model {self._model}: check OPENAI_MODEL and OPENAI_BASE_URL.",
            )
        return SourceError(
            "source_failed",
            f"The model's server did not accept the request ({status}): check OPENAI_MODEL and its other settings; "
            "the log has the details.",
        )


# What `_understood` understands. Not all that the SDK lets through is of its own family: JSON that is broken, not in
# UTF-8 or has a number of too many digits is a ValueError, JSON that is nested too deeply a RecursionError.
_UNDERSTOOD = (openai.APIError, httpx2.TransportError, OSError, ValueError, RecursionError)


_NAME = re.compile(r"[\w.\[\]-]{1,80}", re.ASCII)


def _log(error: Exception) -> None:
    """Log a failure by its names and numbers alone: the server's words may quote the key and what was said."""
    cause = error.__cause__ or error
    facts = [type(cause).__name__]
    if isinstance(cause, httpx2.ConnectError):  # words of this machine: there was no server yet
        facts.append(str(cause))
    for name in ("status_code", "request_id", "code", "type", "param"):
        if (value := getattr(error, name, None)) is not None and _NAME.fullmatch(str(value)):
            facts.append(f"{name}={value}")
    logger.warning("the model's server failed: %s", ", ".join(facts))


def _address(text: str) -> httpx2.URL:
    try:
        return httpx2.URL(text)
    except (httpx2.InvalidURL, UnicodeError):  # its text may hold a password
        raise SetupError("OPENAI_BASE_URL has a host that cannot be one") from None


def _parts(chunk: object) -> tuple[str, str, str | None]:
    """Return a chunk's text, its words of refusal and its reason to finish, if it has one.

    :raises SourceError: if it is JSON, but no chunk: the SDK does not look
    """
    choices = getattr(chunk, "choices", None)
    if choices == []:  # figures of usage, or of Azure's content filter
        return "", "", None
    if isinstance(choices, list):
        delta, finish = getattr(choices[0], "delta", None), getattr(choices[0], "finish_reason", None) or None
        text, refused = getattr(delta, "content", None) or "", getattr(delta, "refusal", None) or ""
        known = delta is not None or finish is not None
        if known and isinstance(text, str) and isinstance(refused, str) and isinstance(finish, str | None):
            return text, refused, finish
    raise SourceError(
        "source_invalid", "The model's server sent something that is no chat completion. Retry in a moment."
    )


async def _drain(events: AsyncIterator[ChatCompletionChunk]) -> None:
    """Read what follows the end of the reply, so that the connection can serve the next one; it is not needed."""
    with suppress(TimeoutError, *_UNDERSTOOD):
        async with asyncio.timeout(DRAIN_S):
            async for _ in events:
                pass


def _judge(finish: str | None, refusal: str) -> None:
    """Tell whether a stream that ended in order is a whole reply.

    :raises SourceError: if it is not
    """
    if refusal:
        raise SourceError(
            "source_refused", f"The model declined to answer. Put it in other words. (It said: {refusal[:500]})"
        )
    if finish == "content_filter":
        raise SourceError("source_refused", "The model's server filtered the answer. Put the question in other words.")
    if finish == "length":
        # Not a complete reply: whoever reads it must be able to tell a text that stops from one that was cut.
        raise SourceError(
            "source_length", 'The answer reached its largest length. Write "go on", or raise OPENAI_MAX_TOKENS.'
        )
    if finish in ("tool_calls", "function_call"):
        raise SourceError("source_invalid", "The model asked for a tool, but there is none here. Ask in other words.")
    if finish in (None, "abort", "error"):  # the latter two are vLLM's and OpenRouter's
        raise _cut()


def _cut() -> PassingError:
    return PassingError("source_cut", "The model's server broke off before the answer was whole. Retry in a moment.")


def _unavailable(what: str, later: str = "in a minute", wait_s: float | None = None) -> PassingError:
    return PassingError(
        "source_unavailable", f"The model's server {what}. Retry {later}; if it lasts, check OPENAI_BASE_URL.", wait_s
    )


_WAITS: tuple[tuple[str, Callable[[str], float]], ...] = (
    ("retry-after-ms", lambda text: float(text) / 1000),
    ("retry-after", float),
    ("retry-after", lambda text: parsedate_to_datetime(text).timestamp() - time.time()),
)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds that the server asks to wait, if it does."""
    for name, seconds in _WAITS:
        with suppress(KeyError, ValueError):
            if (wait_s := seconds(headers[name])) > 0:
                return min(wait_s, LONGEST_WAIT_SAID_S)
    return None
