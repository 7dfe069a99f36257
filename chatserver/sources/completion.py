"""A decoder for one chat completion, tolerant of the many servers that speak OpenAI's protocol: no I/O."""

import codecs
import json
import logging

from chatserver.errors import ReplyCode, SourceError
from chatserver.sources import provider_errors
from chatserver.sources.event_stream import Event

_REFUSAL_CHARS = 500

_COMPLETE = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"}
_LENGTH = {"length", "max_tokens", "max_length", "model_length", "token_limit", "model_context_window_exceeded"}
_FILTERED = {
    "content_filter",
    "content_filtered",
    "safety",
    "sensitive",
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "refusal",
    "guardrail_intervened",
}
_TOOLS = {"tool_calls", "tool_call", "tool_use", "function_call"}
_NOT_FINISHED = {"", "null", "none"}  # DashScope sends the word

logger = logging.getLogger(__name__)


class Completion:
    """One reply, read event by event.

    :ivar is_done: whether `[DONE]` was read, the protocol's mark of an orderly end
    :ivar finish: the first finish_reason, or the first other than a natural end: a later `stop` must not make a
        truncated reply complete
    :ivar is_known: whether the server sent any part of a chat completion
    :ivar error: the error that the server reported, as it came
    """

    def __init__(self) -> None:
        self.is_done = False
        self.finish: str | None = None
        self.is_known = False
        self.error: object = None
        self._has_text = False
        self._refusal = ""
        # JSON may hold a character beyond the BMP as two escapes, and a chunk may end between them: this decoder
        # joins the halves and replaces a lone one by U+FFFD, which every store can hold.
        self._halves = codecs.getincrementaldecoder("utf-16-le")("replace")

    def read(self, event: Event) -> str:
        """Return the text that an event adds.

        Data that cannot be part of a completion is skipped: keep-alives are comments, `null`, `{}`, words, or events of
        other types.

        :raises SourceError: if the event is a damaged chunk, so that text may be missing
        """
        data = event.data.strip()
        if data.startswith(b"[DONE]"):
            self.is_done = self.is_known = True
            return ""
        value = _parse(data) if data.startswith((b"{", b"[{")) else None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if event.type == "error" and value is None:
            self.error = data.decode(errors="replace")
        if not isinstance(value, dict):
            return ""
        if value.get("error") or "error" in (event.type, value.get("object"), value.get("type")):
            self.error = value
        return self._read_choice(value.get("choices"))

    def _read_choice(self, choices: object) -> str:
        if choices is None:
            return ""
        if not isinstance(choices, list):
            raise provider_errors.invalid()
        self.is_known = True
        choice = choices[0] if choices else None
        if choice is None:  # token counts, or Azure's verdict on the prompt
            return ""
        if not isinstance(choice, dict):
            raise provider_errors.invalid()
        delta = choice.get("delta")
        if delta is None and not self._has_text:
            delta = choice.get("message")  # a completion that the server did not stream
        if delta is None:
            delta = {}
        finish = choice.get("finish_reason") or ""
        if not isinstance(delta, dict) or not isinstance(finish, str):
            raise provider_errors.invalid()
        if finish.lower() not in _NOT_FINISHED and (self.finish or "stop").lower() in _COMPLETE:
            self.finish = finish
        if isinstance(refusal := delta.get("refusal"), str):
            self._refusal = (self._refusal + refusal)[:_REFUSAL_CHARS]
        text = self._halves.decode(_text(delta.get("content")).encode("utf-16-le", "surrogatepass"))
        self._has_text = self._has_text or bool(text)
        return text

    def close(self) -> str:
        """Return the rest of the text, once no event follows: U+FFFD for half a character."""
        return self._halves.decode(b"", final=True)

    def check(self) -> None:
        """Check that the reply is complete, after its last event.

        :raises SourceError: if it is not
        """
        if self._refusal:
            raise SourceError(
                ReplyCode.REFUSED,
                f"The model declined to answer. Rephrase the question. (It said: {self._refusal})",
            )
        if self.finish is None:
            if not self.is_done:
                raise provider_errors.incomplete()
            return
        reason = self.finish.lower()
        if reason in _COMPLETE:
            return
        if reason in _LENGTH:
            # Not a complete reply: readers must be able to distinguish an end from a truncation.
            raise SourceError(
                ReplyCode.LENGTH,
                'The answer reached its maximum length. Write "continue", or raise OPENAI_MAX_TOKENS.',
            )
        if reason in _FILTERED:
            raise SourceError(ReplyCode.REFUSED, "The model provider filtered the answer. Rephrase the question.")
        if reason in _TOOLS:
            raise SourceError(
                ReplyCode.INVALID,
                "The model asked for a tool, but there are no tools here. Rephrase the question.",
            )
        # insufficient_system_resource, network_error, abort, error, and other names that servers invent
        name = provider_errors.shown(self.finish)
        logger.warning("the model provider failed: finish_reason=%s", name or "[hidden]")
        raise provider_errors.incomplete(name)


def _parse(data: bytes) -> object:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise provider_errors.invalid() from None


def _text(content: object) -> str:
    """Return the text of a `content`: a string, or a list of parts (Mistral's models that think).

    :raises SourceError: if it is neither
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise provider_errors.invalid()
    text = ""
    for part in content:
        if not isinstance(part, dict):
            raise provider_errors.invalid()
        if part.get("type", "text") in ("text", "output_text"):
            piece = part.get("text")
            if not isinstance(piece, str | None):
                raise provider_errors.invalid()
            text += piece or ""
    return text
