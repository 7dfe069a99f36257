"""A subscriber that records the bytes of its stream, for tests below HTTP."""

import asyncio
from typing import Any

from chatserver import positions
from chatserver.reading import Reading
from chatserver.records import Key
from chatserver.streams import Connection
from chatserver.wire import sse


class Recorder(asyncio.Transport):
    """The client's end of a stream: takes every byte at once.

    :ivar received: the body of the response so far
    :ivar ended: whether the server has closed the connection
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = b""
        self.ended = False
        self._connection: Connection | None = None

    async def subscribe(self, reading: Reading, on_close: Any, conversation: Key, position: str = "") -> "Recorder":
        """Open a stream; return the recorder.

        :param on_close: the `unsubscribe` of the server's hub
        """
        connection = Connection(b"", on_close, stream_format=sse, chunked=False)
        await reading.subscribe(conversation, positions.parse_position(position), connection)
        self._connection = connection
        connection.connection_made(self)
        await asyncio.sleep(0)
        return self

    def leave(self) -> None:
        """Close the connection from the client's side."""
        self.ended = True
        if self._connection is not None:
            self._connection.connection_lost(None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        assert not self.ended, "written to after its end"
        self.received += bytes(data)

    def is_closing(self) -> bool:
        return self.ended

    def close(self) -> None:
        self.ended = True
        assert self._connection is not None
        asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    def abort(self) -> None:
        self.close()
