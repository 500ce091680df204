"""JSON, JSON lines and e-mail."""

import io
import json
import mailbox
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child
from ingest.parse.json_values import MEDIA_TYPE as JSON
from ingest.parse.json_values import parse_json
from ingest.parse.mail import parse_mail, parse_mailbox
from ingest.sniff import EML, MBOX, TEXT, sniff_media_type


def test_json_paths_are_readable_and_values_as_written():
    data = """{"name": "Pump", "price": 1.10, "on": true, "tags": ["a", "b"], "none": null, "empty": {},
      "server": {"port": 8080, "tls": {"cert": "/etc/x"}, "hosts": [{"ip": "::1"}]},
      "orders": [{"id": 12345678901234567890, "who": {"city": "Oslo"}}, {"id": 2, "note": "two\\nlines"}, 7, [8, 9]]}"""
    parsed = parse_json(data.encode())
    assert parsed.text == (
        "name: Pump\nprice: 1.10\non: true\ntags: a, b\nnone: null\n\n"
        "server\n\nserver.port: 8080\nserver.tls.cert: /etc/x\nserver.hosts[0].ip: ::1\n\n"
        "orders\n\nid: 12345678901234567890 | who.city: Oslo\n\nid: 2 | note: two lines\n\norders: 7\n\norders: 8, 9"
    )
    assert [(h.level, h.title, parsed.text[h.char_start :][: len(h.title)]) for h in parsed.headings] == [
        (1, "server", "server"),
        (1, "orders", "orders"),
    ]


def test_json_lines_are_records_and_a_broken_one_is_kept(tmp_path):
    (tmp_path / "x").write_bytes('{"a": "é", "b": 1}\n\n{"a": \n{"a": "z"}\n'.encode("utf-16"))
    assert parse_in_child(tmp_path / "x", JSON).text == 'a: é | b: 1\n\n{"a":\n\na: z'


def test_long_json_records_get_a_line_a_value():
    text = parse_json(json.dumps([{"a": "x " * 300, "b": 1}]).encode()).text
    assert text.split("\n")[1] == "b: 1"


@pytest.mark.parametrize("data", ['{"a": 1,}', "// note\n{}", "[" * 100_000, "{'a': 1}\n{'b': 2}", ""])
def test_what_is_no_json_stays_text(data):
    assert parse_json(data.encode()).text == data


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.integers() | st.text("abc", min_size=1),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("xyz", min_size=1), inner),
    )
)
def test_no_json_value_is_lost(value):
    text = parse_json(json.dumps(value).encode()).text
    for letter in "abc":
        assert text.count(letter) == json.dumps(value).count(letter)


def make_mail() -> EmailMessage:
    mail = EmailMessage()
    mail["From"] = "Zoë <zoe@example.org>"
    mail["To"] = "team@example.org"
    mail["Subject"] = "Größe of the pump"
    mail["Date"] = "Tue, 21 May 2024 10:00:00 +0200"
    mail.set_content("Hello,\n\nit is 5 µm.\n", charset="iso-8859-1")
    return mail


def test_mail_has_headers_text_and_attachments(tmp_path):
    mail = make_mail()
    mail.add_alternative("<p>it is <b>html</b></p>", subtype="html")
    mail.add_attachment("a,b\n1,2\n", subtype="csv", filename="größe.csv")
    mail.add_attachment(b"\x89PNG", maintype="image", subtype="png", filename="photo.png")
    inner = EmailMessage()
    inner["From"], inner["Subject"] = "bob@example.org", "Older"
    inner.set_content("<h1>Top</h1><p>old text</p>", subtype="html")
    mail.add_attachment(inner)
    (tmp_path / "x").write_bytes(mail.as_bytes())
    assert sniff_media_type(mail.as_bytes(), "x.txt") == EML
    parsed = parse_in_child(tmp_path / "x", EML)
    assert parsed.text == (
        "Größe of the pump\n\nFrom: Zoë <zoe@example.org>\nTo: team@example.org\nDate: Tue, 21 May 2024 10:00:00 +0200"
        "\n\nHello,\n\nit is 5 µm.\n\nAttachment: größe.csv\n\na,b\n1,2\n\nAttachment: photo.png\n\n"
        "Attachment: message\n\nOlder\n\nFrom: bob@example.org\n\nTop\n\nold text"
    )
    assert [(h.level, h.title) for h in parsed.headings] == [
        (1, "Größe of the pump"),
        (2, "Attachment: größe.csv"),
        (2, "Attachment: photo.png"),
        (2, "Older"),
    ]


def test_mail_with_only_html_is_read_as_html():
    mail = make_mail()
    mail.set_content("<p>one</p><script>no</script><p>two</p>", subtype="html")
    parsed = parse_mail(mail.as_bytes())
    assert parsed.text.endswith("+0200\n\none\n\ntwo") and parsed.unread is None


