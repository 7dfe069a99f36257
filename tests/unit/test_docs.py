"""The documents match the code: settings, routes, links, paths, the file tree."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from chatserver.handlers.openapi import make_openapi
from chatserver.settings import Settings, read_settings
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
REQUESTS = (ROOT / "requests.http").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {setting.name.upper(): setting for setting in fields(Settings)}


def test_every_setting_is_in_the_example_and_in_the_readme_with_its_default() -> None:
    example = dict(re.findall(r"^#? ?([A-Z][A-Z_]+)=(.*)$", EXAMPLE, re.M))
    assert set(example) == set(SETTINGS)
    table = README.partition("## Environment variables")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.M)
    documented: dict[str, str] = {}
    for names, defaults in rows:
        listed = re.findall(r"`([A-Z_]+)`", names)
        values = [value.strip().strip("`") for value in defaults.split(",")]
        documented |= dict(zip(listed, values if len(values) > 1 else values * len(listed), strict=True))
    assert set(documented) == set(SETTINGS)
    for name, setting in SETTINGS.items():
        default = setting.default
        if default in (None, ()):
            assert documented[name] in ("unset", "the SDK's"), name
            continue
        text = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if isinstance(default, float)
            else str(default)
        )
        assert documented[name] == text, name
        # The commented line, meant to be uncommented, names the other source.
        assert example[name] == ("openai" if name == "REPLY_SOURCE" else text), name


def test_example_is_a_valid_file_whose_settings_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(EXAMPLE)
    settings = read_settings({}, tmp_path / ".env")
    assert settings == Settings(openai_api_key="your_api_key_here")
    # Each commented line is valid, too, once the key that the source needs is set.
    (tmp_path / ".env").write_text(
        re.sub(r"^# ([A-Z_]+=)", r"\1", EXAMPLE, flags=re.M).replace("your_api_key_here", "k")
    )
    assert read_settings({}, tmp_path / ".env").reply_source == "openai"


def test_secrets_are_not_in_the_settings_repr() -> None:
    settings = read_settings({"OPENAI_API_KEY": "sk-secret", "MONGODB_URI": "mongodb://u:secret@h"}, Path("none"))
    assert "secret" not in repr(settings)


def test_every_route_is_in_the_readme_and_in_requests_http() -> None:
    for path, item in make_openapi(Settings())["paths"].items():
        for method in set(item) - {"parameters"}:
            name = path.replace("{conversationId}", ":conversationId")
            assert f"{method.upper()} {name}" in README, f"{method} {path}"
            pattern = re.escape(path).replace(r"\{conversationId\}", r"\{\{[\w.$]+\}\}")
            assert re.search(rf"^{method.upper()} \{{\{{host\}}\}}{pattern}(\?.*)?$", REQUESTS, re.M), (
                f"{method} {path}"
            )


def test_tree_of_the_architecture_is_the_real_one() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree")[2].split("```")[1]
    folder, listed = ROOT, set()
    for indent, name in re.findall(r"^( *)([\w./]+)", tree, re.M):
        folder = folder if indent else ROOT / name
        listed.add(folder / name if indent else folder)
        assert (folder / name if indent else folder).exists(), name
    entries = set((ROOT / "chatserver").iterdir()) - {ROOT / "chatserver" / "__init__.py"}
    assert {path for path in listed if path.parent == ROOT / "chatserver"} == {
        path for path in entries if path.name != "__pycache__"
    }
    for scripts in re.findall(r"^scripts/ +(.*)$", tree, re.M):
        assert all((ROOT / "scripts" / name).exists() for name in scripts.split(", "))


def test_modules_of_the_packages_are_the_real_ones() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| package | modules |")[2].partition("\n\n")[0]
    for package, modules in re.findall(r"^\| `(.*?)/` \| (.*) \|$", table, re.M):
        there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", modules)) == there, package


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_paths_in_the_documents_exist(page: Path) -> None:
    text = _without_blocks(page)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link
    for code in re.findall(r"`([^`\n]+)`", text):
        path = code.split(" ")[0]
        if re.fullmatch(
            r"(chatserver|docs|scripts|tests|\.ci)/[\w./-]*|[A-Z]+\.md|\.env\.example|requests\.http", path
        ):
            assert (ROOT / path).exists(), code


def _without_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings have where Markdown is rendered."""
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_log_lines_of_the_documents_are_logged() -> None:
    section = (ROOT / "docs" / "operating.md").read_text().partition("## Logs")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(.+?)` \| (?:warning|error) ", section, re.M)
    assert len(listed) == 11
    code = "".join(path.read_text() for path in (ROOT / "chatserver").rglob("*.py"))
    assert [line for line in listed if line not in code] == []
