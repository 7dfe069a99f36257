"""Replies by OpenAI, or by any server with the same chat completions API. The only module that knows the SDK.

An attempt is repeated only before the first text of a reply, and only after a temporary failure: an unreachable or
overloaded server, or a lost connection. After the first text a failure ends the reply, and the caller keeps the text.

The SDK sends the request and raises its errors. The response is decoded here: the SDK's own parser fails at harmless
events of other servers, and has no size limits.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2
import openai

from chatserver.errors import ReplyCode, SetupError, SourceError
from chatserver.settings import Settings
from chatserver.sources import Message, Prompt, provider_errors
from chatserver.sources.completion import Completion
from chatserver.sources.event_stream import EventReader, EventTooLarge
from chatserver.sources.provider_errors import ErrorReport, TemporaryError

OFFICIAL_URL = "https://api.openai.com/v1"
ATTEMPTS = 3
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0  # if a server asks for more, the reply fails with the time to retry
AFTER_FINISH_S = 5.0  # limit for text after a finish_reason, if the server does not end the stream
DRAIN_S = 1.0
EVENTS_AT_ONCE = 64  # a read may hold more than a thousand, which would delay all other replies
MAX_ERROR_BYTES = 65_536

logger = logging.getLogger(__name__)


class OpenAI:
    """Streams chat completions; one client, and so one pool of connections, for all replies."""

    def __init__(self, settings: Settings) -> None:
        """Build the client without connecting.

        :raises SetupError: if OPENAI_BASE_URL or a proxy variable is invalid
        """
        self._model = settings.openai_model
        self._system_prompt = settings.openai_system_prompt
        self._history_chars = settings.openai_history_chars
        url = _address(settings.openai_base_url or OFFICIAL_URL)
        self._options: dict[str, Any] = {}
        if settings.openai_temperature is not None:
            self._options["temperature"] = settings.openai_temperature
        if settings.openai_max_tokens is not None:
            # OpenAI's newer models accept only the new name, other servers often only the old one.
            official = url.host.endswith((".openai.com", ".azure.com"))
            self._options["max_completion_tokens" if official else "max_tokens"] = settings.openai_max_tokens
        self._client = openai.AsyncOpenAI(
            api_key=settings.openai_api_key or "unset",
            base_url=url,
            max_retries=0,  # `reply` repeats attempts, and gives up sooner than the SDK's two minutes
            timeout=httpx2.Timeout(settings.openai_read_timeout_s, connect=settings.openai_connect_timeout_s),
            # A gateway that compresses a stream delays its text.
            default_headers={"Accept-Encoding": "identity"},
            http_client=_http_client(),
        )

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Return the reply's text as it arrives. Closing the generator closes the request to the server as well.

        :raises SourceError: with a code of `provider_errors` or `Completion.check`
        """
        messages = self._messages(prompt)
        for attempt in range(1, ATTEMPTS + 1):
            has_text = False
            try:
                async with aclosing(self._stream(messages)) as texts:
                    async for text in texts:
                        has_text = True
                        yield text
                return
            except TemporaryError as failure:
                wait_s = failure.wait_s
                if wait_s is None:
                    wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1)
                if has_text or attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                    raise
                logger.info("attempt %d of %d failed (%s), the next in %.1f s", attempt, ATTEMPTS, failure.code, wait_s)
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """Return the messages to send: the system prompt, the newest messages that fit, and always the question.

        Roles alternate and start with the user's, because some models refuse other orders. Messages without text are
        dropped, and adjacent messages of the same role (an unanswered question and the next one) are joined by an empty
        line.

        :raises SourceError: if the question has no text
        """
        if not prompt.messages:
            raise SourceError(ReplyCode.FAILED, "The conversation has no message that could be sent to the model.")
        *history, question = prompt.messages
        if question.role != "user" or not question.content.strip():
            raise SourceError(ReplyCode.FAILED, "The message has no text that could be sent to the model.")
        room = self._history_chars - len(question.content)
        newest = [question]
        for message in reversed(history):
            room -= len(message.content)
            if room < 0:
                break
            newest.append(message)
        return _alternating(self._system_prompt, newest[::-1])

    async def _stream(self, messages: list[dict[str, str]]) -> AsyncGenerator[str, None]:
        """Return the text of one attempt."""
        started = False
        try:
            # The overloads of `create` want a literal type for each message.
            create: Any = self._client.chat.completions.with_streaming_response.create
            # Leaving this block always closes the response, so that the server stops generating (and billing).
            async with create(model=self._model, messages=messages, stream=True, **self._options) as answer:
                started = True
                async with aclosing(self._read(answer.http_response)) as texts:
                    async for text in texts:
                        yield text
        except _EXPECTED_ERRORS as error:
            raise self._explain(
                error, started
            ) from None  # its message may quote the conversation and must not be logged

    async def _read(self, response: httpx2.Response) -> AsyncGenerator[str, None]:
        """Return the text of a response."""
        completion = Completion()
        body = response.aiter_bytes()
        async with aclosing(_until_end(body, completion)) as events:
            async for text in events:
                if text:
                    yield text
                if completion.error is not None:
                    report = ErrorReport(None, completion.error)
                    _log("an error in the stream", report)
                    raise provider_errors.explain(report, self._model)
        if text := completion.close():
            yield text
        if not completion.is_known and "text/event-stream" not in response.headers.get("content-type", ""):
            raise provider_errors.redirected() if response.history else provider_errors.not_a_stream()
        if completion.is_done:
            await _drain(body)
        completion.check()

    def _explain(self, error: Exception, started: bool) -> SourceError:
        """Return the meaning and remedy of an error of the SDK or of its HTTP client."""
        if isinstance(error, EventTooLarge):
            return provider_errors.too_large(str(error))
        if isinstance(error, openai.APIStatusError):
            report = ErrorReport(
                error.status_code, error.body, error.response.headers, redirected=bool(error.response.history)
            )
            names = {"status_code": error.status_code, "request_id": error.request_id}
            _log(type(error).__name__, report, **names)
            return provider_errors.explain(report, self._model)
        cause = error.__cause__ or error if isinstance(error, openai.APIError) else error
        if isinstance(cause, httpx2.TimeoutException) and not isinstance(cause, httpx2.ConnectTimeout):
            return provider_errors.timed_out()
        # The message of a ConnectError is from this machine, not from a server, and may be logged.
        _log(f"{type(cause).__name__}, {cause}" if isinstance(cause, httpx2.ConnectError) else type(cause).__name__)
        if isinstance(cause, httpx2.TooManyRedirects | httpx2.UnsupportedProtocol | httpx2.InvalidURL):
            return provider_errors.redirected()
        if isinstance(cause, httpx2.ProxyError):
            return provider_errors.unavailable("cannot be reached through the proxy of HTTP_PROXY or HTTPS_PROXY")
        if isinstance(cause, httpx2.DecodingError):
            return provider_errors.invalid()
        return provider_errors.incomplete() if started else provider_errors.unavailable("cannot be reached")


