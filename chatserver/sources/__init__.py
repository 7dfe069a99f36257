"""Where replies come from: one small protocol, and the one place where a source is picked."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatserver.settings import Settings

ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation; its role is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a source answers: the newest messages, the last being the user's; `turn` counts the user's, from 1."""

    messages: Sequence[Message]
    turn: int


class Source(Protocol):
    """A source of replies, shared by all conversations."""

    def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Return the reply's text, piece by piece; the caller closes the generator, also half-way.

        The caller limits the text's length, and reports a reply without any words as failed.

        Raises `SourceError` from the iteration for what went wrong in a way that the source understands.
        """

    async def close(self) -> None:
        """Let go of connections; call it once, when no reply runs any more."""


def make_source(settings: Settings) -> Source:
    """Return the source that `settings.reply_source` names; every turn of this server takes its reply from it."""
    # To answer with OpenAI: in `.env`, put your key into OPENAI_API_KEY and uncomment the line
    #     REPLY_SOURCE=openai
    # sources/openai.py is the complete implementation. Until then nothing imports the SDK or calls out.
    if settings.reply_source == "openai":
        from chatserver.sources.openai import OpenAI

        return OpenAI(settings)

    from chatserver.sources.simulated import Simulated

    return Simulated(settings.simulated_token_delay_ms / 1000, settings.simulated_tokens)
