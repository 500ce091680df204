"""Renders the OpenAPI description as one static page, without scripts or external resources."""

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PROBLEMS = ("4XX", "5XX")  # equal for all operations, so described once
_METHODS = ("get", "post", "put", "patch", "delete")


def render_api_page(openapi: Mapping[str, Any]) -> str:
    """HTML for `/docs`."""
    info = openapi["info"]
    body = "".join(_operations(openapi)) + "<h2>Bodies</h2>" + "".join(_schemas(openapi))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(info["title"])} API</title><link rel="stylesheet" href="/web/style.css"></head><body>'
        f'<main class="api"><h1>{escape(info["title"])} {escape(info["version"])}</h1><p>{_prose(info["description"])} '
        f'The same for programs: <a href="/openapi.json">openapi.json</a>.</p>{_problem(openapi)}{body}'
        "</main></body></html>"
    )


def _operations(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, item in openapi["paths"].items():
        for method in _METHODS:
            if operation := item.get(method):
                yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                yield f"<p>{_prose(operation.get('description', operation.get('summary', '')))}</p>"
                yield _list(_parameters(operation))
                yield _list(_responses(operation))


def _problem(openapi: Mapping[str, Any]) -> str:
    """The response of failed calls."""
    calls = (call for item in openapi["paths"].values() for call in item.values())
    for media_type, content in next(calls)["responses"][_PROBLEMS[0]]["content"].items():
        return f"<p>A call that fails is answered with {escape(media_type)}: {_type(content['schema'])}.</p>"
    return ""


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    for parameter in operation.get("parameters", ()):
        required = ", required" if parameter.get("required") else ""
        named = f"<code>{escape(parameter['name'])}</code> ({parameter['in']}{required}): {_type(parameter['schema'])}"
        yield named + _meaning(parameter)
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        fields = content["schema"].get("properties")
        yield f"body, {escape(media_type)}{'' if fields else ': ' + _type(content['schema'])}"
        for name, value in (fields or {}).items():
            yield f"<code>{escape(name)}</code> (form): {_type(value)}{_meaning(value)}"


def _responses(operation: Mapping[str, Any]) -> Iterator[str]:
    for status, response in operation["responses"].items():
        if status in _PROBLEMS:
            continue
        types = [_type(content.get("schema", {})) for content in response.get("content", {}).values()]
        yield f"{escape(status)} {_prose(response['description'])} {' '.join(types)}"


def _schemas(openapi: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(openapi.get("components", {}).get("schemas", {}).items()):
        yield f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3><p>{_prose(schema.get("description", ""))}</p>'
        fields = schema.get("properties", {}).items()
        yield _list(f"<code>{escape(field)}</code>: {_type(value)}{_meaning(value)}" for field, value in fields)
        for example in schema.get("examples", ()):
            yield f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"


def _meaning(described: Mapping[str, Any]) -> str:
    return f". {_prose(text)}" if (text := described.get("description")) else ""


def _prose(text: str) -> str:
    """The text as HTML, with backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _type(schema: Mapping[str, Any]) -> str:
    """A short name of a JSON schema, as HTML."""
    if ref := schema.get("$ref"):
        name = escape(ref.rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(option) for option in schema[union])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and "properties" in schema:
        return ", ".join(f"<code>{escape(name)}</code> {_type(value)}" for name, value in schema["properties"].items())
    return escape(str(schema.get("type", "any value")))


def _list(items: Iterator[str]) -> str:
    entries = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""
