"""The routing table."""

from tornado.web import Application

from chatserver.chat import Chat
from chatserver.handlers.base import NoSuchRoute
from chatserver.handlers.chat import ConversationHandler, ConversationsHandler, ExportHandler, RetryHandler, StopHandler
from chatserver.handlers.docs import DocsHandler, OpenAPIHandler
from chatserver.handlers.identity import Identity
from chatserver.handlers.me import MeHandler
from chatserver.handlers.ops import HealthHandler, MetricsHandler, ReadyHandler
from chatserver.handlers.pages import PageHandler
from chatserver.handlers.problems import log_request
from chatserver.handlers.stream import StreamHandler
from chatserver.metrics import Metrics
from chatserver.reading import Reading
from chatserver.settings import Settings
from chatserver.streams import Streams


def make_app(
    chat: Chat, reading: Reading, streams: Streams, metrics: Metrics, identity: Identity, settings: Settings
) -> Application:
    """Return the application. Handlers receive their collaborators through `initialize`."""
    common = {"chat": chat, "reading": reading, "identity": identity, "settings": settings}
    return Application(
        [
            (r"/chat", ConversationsHandler, common),
            (r"/chat/export", ExportHandler, common),
            (r"/chat/stream/([^/]*)", StreamHandler, {**common, "streams": streams}),
            (r"/chat/([^/]*)", ConversationHandler, common),
            (r"/chat/([^/]*)/stop", StopHandler, common),
            (r"/chat/([^/]*)/retry", RetryHandler, common),
            (r"/me", MeHandler, common),
            (r"/healthz", HealthHandler, common),
            (r"/readyz", ReadyHandler, common),
            (r"/metrics", MetricsHandler, {**common, "metrics": metrics}),
            (r"/openapi\.json", OpenAPIHandler, common),
            (r"/docs", DocsHandler, common),
            (r"/()", PageHandler, common),
            (r"/web/(.*)", PageHandler, common),
        ],
        log_function=log_request,
        default_handler_class=NoSuchRoute,
        default_handler_args=common,
    )