def test_mail_with_html_that_is_nested_too_deeply_says_what_is_missing():
    mail = make_mail()
    mail.set_content("<p>one</p>" + "<div>" * 20_000 + "two", subtype="html")
    parsed = parse_mail(mail.as_bytes())
    assert parsed.text.endswith("+0200\n\none")
    assert "the text of a message (the page nests more than 2,048 elements" in parsed.unread


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        (make_mail().as_bytes(), "x", EML),
        (b"From: a@b\nSubject: x\n\ntext", "x.eml", EML),
        (b"From: a@b\nSubject: x\n\ntext", "x.txt", TEXT),
        (b"Note: this\n\nis text", "x.eml", TEXT),
        (b"From: a\nDate: b\nand then prose\n\n", "x", TEXT),
    ],
)
def test_mail_is_known_by_its_headers(data, name, expected):
    assert sniff_media_type(data, name) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"From: a@b\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/plain\n\nnever ended",
        b"From: =?utf-8?b?//8?= <\nDate: none\nSubject: =?x-no?q?a?=\nContent-Type: text/plain; charset=no\n\nw\xe9ll",
        b"From: a@b\nContent-Transfer-Encoding: base64\n\n%%%not base64",
        b"From: a@b\nContent-Type: multipart/mixed\n\nno boundary",
    ],
)
def test_damaged_mail_is_read_as_far_as_it_goes(data):
    assert parse_mail(data).text


def test_messages_within_messages_end_somewhere():
    mail = make_mail()
    for _ in range(20):
        outer = make_mail()
        outer.add_attachment(mail)
        mail = outer
    assert max(heading.level for heading in parse_mail(mail.as_bytes()).headings) <= 10


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=120),
    st.sampled_from(["text/plain", "text/html", "multipart/mixed; boundary=b", "message/rfc822"]),
)
def test_any_body_gives_text_or_one_error(body, kind):
    try:
        assert parse_mail(b"Subject: s\nContent-Type: " + kind.encode() + b"\n\n" + body).text
    except ParseError as error:
        assert error.code


def test_an_empty_json_value_is_an_empty_document(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ParseError) as caught:
        parse_file(tmp_path / "x", JSON)
    assert caught.value.code == "empty_document"


def test_attached_documents_are_parsed_and_what_is_not_is_named(tmp_path):
    mail = make_mail()
    handbook = (Path(__file__).parents[2] / "samples" / "documents" / "fr12-handbook.pdf").read_bytes()
    mail.add_attachment(handbook, maintype="application", subtype="octet-stream", filename="handbook")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("notes/a.md", "# Alpha\n\nzipped words")
    mail.add_attachment(packed.getvalue(), maintype="application", subtype="zip", filename="notes.zip")
    mail.add_attachment(b"\x7fELF\0\0", maintype="application", subtype="octet-stream", filename="tool")
    (tmp_path / "x").write_bytes(mail.as_bytes())
    parsed = parse_in_child(tmp_path / "x", EML)
    assert "Attachment: handbook\n\n" in parsed.text and "FR-12 automatic weather station" in parsed.text
    assert "Attachment: notes.zip\n\nnotes.zip/notes/a.md\n\n# Alpha\n\nzipped words" in parsed.text
    assert parsed.unread.startswith("1 of 3 files were not read or not wholly: tool (this looks like a program")
    titles = [heading.title for heading in parsed.headings]
    assert titles[:2] == ["Größe of the pump", "Attachment: handbook"] and titles[-2:] == ["Alpha", "Attachment: tool"]


def test_a_mailbox_is_its_messages(tmp_path):
    mails = [make_mail() for _ in range(3)]
    mails[1].replace_header("Subject", "Second")
    mails[1].set_content("one\n\nFrom here on it is text\n>From quoted\n")
    mails[2].add_attachment(b"a,b\n1,2\n", maintype="application", subtype="x", filename="a.csv")
    path = tmp_path / "box"
    box = mailbox.mbox(path)
    for mail in mails:
        box.add(mailbox.mboxMessage(mail))
    box.close()
    data = path.read_bytes()
    assert sniff_media_type(data, "Inbox") == sniff_media_type(data, "x.eml") == MBOX
    parsed = parse_in_child(path, MBOX)
    assert [h.title for h in parsed.headings if h.level == 1] == ["Größe of the pump", "Second", "Größe of the pump"]
    assert "one\n\nFrom here on it is text\nFrom quoted" in parsed.text
    assert parsed.text.endswith("Attachment: a.csv\n\na | b\na: 1 | b: 2")
    assert (parsed.media_type, parsed.unread) == (MBOX, None)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([b"From a@b Mon\n", b"\n", b"Subject: x\n", b"\r\n", b"From ", b"text\n", b">From x\n"]))
)
def test_any_mailbox_gives_text_or_one_error(lines):
    try:
        assert parse_mailbox(b"From a@b Mon\n" + b"".join(lines)).text
    except ParseError as error:
        assert error.code
