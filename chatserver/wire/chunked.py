"""The chunked transfer coding of HTTP/1.1 (RFC 9112, 7.1), around the bytes of any stream format."""

LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body. A client treats a body without it as truncated."""


def chunk(data: bytes) -> bytes:
    """Return bytes, at least one, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)