# httpx2's errors are wrapped by the SDK, or plain while a response is read.
_EXPECTED_ERRORS = (openai.APIError, httpx2.RequestError, httpx2.InvalidURL, OSError, EventTooLarge)


def _alternating(system_prompt: str | None, messages: Sequence[Message]) -> list[dict[str, str]]:
    joined: list[dict[str, str]] = []
    for message in messages:
        if not message.content.strip():
            continue
        if joined and joined[-1]["role"] == message.role:
            joined[-1]["content"] += f"\n\n{message.content}"
        elif joined or message.role == "user":  # an answer whose question does not fit is dropped
            joined.append({"role": message.role, "content": message.content})
    if system_prompt is not None:
        joined.insert(0, {"role": "system", "content": system_prompt})
    return joined


async def _until_end(body: AsyncIterator[bytes], completion: Completion) -> AsyncGenerator[str, None]:
    """Return the text of each event, to the stream's end: `[DONE]`, or the end of the response.

    More text may follow a finish_reason: gateways that call tools send several answers in one stream. If the server
    then neither sends text nor ends the stream, the response counts as ended.
    """
    reader = EventReader()
    deadline: float | None = None
    while not completion.is_done:
        data = await _next(body, deadline)
        for number, event in enumerate(reader.close() if data is None else reader.feed(data), 1):
            if number % EVENTS_AT_ONCE == 0:
                await asyncio.sleep(0)
            try:
                text = completion.read(event)
            except SourceError:
                if data is None:  # the response was truncated within this event
                    return
                raise
            yield text
            if completion.is_done:
                return
            if completion.finish is not None and (text or deadline is None):
                deadline = asyncio.get_running_loop().time() + AFTER_FINISH_S
        if data is None:
            return


