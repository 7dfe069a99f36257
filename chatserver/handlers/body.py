"""Request bodies: limits, JSON and schemas."""

import json
from email.message import Message
from typing import Any

from tornado.httputil import HTTPHeaders

from chatserver import schemas
from chatserver.errors import InvalidJson, InvalidRequest, PayloadTooLarge, UnsupportedMediaType

DISCARDED_BYTES = 16 * 1024 * 1024
BODY_ERRORS = (InvalidRequest, InvalidJson, PayloadTooLarge, UnsupportedMediaType)
"""The errors of every method that reads a body."""


class RequestBody:
    """The body of one request, received in chunks.

    A body that is too large is read to its end but not kept, up to `DISCARDED_BYTES` beyond the limit: closing a
    connection with unread bytes resets it, and the client might never see the answer.

    :param max_bytes: the size of the largest body that is accepted
    """

    def __init__(self, headers: HTTPHeaders, max_bytes: int) -> None:
        self._headers = headers
        self._max_bytes = max_bytes
        self._is_kept = True
        self._content = bytearray()
        self._size = 0

    def check_length(self) -> None:
        """Check the announced size before the body is read.

        :raises PayloadTooLarge: if the body is too large to be discarded
        """
        length = self._headers.get("Content-Length", "0")
        # A length that is not a number is refused where the body is read.
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._max_read_bytes):
            raise PayloadTooLarge

    def discard(self) -> None:
        """Keep nothing of the body, which nobody will read: the request may come from a client without a credential."""
        self._is_kept = False

    def add(self, chunk: bytes) -> None:
        """Take the next chunk.

        :raises PayloadTooLarge: if no more of the body is read; a chunked body does not announce its size
        """
        self._size += len(chunk)
        if self._size > self._max_read_bytes:
            raise PayloadTooLarge
        if self._is_kept and self._size <= self._max_bytes:
            self._content += chunk

    def json(self, schema: str, max_input_chars: int) -> Any:
        """Return the value of the whole body.

        :param schema: the name of its schema; with `empty` and `retry`, the body may be missing
        :raises PayloadTooLarge, UnsupportedMediaType, InvalidRequest: with the reason
        """
        if self._size > self._max_bytes:
            raise PayloadTooLarge
        if schema in ("empty", "retry") and not self._content:
            return {}
        self._check_type()
        value = _parse_json(bytes(self._content))
        schemas.validate(schema, value, max_input_chars)
        return value

    def _check_type(self) -> None:
        content_type = Message()
        content_type["Content-Type"] = self._headers.get("Content-Type", "")
        if content_type.get_content_type() != "application/json":
            raise UnsupportedMediaType
        if str(content_type.get_param("charset", "utf-8")).lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("The body must be encoded in UTF-8.")
        if self._headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("The body must be sent without a Content-Encoding.")

    @property
    def _max_read_bytes(self) -> int:
        return self._max_bytes + DISCARDED_BYTES


def _parse_json(body: bytes) -> Any:
    """Return the value of a JSON text (RFC 8259) in UTF-8.

    :raises InvalidJson: if the text is not valid, is nested too deeply, or has an unpaired surrogate
    """

    def refuse(constant: str) -> None:
        raise InvalidJson(f"The body is not valid JSON: {constant} is not allowed.")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        detail = "The body is not valid UTF-8."
    except UnicodeEncodeError:
        detail = "The body has an escape that is an unpaired surrogate."
    except RecursionError:
        detail = "The body is nested too deeply."
    except json.JSONDecodeError as error:
        detail = f"The body is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}."
    except ValueError:
        detail = "The body has a number with too many digits."
    else:
        return value
    raise InvalidJson(detail)
