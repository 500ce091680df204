"""JSON and JSON Lines as lines like "server.port: 8080", one line per record, values exactly as written.

Keys of the outermost object with more than one value become sections. Invalid JSON stays plain text.
"""

import json
from collections.abc import Iterator
from typing import Any

from ingest.parse.blocks import BlockWriter
from ingest.parse.text import read_text
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/json"
_RECORD_CHARS = 400  # longer records get one line per value
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def parse_json(data: bytes) -> ParsedDocument:
    """Read one value, or one per line. Raises ParseError undecodable_text."""
    text = read_text(data)
    try:
        value = _read_values(text)
        writer = BlockWriter()
        _write(writer, value)
        return writer.finish(MEDIA_TYPE)
    except (ValueError, RecursionError):  # not JSON, or nested thousands deep
        return ParsedDocument(text=text, media_type=MEDIA_TYPE)


def _read_values(text: str) -> Any:
    """The value of the whole text, or a list of the values of its lines; an invalid line becomes a string."""
    try:
        return _DECODER.decode(text)
    except ValueError:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise
        _DECODER.decode(lines[0])
    return [_read_line(line) for line in lines]


def _read_line(line: str) -> Any:
    try:
        return _DECODER.decode(line)
    except ValueError:
        return line


def _write(writer: BlockWriter, value: Any) -> None:
    if not isinstance(value, dict):
        _write_value(writer, "", value)
        return
    for key, inner in value.items():
        if isinstance(inner, dict | list) and inner and not _is_flat_list(inner):
            writer.add(key)
            writer.end_heading(1)
            _write_value(writer, key, inner)
            writer.end_block()
        else:
            _write_value(writer, key, inner)


def _write_value(writer: BlockWriter, path: str, value: Any) -> None:
    """Write lists of objects as one block per record, with relative paths; anything else as one line per value."""
    if isinstance(value, list) and not _is_flat_list(value):
        for item in value:
            writer.end_block()
            if isinstance(item, dict):
                _write_record(writer, item)
            else:
                _write_value(writer, path, item)
        writer.end_block()
    else:
        for name, text in _leaves(path, value):
            writer.add_line(f"{name}: {text}" if name else text)


def _write_record(writer: BlockWriter, record: dict[str, Any]) -> None:
    lines = [f"{name}: {' '.join(text.split())}" for name, text in _leaves("", record)]
    if sum(map(len, lines)) <= _RECORD_CHARS:
        lines = [" | ".join(lines)]
    for line in lines:
        writer.add_line(line)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """(path, text) of each scalar; a list of scalars is one text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else key, inner)
    elif _is_flat_list(value):
        if value:
            yield path, ", ".join(map(_scalar_text, value))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(f"{path}[{number}]", inner)
    elif (text := _scalar_text(value)).strip():
        yield path, text


def _is_flat_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _scalar_text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
    return str(value)