async def _next(body: AsyncIterator[bytes], deadline: float | None) -> bytes | None:
    """Return the next bytes; None at the end. With a deadline, a failure or a time-out also counts as the end."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(body, None)
    except (TimeoutError, httpx2.RequestError, OSError):
        if deadline is None:
            raise
        return None


async def _drain(body: AsyncIterator[bytes]) -> None:
    """Read and drop the bytes after `[DONE]`, so that the connection can serve the next request."""
    with suppress(TimeoutError, httpx2.RequestError, OSError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in body:
                pass


class _Limited(httpx2.AsyncByteStream):
    """The first `MAX_ERROR_BYTES` of another stream."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for data in self._stream:
            yield data
            size += len(data)
            if size > MAX_ERROR_BYTES:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _limit_error(response: httpx2.Response) -> None:
    """Limit the body of an error or a redirect, which the SDK reads into memory as a whole."""
    if not response.is_success:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Limited(response.stream)
        # A small compressed body may expand to a large one, and none was requested.
        response.headers.pop("content-encoding", None)


def _http_client() -> httpx2.AsyncClient:
    proxies = getproxies()
    if "*" in proxies.get("no", "").replace(" ", "").split(","):  # no proxy is used
        proxies = {}
    for scheme in ("http", "https", "all"):
        if (proxy := proxies.get(scheme)) and not _is_usable(proxy):
            # The value may hold a password.
            raise SetupError(
                f"{scheme.upper()}_PROXY is not the address of a proxy that the HTTP client can use: http://host:port "
                "or https://host:port (socks5:// only with the package socksio)"
            )
    try:
        return openai.DefaultAsyncHttpxClient(event_hooks={"response": [_limit_error]})
    except OSError as error:
        raise SetupError(
            f"The certificates for HTTPS cannot be loaded (SSL_CERT_FILE, SSL_CERT_DIR, SSLKEYLOGFILE): {error}"
        ) from None


def _is_usable(proxy: str) -> bool:
    """Return whether the HTTP client accepts a proxy: it finds some faults only when a request is sent."""
    try:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if not url.hostname or url.port == 0:
            return False
        httpx2.AsyncHTTPTransport(proxy=url.geturl(), verify=False)
    except (ValueError, ImportError, httpx2.InvalidURL):
        return False
    return True


def _address(text: str) -> httpx2.URL:
    try:
        return httpx2.URL(text)
    except (httpx2.InvalidURL, UnicodeError):  # its message may quote a password
        raise SetupError("OPENAI_BASE_URL has an invalid host name") from None


def _log(what: str, report: ErrorReport | None = None, **more: object) -> None:
    """Log only the names and numbers of a failure: the server's message may quote the key and the conversation."""
    facts = {**more, **(report.names if report else {})}
    shown = [f"{name}={value}" for name, value in facts.items() if value and provider_errors.shown(str(value))]
    logger.warning("the model provider failed: %s", ", ".join([what, *shown]))
