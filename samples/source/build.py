"""Builds documents/fr12-handbook.pdf and documents/travel-policy.docx from the texts beside this script.

Not part of the product; needs reportlab 5.1.0 (BSD) and python-docx 1.2.0 (MIT): `python samples/source/build.py`.
The same text gives the same bytes.
"""

import datetime
import io
import re
import zipfile
from pathlib import Path

import docx
from docx.table import Table as DocxTable
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import BaseDocTemplate, Frame, PageBreak, PageTemplate, Paragraph, Spacer, Table, TableStyle

SOURCE = Path(__file__).parent
DOCUMENTS = SOURCE.parent / "documents"
BODY = ParagraphStyle("body", fontName="Times-Roman", fontSize=10.5, leading=14, spaceAfter=7)
COVER = ParagraphStyle("cover", parent=BODY, fontSize=18, leading=28)
HEADINGS = {
    1: ParagraphStyle("h1", parent=BODY, fontName="Helvetica-Bold", fontSize=16, leading=20, spaceAfter=9),
    2: ParagraphStyle("h2", parent=BODY, fontName="Helvetica-Bold", fontSize=12, leading=15, spaceBefore=7),
}
ITEM = ParagraphStyle("item", parent=BODY, leftIndent=14, firstLineIndent=-14, spaceAfter=3)


def read_blocks(path: Path) -> list[list[str]]:
    """Blocks of lines between empty lines."""
    return [block.split("\n") for block in re.split(r"\n\s*\n", path.read_text().strip())]


def table_rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


class Handbook(BaseDocTemplate):
    """A4 pages with a foot line, an outline entry for each heading, and labels i, ii, iii, 1, 2, ..."""

    def __init__(self, path: Path, labels: list[str]) -> None:
        self.labels = labels
        frame = Frame(25 * mm, 22 * mm, A4[0] - 50 * mm, A4[1] - 44 * mm)
        super().__init__(str(path), pagesize=A4, invariant=1, title="Fjellrev FR-12 Operating Handbook")
        self.author = "Nordlys Field Instruments"
        self.addPageTemplates(PageTemplate(frames=[frame], onPage=self.draw_foot))

    def draw_foot(self, canvas: Canvas, document: BaseDocTemplate) -> None:
        label = self.labels[document.page - 1]
        if document.page == 1:
            front = sum(label.isalpha() for label in self.labels)
            canvas.addPageLabel(0, style="ROMAN_LOWER", start=1)
            canvas.addPageLabel(front, style="ARABIC", start=1)
            return
        canvas.setFont("Helvetica", 8)
        canvas.drawCentredString(A4[0] / 2, 12 * mm, label)

    def afterFlowable(self, flowable: object) -> None:
        level = getattr(flowable, "outline_level", None)
        if level is not None:
            key = f"section-{self.seq.nextf('section')}"
            self.canv.bookmarkPage(key)
            self.canv.addOutlineEntry(flowable.getPlainText(), key, level=level)


def make_table(rows: list[list[str]], contents: bool) -> Table:
    cells = [[Paragraph(cell, BODY.clone("cell", spaceAfter=0)) for cell in row] for row in rows]
    width = A4[0] - 60 * mm
    first = 0.85 if contents else {2: 0.5, 3: 0.18, 4: 0.28}[len(rows[0])]
    rest = (1 - first) / (len(rows[0]) - 1)
    table = Table(cells, colWidths=[width * first] + [width * rest] * (len(rows[0]) - 1), hAlign="LEFT")
    if not contents:
        whole = (0, 0), (-1, -1)
        lines = [("LINEBELOW", (0, 0), (-1, 0), 0.8, colors.black), ("LINEBELOW", *whole, 0.2, colors.grey)]
        space = [("VALIGN", *whole, "TOP"), ("TOPPADDING", *whole, 1), ("BOTTOMPADDING", *whole, 4)]
        table.setStyle(TableStyle([*lines, *space]))
    return table


def build_handbook() -> None:
    flow: list[object] = []
    labels: list[str] = []
    for lines in read_blocks(SOURCE / "fr12-handbook.md"):
        if lines[0].startswith("%page "):
            if labels:
                flow.append(PageBreak())
            labels.append(lines.pop(0).split()[1])
        if not lines:
            continue
        if lines[0].startswith("%cover "):
            flow.append(Spacer(1, 60 * mm))
            flow += [Paragraph(line, COVER) for line in lines[0][7:].split("|")]
        elif match := re.match(r"(#+) (.*)", lines[0]):
            heading = Paragraph(match[2], HEADINGS[len(match[1])])
            if match[2] != "Contents":
                heading.outline_level = len(match[1]) - 1
            flow.append(heading)
        elif lines[0].startswith("|"):
            flow += [make_table(table_rows(lines), contents=labels[-1] == "iii"), Spacer(1, 8)]
        elif re.match(r"\d+\. ", lines[0]):
            flow += [Paragraph(line, ITEM) for line in lines]
        else:
            flow.append(Paragraph(" ".join(lines), BODY))
    Handbook(DOCUMENTS / "fr12-handbook.pdf", labels).build(flow)


def fill_table(table: DocxTable, rows: list[list[str]]) -> None:
    table.style = "Light Grid Accent 1"
    for row, cells in zip(table.rows, rows, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text


def build_policy() -> None:
    document = docx.Document()
    document.core_properties.title = "Travel and Expenses Policy"
    document.core_properties.author = "Halvard & Lind Surveyors"
    document.core_properties.created = document.core_properties.modified = datetime.datetime(2024, 1, 1)
    for lines in read_blocks(SOURCE / "travel-policy.md"):
        if lines[0].startswith("%title "):
            document.add_heading(lines.pop(0)[7:], level=0)
        if match := re.match(r"(#+) (.*)", lines[0]):
            document.add_heading(match[2], level=len(match[1]))
        elif lines[0].startswith("|"):
            rows = table_rows(lines)
            fill_table(document.add_table(len(rows), len(rows[0])), rows)
        elif lines[0].startswith("- "):
            for line in lines:
                document.add_paragraph(line[2:], style="List Bullet")
        else:
            document.add_paragraph(" ".join(lines))
    packed = io.BytesIO()
    document.save(packed)
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(DOCUMENTS / "travel-policy.docx", "w") as target:
        for name in source.namelist():  # again, with a fixed time
            target.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), source.read(name), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    DOCUMENTS.mkdir(exist_ok=True)
    build_handbook()
    build_policy()
