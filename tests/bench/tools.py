"""What the measurements are made with, all in `.bench/`: the load generator, Express, the FastAPI twin's venv."""

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
"""What the load generator posts."""


@contextmanager
def _made_from(source: Path, path: Path) -> Iterator[bool]:
    """Give whether `path` is to be made: it was not yet, or not from this very source. Take note once it has been."""
    stamp = BENCH / f"{path.name}.stamp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    stale = not (path.exists() and stamp.exists() and stamp.read_text() == digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield stale
    stamp.write_text(digest)


def load_generator() -> Path:
    """Compile the load generator, if need be; return its path."""
    path, source = BENCH / "load", HERE / "load.c"
    with _made_from(source, path) as stale:
        if stale:
            subprocess.run(["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", path, source], check=True)
    return path


def express_modules() -> Path:
    """Install Express by npm, if need be; return the folder of the modules."""
    modules, package = BENCH / "express" / "node_modules", HERE / "package.json"
    with _made_from(package, modules) as stale:
        if stale:
            (modules.parent / "package.json").write_bytes(package.read_bytes())
            options = ["--silent", "--no-audit", "--no-fund", "--no-package-lock"]
            subprocess.run(["npm", "install", "--prefix", modules.parent, *options], check=True)
    return modules


def twin_python() -> Path:
    """Make the FastAPI twin's venv, if need be; return its Python."""
    folder, requirements = BENCH / "fastapi", HERE / "requirements.txt"
    python = folder / "bin" / "python"
    with _made_from(requirements, folder) as stale:
        if stale:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", str(requirements)], check=True)
    return python


def tokens_file() -> Path:
    """Write down the tokens that our simulated source says, over and over, for the twins to say the same."""
    path = BENCH / "tokens.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([*tokenise(compose(INPUT, 1)), "\n\n"]))
    return path
