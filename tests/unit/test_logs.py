"""The formats of the log."""

import json
import logging

import pytest

from chatserver.logs import HumanFormatter, JsonFormatter


def record(**fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO", "msg": "GET /chat", **fields})
    made.msecs, made.created = 5.0, 0.0
    return made


@pytest.mark.parametrize(
    ("owner", "shown"),
    [
        ("zoë", "owner=zoë"),
        ("auth0|5f", "owner=auth0|5f"),
        ("a reply=1", 'owner="a reply=1"'),
        ("a\u2028b", 'owner="a\\u2028b"'),
        ("a\u202eb", 'owner="a\\u202eb"'),
        ('a" b', 'owner="a\\" b"'),
    ],
)
def test_field_passes_for_no_other_field_and_controls_no_terminal(owner: str, shown: str) -> None:
    assert HumanFormatter().format(record(owner=owner, reply="f")).endswith(f"INFO    GET /chat {shown} reply=f")
    assert json.loads(JsonFormatter().format(record(owner=owner)))["owner"] == owner
