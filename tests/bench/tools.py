"""Compiles and installs the tools of the bench in `.bench/`: load generator, Express, the FastAPI twin's venv."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatserver.sources.simulated import compose, tokenise
from tests.processes import ROOT

HERE = Path(__file__).parent
BENCH = ROOT / ".bench"
INPUT = "Say something, please."
"""The text that the load generator posts."""


@contextmanager
def _made_from(source: Path, path: Path) -> Iterator[bool]:
    """Yield whether `path` must be made, because it is missing or its source has changed; then record the source."""
    stamp = BENCH / f"{path.name}.stamp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    stale = not (path.exists() and stamp.exists() and stamp.read_text() == digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield stale
    stamp.write_text(digest)


def load_generator() -> Path:
    """Compile the load generator if necessary; return its path."""
    path, source = BENCH / "load", HERE / "load.c"
    with _made_from(source, path) as stale:
        if stale:
            subprocess.run(["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", path, source], check=True)
    return path


def express_modules() -> Path:
    """Install Express with npm if necessary; return the folder of the modules."""
    modules, package = BENCH / "express" / "node_modules", HERE / "package.json"
    with _made_from(package, modules) as stale:
        if stale:
            (modules.parent / "package.json").write_bytes(package.read_bytes())
            options = ["--silent", "--no-audit", "--no-fund", "--no-package-lock"]
            subprocess.run(["npm", "install", "--prefix", modules.parent, *options], check=True)
    return modules


def twin_python() -> Path:
    """Create the FastAPI twin's venv if necessary; return its Python."""
    folder, requirements = BENCH / "fastapi", HERE / "requirements.txt"
    python = folder / "bin" / "python"
    with _made_from(requirements, folder) as stale:
        if stale:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", str(requirements)], check=True)
    return python


def tokens_file() -> Path:
    """Write the tokens of the simulated source to a file, for the twins to send in a loop; return its path."""
    path = BENCH / "tokens.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([*tokenise(compose(INPUT, 1)), "\n\n"]))
    return path
