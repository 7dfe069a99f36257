"""Imports point downwards only and form no circle; `chatserver` imports neither tests nor scripts; few modules import
each outside package.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("chatserver", "scripts", "tests")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


PATHS = {
    name_of(path): path for each in FOLDERS for path in (ROOT / each).rglob("*.py") if "node_modules" not in path.parts
}
"""Every module of the project; a package is called `<package>.__init__`."""
MODULES = {path: name for name, path in PATHS.items() if name.startswith("chatserver.")}

# -- which room of chatserver may import which -----------------------------------------------------------------------

BOTTOM = [
    "chatserver.branches",
    "chatserver.errors",
    "chatserver.limits",
    "chatserver.metrics",
    "chatserver.positions",
    "chatserver.records",
    "chatserver.settings",
    "chatserver.tasks",
]
# A room is a module, or a package with all its modules. The modules of a package may import each other, but not in a
# circle. `chatserver.__main__` may import everything.
ALLOWED: dict[str, list[str]] = {
    "chatserver.branches": [],
    "chatserver.errors": [],
    "chatserver.limits": ["chatserver.errors"],
    "chatserver.metrics": [],
    "chatserver.positions": [],
    "chatserver.records": ["chatserver.branches", "chatserver.errors"],
    "chatserver.settings": ["chatserver.errors"],
    "chatserver.tasks": [],
    "chatserver.auth": ["chatserver.errors", "chatserver.settings"],
    "chatserver.keys": ["chatserver.errors", "chatserver.settings", "chatserver.tasks"],
    "chatserver.token": ["chatserver.auth", "chatserver.errors", "chatserver.settings"],
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
    "chatserver.chat": [*BOTTOM, "chatserver.hub", "chatserver.replies", "chatserver.store"],
    "chatserver.reading": [
        *BOTTOM,
        "chatserver.hub",
        "chatserver.replies",
        "chatserver.store",
        "chatserver.wire",
    ],
    "chatserver.streams": [*BOTTOM, "chatserver.hub", "chatserver.streams", "chatserver.wire"],
    "chatserver.handlers": [
        *BOTTOM,
        "chatserver.__version__",
        "chatserver.auth",
        "chatserver.chat",
        "chatserver.handlers",
        "chatserver.hub",
        "chatserver.keys",
        "chatserver.reading",
        "chatserver.schemas",
        "chatserver.streams",
        "chatserver.wire",
    ],
    "chatserver.app": ["chatserver.handlers"],
    "chatserver.server": [
        *BOTTOM,
        "chatserver.app",
        "chatserver.chat",
        "chatserver.handlers",
        "chatserver.hub",
        "chatserver.listener",
        "chatserver.mongod",
        "chatserver.reading",
        "chatserver.replies",
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
    "jwt": {"chatserver.auth", "chatserver.keys"},
    "jsonschema": {"chatserver.schemas.__init__"},
}


# -- which part of tests and scripts may import which ----------------------------------------------------------------

SHARED = [name.removesuffix(".__init__") for name in PATHS if name.startswith("tests.") and name.count(".") == 1]
"""The modules directly in tests/: what all the tests share."""
PROGRAMS = ["tests.bench", "tests.chaos"]
SUITES = ["tests.http", "tests.page", "tests.process", "tests.unit"]


def may_import(module: str) -> list[str]:
    """Return the parts of `tests` and `scripts` that a module may import."""
    folder, *rest = module.split(".")
    if folder == "chatserver":
        return []
    if folder == "scripts":
        # A command starts a program as a process; only documentation for others is written in Python there.
        return []
    if f"tests.{rest[0]}" in PROGRAMS:
        return [f"tests.{rest[0]}", *SHARED]
    if f"tests.{rest[0]}" in SUITES:
        return [*SUITES, *SHARED]
    return SHARED


# -- reading imports -------------------------------------------------------------------------------------------------


def imports(path: Path, *, deferred: bool = True) -> set[str]:
    """Return the full names of the imported modules, and of the names imported from modules.

    :param deferred: whether to include the imports in functions
    """
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


def is_in(name: str, packages: list[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def resolve(name: str) -> str:
    """Return the module of this project that an imported name is or belongs to; "" for an outside name."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((each for prefix in prefixes for each in (prefix, f"{prefix}.__init__") if each in PATHS), "")


