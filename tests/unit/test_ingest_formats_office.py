"""PPTX, EPUB and ODT: slides as pages, chapters in reading order, headings, tables, notes kept."""

import zipfile
from pathlib import Path

import pytest
from office_kit import RELS, relations, sections, write_zip

from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child
from ingest.parse.epub import MEDIA_TYPE as EPUB
from ingest.parse.odt import MEDIA_TYPE as ODT
from ingest.parse.pptx import MEDIA_TYPE as PPTX
from ingest.sniff import UnsupportedMediaType, sniff_media_type

A = "http://schemas.openxmlformats.org/drawingml/2006/main"
P = "http://schemas.openxmlformats.org/presentationml/2006/main"
ODF = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
    for name in ("office", "text", "table", "drawing")
)


def shape(*paragraphs: str, kind: str = "") -> str:
    place = f'<p:ph type="{kind}"/>' if kind else ""
    return (
        f"<p:sp><p:nvSpPr><p:nvPr>{place}</p:nvPr></p:nvSpPr><p:txBody>"
        + "".join(f"<a:p>{paragraph}</a:p>" for paragraph in paragraphs)
        + "</p:txBody></p:sp>"
    )


def run(text: str, level: int = 0) -> str:
    return (f'<a:pPr lvl="{level}"/>' if level else "") + f"<a:r><a:t>{text}</a:t></a:r>"


def write_pptx(path: Path, slides: list[str], notes: str | None = None, order: list[int] | None = None) -> None:
    order = list(range(len(slides))) if order is None else order
    ids = "".join(f'<p:sldId id="{256 + number}" r:id="s{number}"/>' for number in order)
    root = f'xmlns:a="{A}" xmlns:p="{P}" xmlns:r="{RELS}"'
    members = {
        "[Content_Types].xml": "<Types/>",
        "ppt/presentation.xml": f"<p:presentation {root}><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": relations(
            *((f"s{number}", "slide", f"slides/slide{number}.xml") for number in range(len(slides)))
        ),
    }
    for number, shapes in enumerate(slides):
        members[f"ppt/slides/slide{number}.xml"] = (
            f"<p:sld {root}><p:cSld><p:spTree>{shapes}</p:spTree></p:cSld></p:sld>"
        )
    if notes is not None:
        members["ppt/slides/_rels/slide0.xml.rels"] = relations(("n", "notesSlide", "../notesSlides/notes.xml"))
        members["ppt/notesSlides/notes.xml"] = (
            f"<p:notes {root}><p:cSld><p:spTree>{notes}</p:spTree></p:cSld></p:notes>"
        )
    write_zip(path, members)


def test_pptx_slides_are_pages_with_titles_tables_and_notes(tmp_path):
    cells = [("Site", "Pumps"), ("Oslo", "4")]
    table = "".join(
        "<a:tr>" + "".join(f"<a:tc><a:txBody><a:p>{run(c)}</a:p></a:txBody></a:tc>" for c in row) + "</a:tr>"
        for row in cells
    )
    table += f'<a:tr><a:tc vMerge="1"/><a:tc><a:txBody><a:p>{run("7")}</a:p></a:txBody></a:tc></a:tr>'
    first = (
        shape(run("Body first"), run("a point", 1))
        + shape(run("Pump "), run("sites"), kind="title")
        + shape(run("7"), kind="sldNum")
        + f"<p:graphicFrame><a:graphic><a:tbl>{table}</a:tbl></a:graphic></p:graphicFrame>"
    )
    notes = (
        shape(kind="sldImg") + shape(run("Say this."), run("And this."), kind="body") + shape(run("1"), kind="sldNum")
    )
    group = f"<p:grpSp>{shape(run('In a') + '<a:br/>' + run('group'))}</p:grpSp>"
    write_pptx(tmp_path / "x", [first, "", group, shape(run("Outlook"), kind="ctrTitle")], notes, [3, 0, 1, 2, 0])
    assert sniff_media_type((tmp_path / "x").read_bytes(), "x") == PPTX
    parsed = parse_in_child(tmp_path / "x", PPTX)
    pages = [parsed.text[page.char_start : page.char_end] for page in parsed.pages]
    assert pages == [
        "Outlook",
        "Pump sites\n\nBody first\n  - a point\n\nSite | Pumps\nSite: Oslo | Pumps: 4\nSite: Oslo | Pumps: 7\n\n"
        "Notes: Say this.\nAnd this.",
        "",
        "In a group",
    ]
    assert [page.page for page in parsed.pages] == [1, 2, 3, 4]
    assert sections(parsed) == [(1, "Outlook"), (1, "Pump sites")]
    assert parsed.title == "Outlook"


