"""Text with structure: sections of reStructuredText, definitions of source code."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.parse import parse_file
from ingest.parse.rst import parse_rst
from ingest.parse.source import parse_source

RST = """\
=======
 Guide
=======

Intro with a `link <https://example.org>`_.

Cleaning
========
:Author: Ann

Water & *soap*
--------------

A paragraph that is
----- not a title.

====  ====
a     b
====  ====
1     2
====  ====

.. code::

   x = 1
   -----

The ``run`` :func:`tool <tool.run>`
-----------------------------------

-----

Repair
======
end"""

PYTHON = '''\
"""Module."""
import os

CLASS = 1

class Pump(Base):
    """def not_this(): it is in a string, but begins the line no other way."""

    async def run(self) -> None:
        def inner(): ...

    @property
    def pressure(self): ...

def main(): ...
'''

OTHERS = """\
pub(crate) fn start(config: &Config) -> Result<()> {
func (s *Server) Listen(port int) error {
export default async function load(url) {
static int read_block(struct file *f,
int main(void)
    if (ready) {
    return compute(x);
run_all() {
CREATE TABLE IF NOT EXISTS "users" (
[server.tls]
impl Display for Pump {
public final class Engine extends Part {
call_me(1);
x = def_value
"""


def found(parsed) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in parsed.headings]


def test_titles_of_restructuredtext_in_the_order_of_their_styles(tmp_path: Path):
    (tmp_path / "x").write_text(RST)
    parsed = parse_file(tmp_path / "x", "text/x-rst")
    assert (parsed.text, parsed.title) == (RST, "Guide")
    assert found(parsed) == [
        (1, "Guide"),
        (2, "Cleaning"),
        (3, "Water & soap"),
        (3, "The run tool"),
        (2, "Repair"),
    ]
    starts = [RST[heading.char_start :].split("\n")[0] for heading in parsed.headings]
    assert starts == ["=======", "Cleaning", "Water & *soap*", "The ``run`` :func:`tool <tool.run>`", "Repair"]


def test_definitions_of_python_with_their_depth(tmp_path: Path):
    (tmp_path / "x").write_text(PYTHON)
    parsed = parse_file(tmp_path / "x", "text/x-source")
    assert parsed.text == PYTHON
    assert found(parsed) == [(1, "Pump"), (2, "run"), (3, "inner"), (2, "pressure"), (1, "main")]
    assert all(heading.title in PYTHON[heading.char_start :].split("\n")[0] for heading in parsed.headings)


def test_definitions_of_other_languages():
    names = ["start", "Listen", "load", "read_block", "main", "run_all", "users", "server.tls", "Display", "Engine"]
    assert found(parse_source(OTHERS.encode())) == [(1, name) for name in names]


@pytest.mark.parametrize("parse", [parse_rst, parse_source])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab= -\n\t(){}:=`*_[]ü"), max_size=300))
def test_headings_stand_in_the_text_in_order(parse, text):
    parsed = parse(text.encode())
    starts = [heading.char_start for heading in parsed.headings]
    assert starts == sorted(set(starts)) and all(0 <= start < len(parsed.text) for start in starts)
    assert all(heading.title and heading.level >= 1 for heading in parsed.headings)


@pytest.mark.parametrize("line", ["a" * 299, "int " * 70, "x, " * 99, "export " * 40, "(" * 299, "a::" * 90])
def test_long_lines_take_no_time_worth_mentioning(line):
    assert parse_source((f"{line}\n" * 3000).encode()).text