def circle(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the part of a graph in which every node has a predecessor and a successor; empty without a circle."""
    left = graph
    while True:
        reached = set().union(*left.values())
        kept = {node: found & left.keys() for node, found in left.items() if node in reached and found & left.keys()}
        if kept == left:
            return kept
        left = kept


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_module_imports_nothing_above_it(path: Path, module: str) -> None:
    if module in ("chatserver.__init__", "chatserver.__main__"):
        return
    room = ".".join(module.split(".")[:2])
    for name in imports(path):
        if name.startswith("chatserver."):
            assert is_in(name, ALLOWED[room]), f"{module} imports {name}"


def test_rooms_exist_and_form_no_circle() -> None:
    rooms = {".".join(module.split(".")[:2]) for module in PATHS if module.startswith("chatserver.")}
    assert ALLOWED.keys() <= rooms
    assert not circle({room: {*allowed} - {room} for room, allowed in ALLOWED.items()})


def test_modules_import_each_other_in_no_circle() -> None:
    """Except by deferred imports: `make_source`, in the module of the port `Source`, imports the source it builds."""
    graph = {
        module: {resolve(name) for name in imports(path, deferred=False)} - {module, ""}
        for module, path in PATHS.items()
    }
    assert not circle(graph)


@pytest.mark.parametrize("graph", [{"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}])
def test_circle_is_found(graph: dict[str, set[str]]) -> None:
    assert "b" in circle(graph) and "d" not in circle(graph)


@pytest.mark.parametrize(("module", "path"), PATHS.items(), ids=PATHS.keys())
def test_only_tests_import_tests(module: str, path: Path) -> None:
    for name in imports(path):
        if name.split(".")[0] in ("tests", "scripts"):
            assert is_in(name, may_import(module)), f"{module} imports {name}"


def test_commands_start_only_programs_that_exist() -> None:
    """A command in scripts/ is a screenful that starts a program by its module's name."""
    commands = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix == ""]
    for path in commands:
        for module in re.findall(r"-m ((?:chatserver|tests)[\w.]*)", path.read_text()):
            assert module in PATHS or f"{module}.__main__" in PATHS, f"{path.name} starts {module}"
    for name in ("bench", "chaos", "screenshots"):
        assert len((ROOT / "scripts" / name).read_text().splitlines()) < 20


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_outside_package_is_imported_by_one_room(path: Path, module: str) -> None:
    for name in imports(path):
        package = name.split(".")[0]
        assert is_in(module, [*ONLY.get(package, {module})]), f"{module} imports {name}"
    if module != "chatserver.settings":
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_module_imports_by_statement_only(path: Path, module: str) -> None:
    """An import by a function call would escape the rules above."""
    text = path.read_text()
    assert "import_module" not in text and "__import__" not in text


def test_openai_sdk_is_not_loaded_at_start_up() -> None:
    """Loading it takes 0.4 s and 40 MB, which servers with another source should not pay."""
    code = "import sys, chatserver.__main__; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "chatserver.chat" in done.stdout.split() and "openai" not in done.stdout.split()


@pytest.mark.parametrize(("path", "module"), MODULES.items(), ids=MODULES.values())
def test_only_the_collection_makes_conditions_and_sends_commands(path: Path, module: str) -> None:
    """A rule for every command, such as the conversation's owner, has one place: the functions that make conditions."""
    if module == "chatserver.store.collection":
        return
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    attributes = {(ast.unparse(node.value), node.attr) for node in nodes if isinstance(node, ast.Attribute)}
    if module.startswith("chatserver.store."):
        called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not called & {"Condition", "collection.Condition"}
    else:
        assert not any(is_in(name, ["chatserver.store.collection"]) for name in imports(path))

    # The driver's collection cannot be reached in another way; the builder of the indexes has a client of its own.
    assert not any(attr == "collection" and of.endswith("conversations") for of, attr in attributes)
    if module != "chatserver.store.indexes":
        assert not {attr for _, attr in attributes} & {"get_default_database", "get_database", "get_collection"}
        assert not any(ast.unparse(node.value).endswith("client") for node in nodes if isinstance(node, ast.Subscript))


def test_the_collection_sends_nothing_but_its_conditions() -> None:
    """The type checker ensures that the argument `condition` of a method is a `Condition`."""
    calls = [
        node
        for node in ast.walk(ast.parse(PATHS["chatserver.store.collection"].read_text()))
        if isinstance(node, ast.Call)
    ]
    sent = [
        ast.unparse(node.args[0])
        for node in calls
        if ast.unparse(node.func).startswith("self.collection.") or ast.unparse(node.func) == "UpdateOne"
    ]
    assert len(sent) == 8 and set(sent) == {"condition", "writes"}
