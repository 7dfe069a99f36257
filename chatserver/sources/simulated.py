"""Replies without a model, key or network: the same text for the same question at the same turn."""

import asyncio
import hashlib
import re
import unicodedata
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import chain, cycle, islice

from chatserver.settings import Settings
from chatserver.sources import Prompt
from chatserver.sources.pace import CoalescingTimer

QUOTED_CHARS = 90
QUOTED_WORDS = 12
LATE_S = 0.5
_SHORTEST_TICK_S = 0.001


class Simulated:
    """Answers in 60 to 150 words that quote the question, at an even pace."""

    def __init__(self, settings: Settings) -> None:
        self._delay_s = settings.simulated_token_delay_ms / 1000
        self._tokens = settings.simulated_tokens
        self._timer = CoalescingTimer(max(_SHORTEST_TICK_S, self._delay_s / 2))

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """Return the reply's tokens, yielding to the event loop before each."""
        tokens: Iterable[str] = tokenise(compose(prompt.messages[-1].content, prompt.turn))
        if self._tokens is not None:
            tokens = islice(cycle(chain(tokens, ["\n\n"])), self._tokens)
        loop = asyncio.get_running_loop()
        due = now = loop.time()
        for token in tokens:
            # Paced by the clock: tokens that fall due while the loop is busy are sent at once when it has time, as a
            # model's tokens would have arrived by then. A reply that is later than `LATE_S` starts a new schedule.
            due += self._delay_s
            if not self._delay_s:
                await asyncio.sleep(0)
            elif due > now:
                now = loop.time()
                due = max(due, now - LATE_S)
                if due > now:
                    await self._timer.at(due, loop)
            yield token

    async def close(self) -> None:
        """Do nothing: the source holds no resources."""


def compose(question: str, turn: int) -> str:
    """Return the answer to `question` at `turn` (from 1): markdown with a quote, a list and a block of code."""
    digest = hashlib.sha256(f"{turn}\n{question}".encode()).digest()
    opening, thought, items, code, closing = (
        options[byte % len(options)]
        for options, byte in zip((OPENINGS, THOUGHTS, LISTS, CODE, CLOSINGS), digest, strict=False)
    )
    fill = {"turn": turn, "words": _count(question.split(), "word"), "chars": _count(question, "character")}
    middle = [items, code] if digest[5] % 2 else [code, items]
    return "\n\n".join([opening.format(**fill), f"> {quote(question)}", thought, *middle, closing.format(**fill)])


def quote(question: str) -> str:
    """Return the first words of `question` on one line, with an ellipsis if there are more."""
    words = question.split()
    whole, line = " ".join(words), " ".join(words[:QUOTED_WORDS])
    if len(line) > QUOTED_CHARS:
        end = line.rfind(" ", 0, QUOTED_CHARS)
        if end == -1:
            end = QUOTED_CHARS
            while end > 1 and _extends(line[end - 1], line[end]):
                end -= 1
        line = line[:end]
    return whole if line == whole else f"{line} …"


def tokenise(text: str) -> Iterator[str]:
    """Return `text` as a model's tokens: words with the space before them, long words in parts.

    No token is empty or ends within a grapheme cluster, and joined they are exactly `text`.
    """
    held = ""
    for match in _PIECE.finditer(text):
        piece = match[0]
        if held and not _extends(held[-1], piece[0]):
            yield held
            held = ""
        held += piece
    if held:
        yield held


_FLAG = "\U0001f1e6-\U0001f1ff"  # two of these letters make a flag
_PIECE = re.compile(
    rf" ?[^\W\d_]{{1,9}}| ?\d{{1,3}}|\n+[ ]*| ?[{_FLAG}]{{1,2}}| ?[^\w\s{_FLAG}]{{1,3}}|.",
    re.DOTALL,
)


def _extends(last: str, first: str) -> bool:
    """Return whether a break between two characters would split a combining sequence, a joined emoji or a line end."""
    return (
        first == "\u200d"
        or last == "\u200d"
        or unicodedata.category(first).startswith("M")
        or "\U0001f3fb" <= first <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= first <= "\U000e007f"  # flags of regions
        or (last == "\r" and first == "\n")
    )


def _count(things: str | list[str], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


OPENINGS = (
    "Thanks for message number {turn}. You sent {words} ({chars}), and here is how I read it:",
    "Good question! This is turn {turn} of our conversation; what arrived was {words}, {chars} in all:",
    "Let me take that step by step. Your message number {turn} has {words} and {chars}:",
    "Turn {turn}, noted ✍️ – I counted {words} and {chars} in what you wrote:",
    "Voilà, my thoughts on your message number {turn}, all {words} ({chars}) of it:",
)
THOUGHTS = (
    "I am the *simulated* source, so I understand none of it, but I show how an answer looks while it **arrives "
    "piece by piece** – naïve, and still useful ☕.",
    "No model was asked: this text is made from yours by a hash, the same every time. It carries some *señales* – "
    "ñ, ü, 東京, Ω – to keep everybody honest.",
    "Every client sees the **same words in the same order**, whether it came early, came late or lost its "
    "connection in between 🔌. That is the point of this façade.",
    "A real model would think about it now 🤔. I only pretend, at a steady pace, *comme il faut*, so that clients "
    "can be tested without a key or a network.",
)
LISTS = (
    "Three things to try next:\n\n"
    "1. Reload the page while I am still talking.\n"
    "2. Open a second window on the same conversation.\n"
    "3. Drop the connection, wait, and reconnect – nothing is lost.",
    "What happens to these words:\n\n"
    "- they are **stored** before you see that I have finished,\n"
    "- they reach every client, from São Paulo to Zürich,\n"
    "- they can be read again later, character for character.",
    "A short shopping list, for the look of it:\n\n"
    "- crème fraîche (200 g)\n- jalapeños 🌶️\n- smörgås, *two slices*\n- a `CHAR(1)` of salt",
    "In order of importance:\n\n"
    "1. **Say** what you mean.\n2. **Stop** me whenever you like.\n3. **Retry** if the answer was no good – ¡ánimo!",
)
CODE = (
    "In code, it might be put like this:\n\n"
    "```python\n"
    "def greet(name: str) -> str:\n"
    '    """Return a greeting, with an accent."""\n'
    '    return f"¡Hola, {name}!"\n'
    "```",
    "In a browser, a few lines are enough:\n\n"
    "```js\n"
    "const source = new EventSource(`/chat/stream/${id}`);\n"
    'source.addEventListener("token", (event) => {\n'
    "  output.append(JSON.parse(event.data).text); // é included\n"
    "});\n"
    "```",
    "In a shell, the whole history is one command away:\n\n"
    "```sh\n"
    "# prints what both of us said – até agora\n"
    'curl -s "localhost:3000/chat/$ID" | python3 -m json.tool\n'
    "```",
    "As a query, for those who like tables:\n\n"
    "```sql\n"
    "SELECT city, count(*) AS visits\n"
    "FROM journeys\n"
    "WHERE city IN ('Málaga', 'Łódź')\n"
    "GROUP BY city;\n"
    "```",
)
CLOSINGS = (
    "For answers by a real model, uncomment `REPLY_SOURCE=openai` in `.env`. ¡Hasta luego!",
    "Ask again and I will say it differently, since turn {turn} is over. À bientôt!",
    "That is all I have for now; the next move is yours. 頑張って 🙂",
    "Write something else and watch the answer change. Tschüß!",
)
