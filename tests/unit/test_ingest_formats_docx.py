"""DOCX: what stands within changes, fields, controls, text boxes and footnotes; tables with merged cells."""

from pathlib import Path

import pytest
from office_kit import relations, sections, write_zip

from ingest.parse.cage import parse_in_child
from ingest.parse.docx import MEDIA_TYPE as DOCX

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
MC = "http://schemas.openxmlformats.org/markup-compatibility/2006"


def word_run(text: str) -> str:
    return f"<w:r><w:t>{text}</w:t></w:r>"


def write_docx(path: Path, body: str, **parts: str) -> None:
    """`parts`: what else the document refers to, by the kind of the relation."""
    members = {
        "[Content_Types].xml": "<Types/>",
        "_rels/.rels": relations(("d", "officeDocument", "word/document.xml")),
        "word/document.xml": f'<w:document xmlns:w="{W}" xmlns:mc="{MC}"><w:body>{body}</w:body></w:document>',
        "word/_rels/document.xml.rels": relations(*((kind, kind, f"{kind}.xml") for kind in parts)),
        **{f"word/{kind}.xml": f'<w:{kind} xmlns:w="{W}">{part}</w:{kind}>' for kind, part in parts.items()},
    }
    write_zip(path, members)


@pytest.mark.parametrize(
    ("wrapped", "text"),
    [
        ('<w:ins w:id="1">{}</w:ins>', "a five z"),
        ('<w:moveTo w:id="1">{}</w:moveTo>', "a five z"),
        ('<w:fldSimple w:instr="DATE">{}</w:fldSimple>', "a five z"),
        ("<w:sdt><w:sdtContent>{}</w:sdtContent></w:sdt>", "a five z"),
        ('<w:smartTag w:element="x">{}</w:smartTag>', "a five z"),
        ('<w:hyperlink w:anchor="x">{}</w:hyperlink>', "a five z"),
        ('<w:moveFrom w:id="1">{}</w:moveFrom>', "a z"),
        ('<w:del w:id="1"><w:r><w:delText>five</w:delText></w:r></w:del>', "a z"),
        ("<w:r><w:t>fi</w:t><w:softHyphen/><w:t>ve</w:t><w:noBreakHyphen/><w:t>x</w:t></w:r>", "a five-x z"),
    ],
)
def test_docx_reads_what_stands_in_a_paragraph_with_changes_accepted(tmp_path, wrapped, text):
    blank = '<w:r><w:t xml:space="preserve"> </w:t></w:r>'
    five = wrapped.format(word_run("five"))
    write_docx(tmp_path / "x", f"<w:p>{word_run('a')}{blank}{five}{blank}{word_run('z')}</w:p>")
    assert parse_in_child(tmp_path / "x", DOCX).text == text


def test_docx_reads_blocks_in_content_controls_text_boxes_and_footnotes(tmp_path):
    box = f"<w:txbxContent><w:p>{word_run('In the box.')}</w:p></w:txbxContent>"
    versions = f"<mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback>"
    shape = f"<w:r><mc:AlternateContent>{versions}</mc:AlternateContent></w:r>"
    nested = f"<w:tbl><w:tr><w:tc><w:p>{word_run('Inner')}</w:p></w:tc></w:tr></w:tbl><w:p/>"
    rows = [
        f"<w:tc><w:p>{word_run('Boat')}</w:p></w:tc><w:tc><w:p>{word_run('Built')}</w:p></w:tc>",
        f'<w:tc><w:tcPr><w:vMerge w:val="restart"/></w:tcPr><w:p>{word_run("Gull")}</w:p></w:tc><w:tc>{nested}</w:tc>',
        f"<w:tc><w:tcPr><w:vMerge/></w:tcPr><w:p/></w:tc><w:tc><w:p>{word_run('1931')}</w:p></w:tc>",
    ]
    table = "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in rows) + "</w:tbl>"
    body = (
        f'<w:p><w:pPr><w:pStyle w:val="V1"/></w:pPr>{word_run("Boats 7")}</w:p>'
        f'<w:p><w:pPr><w:pStyle w:val="U1"/></w:pPr>{word_run("Boats")}</w:p>'
        f"<w:sdt><w:sdtContent><w:p>{word_run('Two sail.')}"
        f'<w:r><w:footnoteReference w:id="2"/></w:r><w:del><w:r><w:footnoteReference w:id="2"/></w:r></w:del>'
        f'<w:r><w:footnoteReference w:id="9"/></w:r>{shape}</w:p>{table}</w:sdtContent></w:sdt>'
    )
    styles = "".join(
        f'<w:style w:styleId="{key}"><w:name w:val="{name}"/></w:style>'
        for key, name in [("V1", "toc 1"), ("U1", "heading 1")]
    )
    notes = (
        f'<w:footnote w:id="0"><w:p/></w:footnote><w:footnote w:id="2"><w:p>{word_run("In May.")}</w:p></w:footnote>'
    )
    write_docx(tmp_path / "x", body, styles=styles, footnotes=notes)
    parsed = parse_in_child(tmp_path / "x", DOCX)
    assert parsed.text == (
        "Boats\n\nTwo sail.\n\nIn the box.\n\nFootnote: In May.\n\n"
        "Boat | Built\nBoat: Gull | Built: Inner\nBoat: Gull | Built: 1931"
    )
    assert sections(parsed) == [(2, "Boats")]
