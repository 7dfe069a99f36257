"""Logs: one line per event to stderr, readable or as JSON. They never hold the text of a message, a key or a token."""

import json
import logging
import sys
from datetime import UTC, datetime
from functools import lru_cache

from chatserver.settings import Settings

CONTEXT = ("status", "ms", "code", "reason", "owner", "conversation", "reply", "address", "request")
"""The fields that a record may have in addition to its message, passed as `extra`."""


class HumanFormatter(logging.Formatter):
    """`12:30:05.123 INFO reply started conversation=… reply=…`"""

    def format(self, record: logging.LogRecord) -> str:
        time = f"{_clock(int(record.created))}.{int(record.msecs):03d}"
        fields = "".join(f" {name}={_shown(value)}" for name, value in _context(record).items())
        line = f"{time} {record.levelname:<7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(settings: Settings) -> None:
    """Send all logs to stderr, in the configured format and from the configured level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else HumanFormatter())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.getLogger("chatserver").setLevel(level)
    # Below WARNING, libraries quote requests and answers: a malformed header, a body, a query.
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    # No format here shows the caller, thread or process. Without them a line costs 11.5 us instead of 14.6, which is
    # 1.3 % of a connect (Python's logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


@lru_cache(maxsize=1)
def _clock(second: int) -> str:
    return datetime.fromtimestamp(second).strftime("%H:%M:%S")


def _shown(value: object) -> str:
    """Return a field's value such that it cannot pass for another field, nor control the terminal."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def _context(record: logging.LogRecord) -> dict[str, object]:
    fields = record.__dict__
    return {name: fields[name] for name in CONTEXT if fields.get(name) is not None}
