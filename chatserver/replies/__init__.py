"""Replies: this process writes each one in a task, or follows it while another server writes it.

A reply belongs to its conversation, not to a request: it is generated and stored even if no client is connected. A turn
is: start (stored) → text (published, and saved by checkpoints) → end (stored) → end (published). Subscribers receive
the end that the database has.

A reply that this process writes has these stages (`writer.Stage`):

    NEW ──→ GENERATING ──→ STORING ──→ ENDED
     │           │            ↑
     └───────────┴→ STOPPING ─┘

    move                      by
    NEW → GENERATING          the writer's task, when it first runs
    NEW, GENERATING           a client's stop or deletion; the end of the time to drain; a checkpoint that finds the
      → STOPPING              reply ended or deleted by another server, or that keeps failing
    GENERATING → STORING      the source: it has ended or failed, or the reply or the conversation is full
    STOPPING → STORING        the writer's task, once its source is closed
    STORING → ENDED           MongoDB: it has stored the end, or has another one; or it cannot be stored

The writer returns its outcome, and the registry decides:

    outcome                   next
    STORED                    nothing: the end was stored by this process and is published
    ENDED_ELSEWHERE           read the conversation again; if the other server has started the next reply, follow that
    FAILED                    follow the reply: its lease expires, and a sweep ends it with its last checkpoint

Before NEW, a reply is *starting*: its start is being stored. If the outcome of that write is unknown, it stays starting
until a background task has searched for it: either it is found, and the reply is written, or it was never stored.

The modules, each importing only those before it: `endings`, `publishing` (into the live conversation), `writer`, `own`
(the table of this process's replies), `leases` (checkpoint, renew, expire), `follower`, `alignment` (the database and
memory, consistently), `starting`, `registry`.
"""

from chatserver.replies.alignment import Alignment
from chatserver.replies.registry import Replies
from chatserver.replies.starting import NewTurn, Retry

__all__ = ["Alignment", "NewTurn", "Replies", "Retry"]
