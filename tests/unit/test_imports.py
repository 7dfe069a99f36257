"""Imports point one way: handlers → chat → hub, store, sources; and few modules know what is outside."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "chatserver"
MODULES = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}

BOTTOM = [
    "chatserver.errors",
    "chatserver.metrics",
    "chatserver.positions",
    "chatserver.records",
    "chatserver.settings",
    "chatserver.tasks",
]
ALLOWED: dict[str, list[str]] = {
    "chatserver.errors": [],
    "chatserver.metrics": [],
    "chatserver.positions": [],
    "chatserver.records": [],
    "chatserver.settings": ["chatserver.errors"],
    "chatserver.tasks": [],
    "chatserver.listener": ["chatserver.errors", "chatserver.metrics"],
    "chatserver.logs": ["chatserver.settings"],
    "chatserver.mongod": ["chatserver.errors", "chatserver.tasks"],
    "chatserver.schemas": ["chatserver.errors"],
    "chatserver.wire": [*BOTTOM, "chatserver.wire"],
    "chatserver.hub": [*BOTTOM, "chatserver.hub", "chatserver.wire"],
    "chatserver.sources": [*BOTTOM, "chatserver.sources"],
    "chatserver.store": [*BOTTOM, "chatserver.store"],
    "chatserver.replies": [
        *BOTTOM,
        "chatserver.hub",
        "chatserver.replies",
        "chatserver.sources",
        "chatserver.store",
        "chatserver.wire",
    ],
    "chatserver.chat": [
        *BOTTOM,
        "chatserver.hub",
        "chatserver.replies",
        "chatserver.sources",
        "chatserver.store",
        "chatserver.wire",
    ],
    "chatserver.streams": [*BOTTOM, "chatserver.chat", "chatserver.hub", "chatserver.streams", "chatserver.wire"],
    "chatserver.handlers": [
        *BOTTOM,
        "chatserver.__version__",
        "chatserver.chat",
        "chatserver.handlers",
        "chatserver.hub",
        "chatserver.schemas",
        "chatserver.streams",
        "chatserver.wire",
    ],
    "chatserver.app": [*BOTTOM, "chatserver.chat", "chatserver.handlers", "chatserver.streams"],
    "chatserver.server": [
        *BOTTOM,
        "chatserver.app",
        "chatserver.chat",
        "chatserver.hub",
        "chatserver.listener",
        "chatserver.mongod",
        "chatserver.sources",
        "chatserver.store",
        "chatserver.streams",
    ],
}
ONLY = {
    "motor": {"chatserver.store"},
    "pymongo": {"chatserver.store"},
    "bson": {"chatserver.store"},
    "regex": {"chatserver.handlers.chat"},
    "openai": {"chatserver.sources.openai"},
    "httpx2": {"chatserver.sources.openai"},
    "dotenv": {"chatserver.settings"},
    "prometheus_client": {"chatserver.metrics"},
    "jsonschema": {"chatserver.schemas.__init__"},
}


def imports(path: Path) -> set[str]:
    """Return the full names of the modules, and of what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_in(name: str, packages: list[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_module_imports_nothing_above_it(path: Path, module: str) -> None:
    if module in ("chatserver.__init__", "chatserver.__main__"):
        return
    room = ".".join(module.split(".")[:2])
    for name in imports(path):
        if name.startswith("chatserver."):
            assert is_in(name, ALLOWED[room]), f"{module} imports {name}"


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_what_is_outside_is_known_to_one_module(path: Path, module: str) -> None:
    for name in imports(path):
        package = name.split(".")[0]
        assert is_in(module, [*ONLY.get(package, {module})]), f"{module} imports {name}"
    if module != "chatserver.settings":
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_module_imports_by_statement_only(path: Path, module: str) -> None:
    """What is imported by a function's call escapes the rules above."""
    text = path.read_text()
    assert "import_module" not in text and "__import__" not in text


def test_openai_sdk_is_not_loaded_at_start_up() -> None:
    """It takes 0.4 s and 40 MB, also of those who never use it."""
    code = "import sys, chatserver.__main__; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert "chatserver.chat" in done.stdout.split() and "openai" not in done.stdout.split()


def test_only_the_collection_makes_conditions_and_sends_commands() -> None:
    """A rule for every command, such as the conversation's owner, has one place: the functions that make conditions."""
    commands = re.compile(
        r"\b(?:collection|client)\.(?:find|update|delete|insert|replace|aggregate|bulk_write|count|distinct)"
    )
    for path in (ROOT / "store").glob("*.py"):
        if path.name != "collection.py":
            assert "Condition(" not in path.read_text(), path
            assert not commands.search(path.read_text()), path
