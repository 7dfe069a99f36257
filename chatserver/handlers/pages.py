"""The chat page and its files."""

from pathlib import Path

from tornado.web import StaticFileHandler

from chatserver.errors import NotFound
from chatserver.handlers.base import BaseHandler, Services

WEB = Path(__file__).parent.parent / "web"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # The pages run only their own scripts and connect only to this server.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class PageHandler(BaseHandler, StaticFileHandler):
    """`/` and `/web/*`: the files in `chatserver/web/`."""

    is_public = True

    def initialize(self, services: Services) -> None:  # type: ignore[override]
        BaseHandler.initialize(self, services)
        StaticFileHandler.initialize(self, str(WEB), default_filename="index.html")

    async def get(self, path: str, include_body: bool = True) -> None:
        """Send a file, and ignore `Range`: all files are small, and partial answers only add error cases."""
        self.request.headers.pop("Range", None)
        await StaticFileHandler.get(self, path, include_body)

    def validate_absolute_path(self, root: str, absolute_path: str) -> str | None:
        # The page uses relative links, so serve it at `/` only. Never serve a directory.
        is_elsewhere = self.request.path != "/" and self.request.path.endswith(("/", "/index.html"))
        if is_elsewhere or "\0" in absolute_path:
            raise NotFound
        return StaticFileHandler.validate_absolute_path(self, root, absolute_path)

    def compute_etag(self) -> str | None:
        """Return the ETag of the file; BaseHandler makes none."""
        return StaticFileHandler.compute_etag(self)

    def get_content_type(self) -> str:
        """Return the media type; `client.d.ts` is text, although systems map `.ts` to videos or translations."""
        return "text/plain" if self.path.endswith(".ts") else StaticFileHandler.get_content_type(self)

    def set_extra_headers(self, path: str) -> None:
        self.clear_header("Accept-Ranges")
        for name, value in PAGE_HEADERS.items():
            self.set_header(name, value)
