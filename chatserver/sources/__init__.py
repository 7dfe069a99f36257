"""Where replies come from: the protocol of a source, and the choice of one. A source is built from the settings."""

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
    """The input of a source: the newest messages, the last one from the user; `turn` counts the user's, from 1."""

    messages: Sequence[Message]
    turn: int


class Source(Protocol):
    """A source of replies, shared by all conversations."""

    def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Return the reply's text in chunks. The caller closes the generator, possibly before its end.

        The caller limits the length of the text, and reports a reply without text as failed.

        :raises SourceError: while iterating, for every failure that the source understands
        """

    async def close(self) -> None:
        """Close connections. To be called once, when no reply is running."""


def make_source(settings: Settings) -> Source:
    """Return the source that `settings.reply_source` names; every turn of this server takes its reply from it."""
    # To answer with OpenAI: in `.env`, put your key into OPENAI_API_KEY and uncomment the line
    #     REPLY_SOURCE=openai
    # sources/openai.py is the complete implementation. Until then nothing imports the SDK or calls out.
    if settings.reply_source == "openai":
        from chatserver.sources.openai import OpenAI

        return OpenAI(settings)

    from chatserver.sources.simulated import Simulated

    return Simulated(settings)
