import zipfile
from pathlib import Path

import docx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.parse import ParseError, parse_file
from ingest.parse.decode import UndecodableText, decode_text, normalize_text
from ingest.parse.docx import MEDIA_TYPE as DOCX
from ingest.parse.html import parse_html
from ingest.parse.markdown import parse_markdown
from retrieval.types import Heading, ParsedDocument


def sections(parsed: ParsedDocument) -> list[tuple[int, str]]:
    """Level and title of each heading, after checking that it stands where it says."""
    for heading in parsed.headings:
        line = parsed.text[heading.char_start :].split("\n", 1)[0]
        assert heading.title in line
    return [(heading.level, heading.title) for heading in parsed.headings]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Größe: 5 µm – “so”", "cp1252"),
        ("Les élèves étaient très fiers d’être reçus à l'école où ils vont déjà.", "cp1252"),
        ("A reunião não é às três, mas é bom ter a documentação à mão.", "cp1252"),
        ("Årsmøte på Åland, 12 m²", "cp1252"),
        ("Naïve café", "latin-1"),
        ("Zażółć gęślą jaźń. W Łodzi mieszka dziś około 650 tysięcy osób.", "iso8859-2"),
        ("Příští rok se zvýší poplatky za vodu, většina členů souhlasila.", "cp1250"),
        ("Привет, мир. Это обычный русский текст о погоде и о людях.", "cp1251"),
        ("これは日本語の文章です。文字コードの判定を試します。", "shift_jis"),
        ("Ünïcode ✓", "utf-8"),
        ("Ünïcode ✓", "utf-8-sig"),
        ("Ünïcode ✓", "utf-16"),
        ("Plain Western text, Größe", "utf-16-le"),
        ("Plain Western text, Größe", "utf-16-be"),
        ("Ünïcode ✓", "utf-32"),
    ],
)
def test_text_is_read_in_its_encoding(text, encoding):
    assert decode_text(text.encode(encoding)) == text


def test_a_declared_encoding_is_used_when_the_text_is_not_utf_8():
    data = "Łódź".encode("iso-8859-2")
    assert decode_text(data, declared="iso-8859-2") == "Łódź"
    assert decode_text("Łódź".encode(), declared="iso-8859-2") == "Łódź"
    assert decode_text(data, declared="no-such-code")


@given(st.binary(max_size=200))
def test_any_bytes_give_text_or_one_error(data):
    try:
        text = normalize_text(decode_text(data))
    except UndecodableText:
        return
    assert "\x00" not in text and "\r" not in text
    assert normalize_text(text) == text


def test_marks_that_only_say_where_a_word_may_be_divided_do_not_part_it(tmp_path: Path):
    word = "Donau\xaddampf\u2060schiff"
    assert (
        parse_html(f"<h1>{word}</h1><p>Eine&shy;s {word}.</p>".encode()).text
        == "Donaudampfschiff\n\nEines Donaudampfschiff."
    )
    (tmp_path / "x").write_text(f"{word} Donau\xad\ndampf e\xad\u0301")
    assert parse_file(tmp_path / "x", "text/plain").text == "Donaudampfschiff Donau\xad\ndampf é"


