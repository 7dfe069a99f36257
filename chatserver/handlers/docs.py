"""The API's documentation: the OpenAPI document, and the same content as an HTML page."""

from collections.abc import Iterable
from html import escape
from typing import Any

from chatserver.handlers.base import BaseHandler
from chatserver.handlers.openapi import make_openapi
from chatserver.handlers.pages import PAGE_HEADERS


class OpenAPIHandler(BaseHandler):
    """`/openapi.json`"""

    is_public = True

    def get(self) -> None:
        """Send the OpenAPI document."""
        self.send_json(make_openapi(self.config))

    head = get


class DocsHandler(BaseHandler):
    """`/docs`"""

    is_public = True

    def get(self) -> None:
        """Send the documentation as one page without scripts or external resources."""
        for name, value in PAGE_HEADERS.items():
            self.set_header(name, value)
        self.finish(_page(make_openapi(self.config)))

    head = get


_LIMITS = ("minimum", "maximum", "minLength", "maxLength", "default")


def _page(document: dict[str, Any]) -> str:
    parts = [f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>"]
    parts.append(_text(document["info"]["description"]))
    parts.append('<p>OpenAPI document: <a href="openapi.json">openapi.json</a>. Chat: <a href=".">the page</a>.</p>')
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                parts.append(_operation(method, path, operation, item.get("parameters", [])))
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<section id="{escape(name)}"><h3>{escape(name)}</h3>{_schema(schema)}</section>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>chatserver API</title>'
        '<link rel="icon" href="web/favicon.svg">'
        f'<link rel="stylesheet" href="web/docs.css"></head><body><main>{"".join(parts)}</main></body></html>\n'
    )


def _operation(method: str, path: str, operation: dict[str, Any], shared: list[dict[str, Any]]) -> str:
    rows = [
        (parameter["name"], parameter["in"], _kind(parameter["schema"]), parameter["description"])
        for parameter in [*shared, *operation.get("parameters", [])]
    ]
    if "requestBody" in operation:
        rows.append(("body", "JSON", _reference(operation["requestBody"]), ""))
    parts = [f'<section id="{operation["operationId"]}"><h2><code>{method.upper()} {escape(path)}</code></h2>']
    parts.append(f"<p>{escape(operation['summary'])}</p>")
    parts.append(_table(("parameter", "in", "type", ""), rows))
    answers = []
    for status, answer in operation["responses"].items():
        answers.append((status, _reference(answer), answer["description"]))
    return "".join([*parts, _table(("answer", "", ""), answers), "</section>"])


def _schema(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (name if name in required else f"{name}?", _kind(part), part.get("description", ""))
        for name, part in schema.get("properties", {}).items()
    ]
    return _text(schema["description"]) + (_table(("field", "type", ""), rows) if rows else "")


def _kind(schema: dict[str, Any]) -> str:
    """Return a value's type, limits and default as text."""
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "properties" in schema:
        return "{" + ", ".join(schema["properties"]) + "}"
    limits = [f"{name} {schema[name]}" for name in _LIMITS if name in schema]
    if "pattern" in schema:
        limits.append(f"`{schema['pattern']}`")
    return ", ".join([str(schema.get("const", schema["type"])), *limits])


def _reference(part: dict[str, Any]) -> str:
    for media_type, content in part.get("content", {}).items():
        return str(content["schema"].get("$ref", media_type)).rpartition("/schemas/")[2]
    return ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(text: str) -> str:
    """Return paragraphs and lists as HTML."""
    parts = []
    for block in text.split("\n\n"):
        if block.startswith("- "):
            items = "".join(f"<li>{_inline(line[2:])}</li>" for line in block.split("\n"))
            parts.append(f"<ul>{items}</ul>")
        else:
            parts.append(f"<p>{_inline(block)}</p>")
    return "".join(parts)


def _inline(text: str) -> str:
    """Return text as HTML, with text between backquotes as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
