"""Fixtures: Chromium, sites, proxies and pages."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.apps import Database
from tests.browser import FLAGS, TIMEOUT_MS, Site, Turns, chromium
from tests.page.steps import MakeSite
from tests.proxy import CuttingProxy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for a module: while Playwright runs, no other event loop can run in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def make_site(database: Database) -> Iterator[Callable[..., Site]]:
    """Return a function that starts the application; see `Site`."""
    sites: list[Site] = []

    def make(*scripts: list[str | BaseException], **settings: Any) -> Site:
        sites.append(Site(database, Turns(*scripts) if scripts else None, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()


@pytest.fixture
def make_proxy() -> Iterator[Callable[[Site], CuttingProxy]]:
    """Return a function that puts a proxy before a site."""
    proxies: list[tuple[Site, CuttingProxy]] = []

    def make(site: Site) -> CuttingProxy:
        proxy = CuttingProxy()
        site.run(proxy.start(site.app.port))
        proxies.append((site, proxy))
        return proxy

    yield make
    for site, proxy in proxies:
        site.run(proxy.close())


@pytest.fixture
def new_context(browser: Browser, make_site: MakeSite) -> Iterator[Callable[..., BrowserContext]]:
    """Return a function that makes a browser profile; an uncaught error of a script on any page fails the test.

    It depends on the sites so that it ends before them: no page opens a stream while its site is being stopped.
    """
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def make(**options: Any) -> BrowserContext:
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT_MS)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
    assert not errors, errors


@pytest.fixture
def context(new_context: Callable[..., BrowserContext]) -> BrowserContext:
    return new_context(viewport={"width": 1200, "height": 800})


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder as `python3 -m http.server --bind 127.0.0.1` does; the origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
