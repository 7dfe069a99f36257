"""The hub: conversations in memory, and the delivery of their frames to subscribers.

A `LiveConversation` has subscribers or a running reply. It keeps the frames of the current turn in a `Log`. A
subscriber is a connection and a cursor into that log, never a queue, so that a slow client costs no memory. New frames
make a conversation dirty, which wakes `Hub.deliver`: it writes to each subscriber, in one write, the frames after its
cursor. Frames that arrive during a write are coalesced into the next write.
"""

from chatserver.hub.delivery import Hub
from chatserver.hub.live import Counts, LiveConversation, Subscriber, for_each
from chatserver.hub.log import MAX_WRITE, LiveReply, Log

__all__ = ["MAX_WRITE", "Counts", "Hub", "LiveConversation", "LiveReply", "Log", "Subscriber", "for_each"]
