"""Jupyter notebooks: cells and what they printed as text, headings of the Markdown cells."""

import json

import pytest

from ingest.parse import parse_bytes
from ingest.sniff import NOTEBOOK, SNIFF_BYTES, sniff_media_type

PICTURE = "iVBORw0KGgo" * 9000


def cell(kind: str, source: str | list[str], outputs: list | None = None, **more) -> dict:
    code = {"outputs": outputs or [], "execution_count": 1} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source, **code, **more}


def notebook(*cells: dict) -> bytes:
    head = {"metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps({"cells": cells, **head}, indent=1).encode()


def read(data: bytes):
    assert sniff_media_type(data[:SNIFF_BYTES], "whatever.json") == NOTEBOOK
    return parse_bytes(data, NOTEBOOK)


PUMP = notebook(
    cell("markdown", ["# Pump tests\n", "\n", f"Run at night. ![plan](data:image/png;base64,{PICTURE})"]),
    cell("code", ["# not a heading\n", "rate = measure()\n", "    print(rate)"], [
        {"output_type": "stream", "name": "stdout", "text": ["10%\r50%\r100%\n", "\x1b[31m48\x1b[0m litres\n"]},
        {"output_type": "display_data", "data": {"image/png": PICTURE, "text/plain": ["<Figure size 640x480>"]}},
        {"output_type": "execute_result", "data": {"text/html": "<table>", "text/plain": ["   a  b\n", "0  1  2"]}},
        {"output_type": "display_data", "data": {"text/plain": "<IPython.core.display.HTML object>",
                                                 "text/html": "<p>It <b>leaks</b>.</p>"}},
        {"output_type": "error", "ename": "ValueError", "evalue": "too cold", "traceback": ["\x1b[0m..."]},
    ]),
    cell("markdown", "## Result\n\nThe pump holds.", id="x"),
    cell("raw", "as it is"),
)  # fmt: skip


def test_cells_and_their_text_outputs_in_order():
    parsed = read(PUMP)
    assert parsed.text == (
        "# Pump tests\n\nRun at night. plan\n\n# not a heading\nrate = measure()\n    print(rate)\n\n"
        "100%\n48 litres\n\n   a  b\n0  1  2\n\nIt leaks.\n\nValueError: too cold\n\n"
        "## Result\n\nThe pump holds.\n\nas it is"
    )
    assert [(h.level, h.title, parsed.text[h.char_start :][:4]) for h in parsed.headings] == [
        (1, "Pump tests", "# Pu"),
        (2, "Result", "## R"),
    ]
    assert (parsed.title, parsed.media_type) == ("Pump tests", NOTEBOOK)


def test_format_three_and_keys_in_another_order():
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["Old\n", "title"]},
        {"cell_type": "code", "input": "1 + 1", "outputs": [{"output_type": "pyout", "text": ["2"]}]},
        {"cell_type": "code", "input": "plot()", "outputs": [{"output_type": "display_data", "png": PICTURE}]},
    ]
    old = json.dumps({"metadata": {"name": ""}, "nbformat": 3, "worksheets": [{"cells": cells}]}).encode()
    parsed = read(old)
    assert parsed.text == "Old title\n\n1 + 1\n\n2\n\nplot()"
    assert [(h.level, h.title) for h in parsed.headings] == [(2, "Old title")]


def test_cells_may_come_after_much_else():
    late = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"widgets": "x" * SNIFF_BYTES}}
    assert read(json.dumps({**late, "cells": [cell("markdown", "Late.")]}).encode()).text == "Late."


@pytest.mark.parametrize(
    "data",
    [
        b'{"cells": ["a"], "about": {"nbformat": 4}, "rows": "seven"}',
        b'{"cells": [{"cell_type": "code", "source": "seven',
        b'{"cells": [' + b"[" * 50_000 + b'"nbformat": 4 seven',
    ],
)
def test_what_only_looks_like_a_notebook_keeps_its_text(data):
    assert sniff_media_type(data[:SNIFF_BYTES], "x") == NOTEBOOK
    assert "seven" in parse_bytes(data, NOTEBOOK).text


@pytest.mark.parametrize("content", [b'{"cells": ["a"]}', b'{"a": "nbformat"}', b'["cells", {"nbformat": 4}]'])
def test_other_json_is_no_notebook(content):
    assert sniff_media_type(content, "x.ipynb") == "text/plain"
