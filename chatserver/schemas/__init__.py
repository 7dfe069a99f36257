"""The JSON Schemas (draft 2020-12) of requests, answers and events, one file each, and the validators of requests."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from chatserver.errors import FieldError, InvalidRequest

Schema = dict[str, Any]

# Read at import: a first request must not fail because no file descriptor is left.
_TEXTS = {
    file.name.removesuffix(".json"): file.read_text("utf-8")
    for file in files(__package__).iterdir()
    if file.name.endswith(".json")
}


def load(name: str, max_input_chars: int = 0) -> Schema:
    """Return a copy of the schema in `schemas/<name>.json`.

    :param max_input_chars: the setting of that name, for `say`; 0 keeps the file's value
    """
    schema: Schema = json.loads(_TEXTS[name])
    if name == "say" and max_input_chars:
        schema["properties"]["input"]["maxLength"] = max_input_chars
    return schema


@cache
def parameter_types(name: str) -> dict[str, str]:
    """Return the names of a query's parameters with their types."""
    return {parameter: schema["type"] for parameter, schema in load(name)["properties"].items()}


@cache
def _validator(name: str, max_input_chars: int) -> Draft202012Validator:
    return Draft202012Validator(load(name, max_input_chars))


def validate(name: str, value: object, max_input_chars: int = 0) -> None:
    """Check a value against a schema.

    :raises InvalidRequest: with a JSON Pointer (RFC 6901) to each invalid place
    """
    errors = list(_validator(name, max_input_chars).iter_errors(value))
    if errors:
        fields = [field for error in errors for field in _fields(error)]
        detail = "; ".join(f"{field['pointer'] or 'the body'} {field['detail']}" for field in fields[:3])
        raise InvalidRequest(f"{detail}.", fields=fields)


def _fields(error: ValidationError) -> list[FieldError]:
    """Describe an error without repeating the value, which may be long or private."""
    pointer = "".join(f"/{_escape(str(step))}" for step in error.absolute_path)
    limit: Any = error.validator_value
    schema: Any = error.schema
    instance: Any = error.instance
    match str(error.validator):
        case "required":
            return [{"pointer": f"/{_escape(name)}", "detail": "is missing"} for name in limit if name not in instance]
        case "additionalProperties":
            known = schema.get("properties", {})
            return [
                {"pointer": f"/{_escape(name)}", "detail": "is not a known field"}
                for name in list(instance)[:10]
                if name not in known
            ]
        case "type":
            detail = f"must be of type {limit if type(limit) is str else ' or '.join(limit)}"
        case "maxLength":
            detail = f"must have at most {limit} characters"
        case "pattern" if limit.startswith("[^\\s"):
            detail = "must not be empty or only white space"
        case "pattern" if limit == "^[0-9a-fA-F]{24}$":
            detail = "must be an id of 24 hex digits"
        case "pattern" if limit.startswith("^[nu]"):
            detail = "must be the nextCursor of a page of this list"
        case "pattern":
            detail = f"must match {limit}"
        case "not" if limit["pattern"] == "\\u0000":
            detail = "must not contain a NUL character"
        case "not":
            detail = "must be one line without control characters"
        case "minimum":
            detail = f"must be at least {limit}"
        case "maximum":
            detail = f"must be at most {limit}"
        case "enum":
            detail = f"must be one of {', '.join(map(str, limit))}"
        case _:
            detail = f"does not fit its schema ({error.validator})"
    return [{"pointer": pointer, "detail": detail}]


def _escape(step: str) -> str:
    return step[:100].replace("~", "~0").replace("/", "~1")
