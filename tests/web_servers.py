"""Reverse proxies that the tests start, each with a configuration of the documents on a port of its own."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

APACHE_MODULES = Path("/usr/lib/apache2/modules")
_LOADED = ("mpm_event", "authn_core", "authz_core", "authz_user", "headers", "proxy", "proxy_http", "auth_openidc")
_NONE: Mapping[str, str] = {}


@asynccontextmanager
async def nginx(folder: Path, config: str, upstream: int, changes: Mapping[str, str] = _NONE) -> AsyncIterator[int]:
    """Run nginx; give its port.

    :param config: what belongs into its `http` block; it must listen on port 80
    :param upstream: the port of chatserver
    :param changes: other texts of the configuration, and what replaces them for the test
    """
    port = _free_port()
    addresses = {"listen 80;": f"listen 127.0.0.1:{port};", "127.0.0.1:3000": f"127.0.0.1:{upstream}"}
    config = _change(config, {**addresses, **changes})
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} {config} }}\n"
    )
    options = ("-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf")
    async with _running((shutil.which("nginx") or "nginx", *options), port, folder / "error.log"):
        yield port


@asynccontextmanager
async def apache(folder: Path, config: str, upstream: int, changes: Mapping[str, str] = _NONE) -> AsyncIterator[int]:
    """Run Apache with Debian's modules; give its port.

    :param config: a virtual host on port 80, whose address is https://chat.example.com
    :param upstream: the port of chatserver
    :param changes: other texts of the configuration, and what replaces them for the test
    """
    port = _free_port()
    addresses = {
        "*:80": f"127.0.0.1:{port}",
        "https://chat.example.com": f"http://127.0.0.1:{port}",
        "127.0.0.1:3000": f"127.0.0.1:{upstream}",
    }
    config = _change(config, {**addresses, **changes})
    modules = "".join(f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so\n" for name in _LOADED)
    (folder / "httpd.conf").write_text(
        f"ServerRoot {folder}\nDefaultRuntimeDir {folder}\nPidFile {folder}/pid\nErrorLog {folder}/error.log\n"
        f"ServerName localhost\nUser www-data\nGroup www-data\nListen 127.0.0.1:{port}\n{modules}{config}\n"
    )
    options = ("-f", folder / "httpd.conf", "-D", "FOREGROUND")
    async with _running((shutil.which("apache2") or "apache2", *options), port, folder / "error.log"):
        yield port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _change(config: str, changes: Mapping[str, str]) -> str:
    for was, becomes in changes.items():
        assert was in config, was
        config = config.replace(was, becomes)
    return config


@asynccontextmanager
async def _running(command: Sequence[str | Path], port: int, log: Path) -> AsyncIterator[None]:
    process = subprocess.Popen(command)
    try:
        async with asyncio.timeout(10):
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)