def test_pptx_with_empty_slides_around_the_text(tmp_path):
    write_pptx(tmp_path / "x", ["", shape(run("only")), ""])
    parsed = parse_file(tmp_path / "x", PPTX)
    assert [(page.char_start, page.char_end) for page in parsed.pages] == [(0, 0), (0, 4), (4, 4)]


def test_pptx_has_a_limit_of_slides(tmp_path):
    write_pptx(tmp_path / "x", [shape(run("x"))] * 3)
    with pytest.raises(ParseError, match="3 slides are over the limit of 2") as caught:
        parse_file(tmp_path / "x", PPTX, max_pages=2)
    assert caught.value.code == "too_many_pages"


def chapter(body: str) -> str:
    return (
        '<?xml version="1.0"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><head><title>file</title></head>'
        f"<body>{body}</body></html>"
    )


def write_epub(path: Path, chapters: dict[str, str], spine: list[str], extra: dict[str, str] | None = None) -> None:
    names = list(chapters)
    manifest = "".join(
        f'<item id="c{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(names)
    )
    manifest += '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
    manifest += '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    order = "".join(f'<itemref idref="c{names.index(name)}"/>' for name in spine)
    points = '<navPoint><navLabel><text>The  End</text></navLabel><content src="text/c%20b.xhtml#top"/></navPoint>'
    write_zip(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
            "OEBPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf" '
            'xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>A Book</dc:title></metadata>'
            f'<manifest>{manifest}</manifest><spine><itemref idref="nav"/>{order}<itemref idref="gone"/></spine>'
            "</package>",
            "OEBPS/toc.ncx": f'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{points}</navMap></ncx>',
            "OEBPS/nav.xhtml": chapter('<nav><a href="text/a.xhtml">Start</a></nav>'),
            **{f"OEBPS/{name.replace('%20', ' ')}": body for name, body in chapters.items()},
            **(extra or {}),
        },
    )


def test_epub_chapters_come_in_reading_order_with_their_names(tmp_path):
    chapters = {
        "text/c%20b.xhtml": chapter("<p>It ended.</p>"),
        "text/a.xhtml": chapter("<h1>Start</h1><p>It began.</p><h2>Inner</h2><ul><li>one</li></ul>"),
        "cover.xhtml": chapter("<img src='x'/>"),
    }
    write_epub(tmp_path / "x", chapters, ["cover.xhtml", "text/a.xhtml", "text/c%20b.xhtml", "text/a.xhtml"])
    assert sniff_media_type((tmp_path / "x").read_bytes(), "x.zip") == EPUB
    parsed = parse_in_child(tmp_path / "x", EPUB)
    assert parsed.text == "Start\n\nIt began.\n\nInner\n\n- one\n\nThe End\n\nIt ended."
    assert sections(parsed) == [(1, "Start"), (2, "Inner"), (1, "The End")]
    assert (parsed.title, parsed.media_type) == ("A Book", EPUB)


def test_an_epub_says_which_chapter_is_nested_too_deeply(tmp_path):
    chapters = {"a.xhtml": chapter("<p>all of it</p>"), "b.xhtml": chapter("<p>start</p>" + "<div>" * 20_000 + "end")}
    write_epub(tmp_path / "x", chapters, list(chapters))
    parsed = parse_file(tmp_path / "x", EPUB)
    assert parsed.text.endswith("start")
    assert parsed.unread.startswith("in OEBPS/b.xhtml: the page nests more than 2,048 elements")


def test_an_epub_that_lacks_a_chapter_is_read_without_it(tmp_path):
    write_epub(
        tmp_path / "x", {name: chapter("<p>here</p>") for name in ("a.xhtml", "b.xhtml")}, ["a.xhtml", "b.xhtml"]
    )
    with zipfile.ZipFile(tmp_path / "x") as whole:
        write_zip(tmp_path / "y", {name: whole.read(name) for name in whole.namelist() if name != "OEBPS/b.xhtml"})
    parsed = parse_file(tmp_path / "y", EPUB)
    assert parsed.text == "here" and parsed.unread == "OEBPS/b.xhtml is named in the book, but not in the file"


