"""Streams: the open connections of this process, in any format."""

from chatserver.streams.connection import Connection
from chatserver.streams.registry import Streams

__all__ = ["Connection", "Streams"]