def test_text_files_are_kept_but_for_line_ends_and_composition(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes("a\r\nb\rc e\u0301\n".encode())
    assert parse_file(path, "text/plain") == ParsedDocument("a\nb\nc \u00e9\n", media_type="text/plain")


@pytest.mark.parametrize("media_type", ["text/plain", "text/markdown", "text/html"])
@pytest.mark.parametrize("data", [b"", b" \n\t", b"\xef\xbb\xbf\n"])
def test_a_file_without_text_is_an_empty_document(tmp_path, media_type, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(ParseError, match="no text") as caught:
        parse_file(path, media_type)
    assert caught.value.code == "empty_document"


def test_binary_data_called_text_says_what_to_do(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ParseError, match="save the file as UTF-8") as caught:
        parse_file(path, "text/plain")
    assert caught.value.code == "undecodable_text"


def test_markdown_headings_are_found_outside_of_code_and_front_matter():
    source = """---
title: not a heading
# nor this
---
# First *one* #

text
# [Linked](http://x) part
```sh
# a comment
```
~~~
## not this
```
~~~
Under
lined
=====

Second level
---
- item
---
###### deep
####### seven
    # code
#
"""
    parsed = parse_markdown(source.encode())
    assert parsed.text == source
    assert parsed.title == "First one"
    assert [(heading.level, heading.title) for heading in parsed.headings] == [
        (1, "First one"),
        (1, "Linked part"),
        (1, "lined"),
        (2, "Second level"),
        (6, "deep"),
    ]
    assert parsed.text[parsed.headings[3].char_start :].startswith("Second level")


def test_html_keeps_the_main_text_and_drops_the_rest():
    page = """<!doctype html><html><head><title> A &amp; B </title><style>p{}</style></head><body>
    <header>Site name</header><nav>Home</nav>
    <main><h1>Top</h1><p>One <b>bold</b>
      word<script>x()</script>.</p>after
      <h2>Lists</h2><ul><li>first<li>second<ul><li>inner</ul></ul><ol><li>a</li><li>b</li></ol>
      <p hidden>secret</p><div aria-hidden="true">icon</div>
      <pre>  keep
    this</pre><p>line<br>break</p></main>
    <aside>Advert</aside><footer>Legal</footer></body></html>"""
    parsed = parse_html(page.encode())
    assert parsed.title == "A & B"
    assert sections(parsed) == [(1, "Top"), (2, "Lists")]
    assert parsed.text == (
        "Top\n\nOne bold word.\n\nafter\n\nLists\n\n- first\n- second\n\n- inner\n\n1. a\n2. b\n\n"
        "  keep\n    this\n\nline\nbreak"
    )


def test_html_table_rows_are_lines_with_the_names_of_their_columns():
    page = b"""<table><caption>Prices</caption><tr><th>Fruit<th>Price</tr>
    <tr><td>Apple</td><td>2 <i>kroner</i><table><tr><td>in<td>side</table></td></tr>
    <tr><td>Pear</td></tr></table><p>After</p>"""
    assert parse_html(page).text == ("Prices\n\nFruit | Price\nFruit: Apple | Price: 2 kroner in side\nPear\n\nAfter")


def test_html_cells_merged_over_rows_are_in_each_of_them():
    page = """<table><thead><tr><th rowspan=2>Boat<th colspan=2>Crew</tr><tr><th>Day<th rowspan=9>Night</tr></thead>
    <tr><td rowspan="2">Gull</td><td>4</td><td>2</td></tr><tr><td>5</td><td>3</td></tr>
    <tr><th colspan=3>Hired</tr><tr><td>Tern<td rowspan=x>6<td>1</tr></table>
    <table><tr><td rowspan=2>Next<td>Top</tr><tr><td>Home</tr></table>
    <p><ruby>東京<rt>とうきょう</rt></ruby>の</p>"""
    assert parse_html(page.encode()).text == (
        "Boat | Crew\nBoat | Day | Night\nBoat: Gull | Day: 4 | Night: 2\nBoat: Gull | Day: 5 | Night: 3\nHired\n"
        "Boat: Tern | Day: 6 | Night: 1\n\nNext | Top\nHome\n\n東京の"
    )


def test_html_list_items_of_paragraphs_keep_their_marks():
    page = """<ol><li><p>Open the lid.</p><p>Wait.</p></li><li><div>Fill it<ul><li><p>water</p></li><li></li></ul></div>
    </li></ol><p>Done</p>"""
    assert parse_html(page.encode()).text == "1. Open the lid.\n\nWait.\n\n2. Fill it\n\n- water\n\nDone"


def test_html_drops_what_leads_elsewhere_in_a_manual():
    page = """<div class="navheader"><a href="a.html">Prev</a></div><div class="toc"><a href="#s1">Setup</a></div>
    <h1 id="s1">Setup<a class="headerlink" href="#s1">¶</a></h1>
    <div class="toc wide"><a href="b.html">Chapter B</a></div><div id="contents">As in <a href="#s1">C</a></div>"""
    parsed = parse_html(page.encode())
    assert parsed.text == "Setup\n\nChapter B\n\nAs in C"
    assert parsed.headings == (Heading(1, "Setup", 0),)


def test_html_in_a_declared_legacy_encoding():
    page = '<meta charset="windows-1250"><p>Příliš žluťoučký kůň</p>'.encode("cp1250")
    assert parse_html(page).text == "Příliš žluťoučký kůň"


def test_html_nested_deeply_is_read():
    depth = 2000
    parsed = parse_html(b"<p>start</p>" + b"<div>" * depth + b"x" + b"</div>" * depth + b"<p>end</p>")
    assert (parsed.text, parsed.unread) == ("start\n\nx\n\nend", None)


def test_html_nested_too_deeply_says_so():
    deep = b"<div>" * 20_000 + b"x" + b"</div>" * 20_000
    parsed = parse_html(b"<p>start</p>" + deep)
    assert parsed.text == "start" and "2,048 elements" in parsed.unread
    with pytest.raises(ParseError, match="2,048 elements") as error:
        parse_html(deep)
    assert error.value.code == "nested_too_deeply"


def write_docx(path: Path) -> None:
    document = docx.Document()
    document.add_heading("Rules", level=0)
    document.add_paragraph("First\tparagraph.")
    document.add_heading("Limits", level=1)
    document.add_paragraph("one", style="List Bullet")
    document.add_paragraph("two", style="List Bullet")
    table = document.add_table(3, 2)
    for row, texts in zip(table.rows, [("City", "Limit"), ("Oslo", "900"), ("Rome", "")], strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    wide = document.add_table(1, 2)
    wide.cell(0, 0).merge(wide.cell(0, 1)).text = "merged"
    document.add_paragraph("Last.")
    document.save(str(path))


def test_docx_keeps_headings_lists_and_tables_in_order(tmp_path):
    write_docx(tmp_path / "x")
    parsed = parse_file(tmp_path / "x", DOCX)
    assert parsed.text == (
        "Rules\n\nFirst\tparagraph.\n\nLimits\n\n- one\n- two\n\n"
        "City | Limit\nCity: Oslo | Limit: 900\nCity: Rome\n\nmerged\n\nLast."
    )
    assert sections(parsed) == [(1, "Rules"), (2, "Limits")]
    assert (parsed.pages, parsed.title) == ((), "Rules")


def damage(data: bytes, kind: str) -> bytes:
    match kind:
        case "garbage":
            return b"PK\x03\x04" + bytes(range(256)) * 20
        case "cut":
            return data[: len(data) // 2]
        case "no text part":
            return data.replace(b"word/document.xml", b"word/documents.xm")
        case "flipped":
            middle = data.index(b"word/document.xml") + 200
            return data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 400]) + data[middle + 400 :]
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["garbage", "cut", "no text part", "flipped"])
def test_a_damaged_docx_says_what_to_do(tmp_path, kind):
    write_docx(tmp_path / "good")
    (tmp_path / "bad").write_bytes(damage((tmp_path / "good").read_bytes(), kind))
    with pytest.raises(ParseError, match="save it again as DOCX") as caught:
        parse_file(tmp_path / "bad", DOCX)
    assert caught.value.code == "broken_docx"


def test_a_docx_that_unpacks_to_far_too_much_is_refused_before_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"\0" * (80 * 1024 * 1024))
    with pytest.raises(ParseError, match="unpacks") as caught:
        parse_file(tmp_path / "bomb", DOCX)
    assert caught.value.code == "zip_bomb"
