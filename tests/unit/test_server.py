"""One module builds the parts of a server; the tests run the same parts with the same options."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = [*(ROOT / "chatserver").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
WHOLE = {"Chat", "Reading", "Replies", "Server", "Services", "Streams", "make_app", "make_source"}
ALONE = {"HTTPServer", "Hub", "Listener", "Metrics", "Mongod", "Store"}
"""Parts that a test may build without the rest."""
BUILDERS = {
    "server.py": WHOLE | ALONE,
    "__main__.py": {"Mongod", "Server"},
    "apps.py": {"Server"},
    "test_owners.py": {"Streams"},
    "test_owners_property.py": {"WholeServer"},
    "test_positions_property.py": {"WholeServer"},
    "test_startup.py": {"make_source"},
}


def parts_built(path: Path) -> set[str]:
    """Return the parts of a server that a module calls the constructor of, by the names that it imports them by."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("chatserver", "tornado")
        for alias in node.names
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return {name for name in called if imported.get(name) in WHOLE | ALONE}


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_parts_of_a_server_are_built_in_one_place(path: Path) -> None:
    in_tests = path.is_relative_to(ROOT / "tests")
    allowed = BUILDERS.get(path.name, set()) | (ALONE if in_tests else set())

    assert parts_built(path) <= allowed


def test_server_builds_every_part() -> None:
    assert parts_built(ROOT / "chatserver/server.py") >= (WHOLE | ALONE) - {"Mongod", "Server", "Store"}