def test_a_protected_epub_says_so(tmp_path):
    encryption = '<encryption><CipherData><CipherReference URI="OEBPS/a.xhtml"/></CipherData></encryption>'
    extra = {"META-INF/encryption.xml": encryption}
    write_epub(tmp_path / "x", {"a.xhtml": "\x01\x02"}, ["a.xhtml"], extra)
    with pytest.raises(ParseError, match="without protection") as caught:
        parse_file(tmp_path / "x", EPUB)
    assert caught.value.code == "encrypted_epub"


def test_an_epub_cannot_name_files_outside_of_itself(tmp_path):
    (tmp_path / "secret.xhtml").write_text(chapter("<p>do not show</p>"))
    name = f"../../../../../../../..{tmp_path}/secret.xhtml"
    write_epub(tmp_path / "x", {"a.xhtml": chapter("<p>seen</p>")}, ["a.xhtml"])
    assert parse_file(tmp_path / "x", EPUB).text == "seen"
    write_epub(tmp_path / "y", {name: chapter("<p>inside</p>")}, [name])
    with pytest.raises(ParseError, match="damaged"):
        parse_file(tmp_path / "y", EPUB)


def write_odt(path: Path, body: str, extra: dict[str, str] | None = None) -> None:
    write_zip(
        path,
        {
            "mimetype": ODT,
            "content.xml": f"<office:document-content {ODF}><office:body><office:text>{body}</office:text>"
            "</office:body></office:document-content>",
            "meta.xml": f'<office:document-meta {ODF} xmlns:dc="http://purl.org/dc/elements/1.1/"><office:meta>'
            "<dc:title>Rules</dc:title></office:meta></office:document-meta>",
            **(extra or {}),
        },
    )


def test_odt_keeps_headings_lists_and_tables_in_order(tmp_path):
    table = "".join(
        "<table:table-row>" + "".join(f"<table:table-cell><text:p>{c}</text:p></table:table-cell>" for c in row)
        + '<table:table-cell table:number-columns-repeated="16000"/></table:table-row>'
        for row in [("City", "Limit"), ("Oslo", "900")]
    )  # fmt: skip
    body = (
        "<text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>"
        '<text:h text:outline-level="1">House\n rules</text:h>'
        '<text:p>Some<text:s text:c="2"/><text:span>inner</text:span> text<text:note><text:p>foot</text:p></text:note>.'
        "<text:line-break/>Next.</text:p>"
        "<text:list><text:list-item><text:p>one</text:p><text:list><text:list-item><text:p>deep</text:p>"
        "</text:list-item></text:list></text:list-item><text:list-item><text:p>two</text:p></text:list-item>"
        "</text:list>"
        f'<text:h text:outline-level="2">Limits</text:h><table:table>{table}</table:table><text:p/>'
        "<text:p>Last.</text:p>"
    )
    write_odt(tmp_path / "x", body)
    assert sniff_media_type((tmp_path / "x").read_bytes(), "x") == ODT
    parsed = parse_in_child(tmp_path / "x", ODT)
    assert parsed.text == (
        "House rules\n\nSome  inner text.\nNext.\n\nFootnote: foot\n\n- one\n- deep\n- two\n\n"
        "Limits\n\nCity | Limit\nCity: Oslo | Limit: 900\n\nLast."
    )
    assert sections(parsed) == [(1, "House rules"), (2, "Limits")]
    assert parsed.title == "Rules"


def test_an_odt_text_box_follows_the_paragraph_that_it_stands_in(tmp_path):
    box = "<drawing:frame><drawing:text-box><text:p>In the box.</text:p></drawing:text-box></drawing:frame>"
    cell = f"<table:table-cell><text:p>Oslo{box}</text:p></table:table-cell>"
    table = f"<table:table><table:table-row>{cell}</table:table-row></table:table>"
    write_odt(tmp_path / "x", f"<text:p>Before{box} and after.</text:p>{table}")
    assert parse_in_child(tmp_path / "x", ODT).text == "Before and after.\n\nIn the box.\n\nOslo In the box."


def test_odt_cells_merged_over_rows_are_in_each_of_them(tmp_path):
    merged = '<table:table-cell table:number-rows-spanned="2"><text:p>Oslo</text:p></table:table-cell>'
    covered = "<table:covered-table-cell/>"
    rows = "".join(
        f"<table:table-row>{first}<table:table-cell><text:p>{second}</text:p></table:table-cell></table:table-row>"
        for first, second in [(merged, 4), (covered, 7), (covered, 9)]
    )
    write_odt(tmp_path / "x", f"<table:table>{rows}</table:table>")
    assert parse_file(tmp_path / "x", ODT).text == "Oslo | 4\nOslo | 7\n9"


