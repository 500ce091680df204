"""Jupyter notebooks: the cells in order, their source verbatim and their text output, without images.

Headings are those of the Markdown cells. A file that is not a notebook is parsed as JSON.
"""

import json
import re
from typing import Any

from ingest.parse.blocks import BlockWriter
from ingest.parse.decode import normalize_text
from ingest.parse.html import parse_html
from ingest.parse.json_values import parse_json
from ingest.parse.markdown import find_headings
from ingest.parse.text import read_text
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/x-ipynb+json"
_EMBEDDED = re.compile(
    r"!\[([^\]\n]*)\]\((?:data|attachment):[^)\s]*\)|\bdata:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=]*"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PICTURES = ("png", "jpeg", "svg")  # keys in format 3
_STAND_IN = re.compile(r"<[\w.]+(?: object)?(?: at 0x[0-9a-f]+)?>")  # repr of objects that only a browser displays


def parse_notebook(data: bytes) -> ParsedDocument:
    """Read formats 3 and 4. Raises ParseError undecodable_text, output_too_large."""
    try:
        cells = _cells_of(json.loads(read_text(data)))
    except (ValueError, RecursionError):  # not JSON, or nested thousands deep
        cells = None
    if cells is None:
        return parse_json(data)
    writer = BlockWriter()
    for cell in cells:
        kind = cell.get("cell_type")
        source = _EMBEDDED.sub(r"\1", _join(cell.get("source", cell.get("input"))))
        if kind == "heading":
            writer.add(source)
            writer.end_heading(_level(cell))
            continue
        _write(writer, source, has_headings=kind == "markdown")
        for output in _dicts(cell.get("outputs")):
            _write(writer, _output_text(output))
    return writer.finish(MEDIA_TYPE)


def _cells_of(value: Any) -> list[dict[str, Any]] | None:
    """The cells; None if it is not a notebook."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("worksheets"), list):
        return [cell for sheet in _dicts(value["worksheets"]) for cell in _dicts(sheet.get("cells"))]
    cells = _dicts(value.get("cells"))
    return cells if "nbformat" in value or any("cell_type" in cell for cell in cells) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _join(value: Any) -> str:
    """Join text that is either one string or a list of lines."""
    parts = value if isinstance(value, list) else [value]
    return "".join(part for part in parts if isinstance(part, str))


def _level(cell: dict[str, Any]) -> int:
    level = cell.get("level")
    return min(6, max(1, level)) if isinstance(level, int) else 1


def _write(writer: BlockWriter, text: str, has_headings: bool = False) -> None:
    text = normalize_text(text).strip("\n")
    if text.strip():
        headings = tuple(find_headings(text)) if has_headings else ()
        writer.add_document(ParsedDocument(text=text, headings=headings, media_type="text/markdown"), 0)


def _output_text(output: dict[str, Any]) -> str:
    """The text of an output; of several representations the plainest text."""
    match output.get("output_type"):
        case "stream":
            return _printed(_join(output.get("text")))
        case "error" | "pyerr":
            return f"{_join(output.get('ename'))}: {_join(output.get('evalue'))}"
    forms = output.get("data", output)
    if not isinstance(forms, dict) or any(name.startswith("image/") or name in _PICTURES for name in forms):
        return ""
    text = _join(forms.get("text/markdown")) or _join(forms.get("text/plain", forms.get("text")))
    if not text.strip() or _STAND_IN.fullmatch(text.strip()):
        return parse_html(_join(forms.get("text/html")).replace("\x00", "").encode("utf-8", "replace")).text
    return _printed(text)


def _printed(text: str) -> str:
    """The final state on a terminal: without colours, and with overwritten lines replaced."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in _COLOUR.sub("", text).split("\n"))
    return "\n".join(lines)
