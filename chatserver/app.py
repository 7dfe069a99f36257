"""The routing table."""

from tornado.web import Application

from chatserver.handlers.base import NoSuchRoute, Services
from chatserver.handlers.chat import (
    ConversationHandler,
    ConversationsHandler,
    ExportHandler,
    HeadHandler,
    RetryHandler,
    StopHandler,
)
from chatserver.handlers.docs import DocsHandler, OpenAPIHandler
from chatserver.handlers.me import MeHandler
from chatserver.handlers.ops import HealthHandler, MetricsHandler, ReadyHandler
from chatserver.handlers.pages import PageHandler
from chatserver.handlers.problems import log_request
from chatserver.handlers.stream import StreamHandler


def make_app(services: Services) -> Application:
    """Return the application, whose handlers use `services`."""
    common = {"services": services}
    return Application(
        [
            (r"/chat", ConversationsHandler, common),
            (r"/chat/export", ExportHandler, common),
            (r"/chat/stream/([^/]*)", StreamHandler, common),
            (r"/chat/([^/]*)", ConversationHandler, common),
            (r"/chat/([^/]*)/stop", StopHandler, common),
            (r"/chat/([^/]*)/retry", RetryHandler, common),
            (r"/chat/([^/]*)/head", HeadHandler, common),
            (r"/me", MeHandler, common),
            (r"/healthz", HealthHandler, common),
            (r"/readyz", ReadyHandler, common),
            (r"/metrics", MetricsHandler, common),
            (r"/openapi\.json", OpenAPIHandler, common),
            (r"/docs", DocsHandler, common),
            (r"/()", PageHandler, common),
            (r"/web/(.*)", PageHandler, common),
        ],
        log_function=log_request,
        default_handler_class=NoSuchRoute,
        default_handler_args=common,
    )
