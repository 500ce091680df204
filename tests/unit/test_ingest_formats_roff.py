"""Man pages: text under its sections, whichever macros it is written in; what is not known is kept as text."""

import gzip
import time

import pytest

from ingest.parse import ParsedDocument, parse_bytes
from ingest.sniff import GZIP, MAN, sniff_media_type

PUMP = r""".\" A comment
'\" t
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.de Vb
.ft CW
..
.    if t .sp
.TH PUMP 8 "May 2024"
.SH NAME
pump \- move \fIwater\fR
.SH "EXIT STATUS"
.PP
It\*(Aqs zero \(em or
.BR one (1) ,
as \
always.
.TP
.B \-\-rate \fIN\fP
Litres a minute\c
; a whole
number.
.IP \(bu 2
Not negative.
.RS 4
.ie n \{\
\h'-04' 1.\h'+03'\c
.\}
.el \{\
.sp -1
.IP "  1." 4.2
.\}
First.
.RE
.SS "Its ""files\(dq" \" and no more
.nf
a {
    b;
}
.fi
.FANCY "kept as" text
.if t \{ dropped
dropped too
.\}
.TS
tab(:) box;
l l.
Name:Size
_
pump:T{
very large
T}
.TE
"""
PUMPD = r""".Dd May 1, 2024
.Dt PUMPD 8
.Os
.Sh NAME
.Nm pumpd
.Nd move water
.Sh SYNOPSIS
.Nm
.Op Fl fv
.Op Fl r Ar rate Ns Op , Ar rate
.Sh DESCRIPTION
.Nm ,
as
.Xr cron 8
calls it, says
.Dq done .
.Bl -tag -width Ds
.It Fl f
Stay in the foreground.
.El
"""


def read(source: str) -> ParsedDocument:
    assert sniff_media_type(source.encode(), "pump.8") == sniff_media_type(source.encode(), "pump.json") == MAN
    return parse_bytes(source.encode(), MAN)


def test_a_page_with_man_macros():
    parsed = read(PUMP)
    assert parsed.text == (
        "NAME\n\npump - move water\n\nEXIT STATUS\n\nIt's zero — or one(1), as always.\n\n"
        "--rate N\nLitres a minute; a whole number.\n\n• Not negative.\n\n1. First.\n\n"
        'Its "files"\n\na {\n    b;\n}\n\nkept as text\n\nName | Size\n\npump\nvery large'
    )
    assert [(h.level, h.title) for h in parsed.headings] == [(1, "NAME"), (1, "EXIT STATUS"), (2, 'Its "files"')]
    assert all(parsed.text[h.char_start :].startswith(h.title) for h in parsed.headings)
    assert (parsed.title, parsed.media_type) == ("pump(8)", MAN)


def test_a_page_with_mdoc_macros():
    parsed = read(PUMPD)
    assert parsed.text == (
        "NAME\n\npumpd – move water\n\nSYNOPSIS\n\npumpd [-fv] [-r rate[, rate]]\n\n"
        "DESCRIPTION\n\npumpd, as cron(8) calls it, says “done”.\n\n-f Stay in the foreground."
    )
    assert (parsed.title, len(parsed.headings)) == ("pumpd(8)", 3)


def test_a_packed_page_is_its_text_under_its_name():
    packed = gzip.compress(PUMPD.encode())
    assert sniff_media_type(packed, "pumpd.8.gz") == GZIP
    parsed = parse_bytes(packed, GZIP)
    assert "says “done”." in parsed.text and [h.title for h in parsed.headings][-1] == "DESCRIPTION"


@pytest.mark.parametrize(
    "text", [".TH the only macro", ".SH NAME\npump", "1 .TH X 1\n.SH NAME", ".css { }\n.Shadow { }"]
)
def test_text_that_begins_with_a_dot_is_no_page(text):
    assert sniff_media_type(text.encode(), "x") == "text/plain"


@pytest.mark.parametrize(
    "line",
    [
        ".if n " * 9000 + "x",
        *("\n".join(f".ds a {text}" for _ in range(99)) for text in (r"\*a\*a.", r"\*[a]\*[a].")),
        *(".TH a", ".TH", ".Dt", ".ds", ".Nm", ".Op Fl", ".if", ".ie", ".el", ".IP", ".It", ".Xr", ".\\", "'", ".ig"),
        *(r"\[u110000]", r"\f", r"\*", r"\(", ".tab(" * 9000, '.B "' + '""' * 9000, ".if t \\{", r"\s'", ".TS", ".}"),
        r".\}\}\}",
    ],
)  # fmt: skip
def test_nothing_in_a_page_makes_it_unreadable_or_slow(line):
    start = time.perf_counter()
    parse_bytes(f".TH A 1\n.SH NAME\npump\n{line}\n.TH A 1\n".encode(), MAN)
    assert time.perf_counter() - start < 5