def test_an_odt_that_counts_huge_repeats_stays_small(tmp_path):
    cell = '<table:table-cell table:number-columns-repeated="999999999"><text:p>x</text:p></table:table-cell>'
    row = f"<table:table><table:table-row>{cell}</table:table-row></table:table>"
    write_odt(tmp_path / "x", f'{row}<text:p>a<text:s text:c="999999999"/>b</text:p>')
    assert len(parse_file(tmp_path / "x", ODT).text) < 10_000


def test_a_locked_odt_says_so(tmp_path):
    manifest = '<manifest xmlns="m"><file-entry><encryption-data/></file-entry></manifest>'
    write_odt(tmp_path / "x", "", {"META-INF/manifest.xml": manifest})
    with pytest.raises(ParseError, match="password") as caught:
        parse_file(tmp_path / "x", ODT)
    assert caught.value.code == "encrypted_odt"


def test_odt_entities_are_not_expanded(tmp_path):
    write_odt(tmp_path / "x", "<text:p>kept</text:p>")
    with zipfile.ZipFile(tmp_path / "x") as archive:
        content = archive.read("content.xml").decode()
    few = '<!DOCTYPE d [<!ENTITY e "inserted">]>' + content.replace("kept", "kept &e;")
    write_zip(tmp_path / "y", {"mimetype": ODT, "content.xml": few})
    assert parse_file(tmp_path / "y", ODT).text == "kept"
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<!DOCTYPE d [<!ENTITY l0 "lol">{lol}]>' + content.replace("kept", "kept &l9;")
    write_zip(tmp_path / "z", {"mimetype": ODT, "content.xml": bomb})
    with pytest.raises(ParseError, match="amplification"):
        parse_file(tmp_path / "z", ODT)


@pytest.mark.parametrize(("media_type", "kind"), [(PPTX, "pptx"), (EPUB, "epub"), (ODT, "odt")])
@pytest.mark.parametrize("damage", ["garbage", "cut", "other zip", "broken xml", "flipped"])
def test_damage_says_what_to_do(tmp_path, media_type, kind, damage):
    path = tmp_path / "x"
    part = {"pptx": "ppt/presentation.xml", "epub": "META-INF/container.xml", "odt": "content.xml"}[kind]
    {
        "pptx": lambda: write_pptx(path, [shape(run("x"))]),
        "epub": lambda: write_epub(path, {"a.xhtml": chapter("<p>x</p>")}, ["a.xhtml"]),
        "odt": lambda: write_odt(path, "<text:p>x</text:p>"),
    }[kind]()
    data = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 9)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        at = data.index(part.encode()) + len(part) + 2
        path.write_bytes(data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 40]) + data[at + 40 :])
    else:
        write_zip(path, {"a": "b"} if damage == "other zip" else {part: "<a><b></a>"})
    with pytest.raises(ParseError, match=f"save it again as {kind.upper()}") as caught:
        parse_file(path, media_type)
    assert caught.value.code == f"broken_{kind}"


def test_other_opendocument_files_and_old_workbooks_are_named(tmp_path):
    write_zip(tmp_path / "x", {"mimetype": "application/vnd.oasis.opendocument.spreadsheet", "content.xml": "<x/>"})
    with pytest.raises(UnsupportedMediaType, match=r"other than a text.*XLSX"):
        sniff_media_type((tmp_path / "x").read_bytes(), "x.odt")
    write_zip(tmp_path / "x", {"[Content_Types].xml": "", "xl/workbook.bin": ""})
    with pytest.raises(UnsupportedMediaType, match="binary Excel"):
        sniff_media_type((tmp_path / "x").read_bytes(), "x.xlsx")


def test_a_document_within_a_document_does_not_decide_the_type(tmp_path):
    write_zip(tmp_path / "inner", {"xl/workbook.xml": "x"})
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("ppt/presentation.xml", "x")
        archive.writestr("ppt/embeddings/table.xlsx", (tmp_path / "inner").read_bytes())
    assert sniff_media_type((tmp_path / "x").read_bytes(), "x.docx") == PPTX
