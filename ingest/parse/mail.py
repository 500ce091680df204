"""E-mail (.eml, .mbox): subject as heading, sender, recipients and date, the text, then the attachments.

Attached documents are parsed like uploads; images are only named.
"""

import email
import re
from collections.abc import Iterator
from email import policy
from email.message import EmailMessage

from ingest.parse import ParseError
from ingest.parse.blocks import BlockWriter
from ingest.parse.html import parse_html
from ingest.parse.members import Members
from ingest.parse.text import read_text
from ingest.parse.unpack import Budget
from ingest.sniff import EML, MBOX
from retrieval.parsed import ParsedDocument

_HEADERS = ("From", "To", "Cc", "Date")
_MAX_DEPTH = 8  # of nested messages
_MAX_PARTS = 1_000
_MAX_MESSAGES = 20_000
_MBOX_START = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\n\r\n))From [^\n]*\n")
_MBOX_QUOTED = re.compile(rb"^>(?=>*From )", re.M)


def parse_mail(data: bytes, max_pages: int = 20_000, depth: int = 0) -> ParsedDocument:
    """Read one message. Raises ParseError broken_eml, zip_bomb."""
    return _parse_messages([data], EML, Members(Budget(len(data)), max_pages, depth))


def parse_mailbox(data: bytes, max_pages: int = 20_000, depth: int = 0) -> ParsedDocument:
    """Read all messages of a mailbox in the mbox format. Raises ParseError broken_eml, zip_bomb, too_many_pages.

    Source: RFC 4155, appendix A; a quoted ">From " is unquoted (mboxrd).
    """
    starts = [match.span() for match in _MBOX_START.finditer(data)] or [(0, 0)]
    if len(starts) > _MAX_MESSAGES:
        raise ParseError("too_many_pages", f"{len(starts)} messages are over the limit of {_MAX_MESSAGES}; split it")
    ends = [start for start, _ in starts[1:]] + [len(data)]
    messages = [_MBOX_QUOTED.sub(b"", data[start:end]) for (_, start), end in zip(starts, ends, strict=True)]
    return _parse_messages(messages, MBOX, Members(Budget(len(data)), max_pages, depth))


def _parse_messages(messages: list[bytes], media_type: str, members: Members) -> ParsedDocument:
    try:
        writer = BlockWriter()
        for data in messages:
            _write_message(writer, email.message_from_bytes(data, policy=policy.default), 1, members)
        parsed = writer.finish(media_type)
        return parsed._replace(unread=members.unread())
    except (ParseError, MemoryError):
        raise
    except Exception as error:  # the email package and its codecs fail in many ways on bad input
        raise ParseError(
            "broken_eml",
            f"the message is damaged ({type(error).__name__}: {str(error)[:200]}); save it again from the mail program",
        ) from error


def _write_message(writer: BlockWriter, message: EmailMessage, depth: int, members: Members) -> None:
    writer.end_block()
    writer.add(_header(message, "Subject") or "(no subject)")
    writer.end_heading(depth)
    for name in _HEADERS:
        if value := _header(message, name):
            writer.add_line(f"{name}: {value}")
    writer.end_block()
    body = message.get_body(preferencelist=("plain", "html"))
    if body is not None:
        _write_text(writer, body, members)
    for number, part in enumerate(_attachments(message, body)):
        if number == _MAX_PARTS:
            raise ParseError("too_many_pages", f"the message has over {_MAX_PARTS} attachments; upload them separately")
        _write_attachment(writer, part, depth + 1, members)


def _header(message: EmailMessage, name: str) -> str:
    """The decoded value of a header, or the raw value if it cannot be decoded."""
    try:
        value = str(message.get(name, ""))
    except Exception:  # headers are parsed on access, with all kinds of errors
        value = next((str(raw) for key, raw in message.raw_items() if key.lower() == name.lower()), "")
    return " ".join(value.split())


def _attachments(message: EmailMessage, body: EmailMessage | None) -> Iterator[EmailMessage]:
    """The parts other than the body and its alternatives, without descending into attached messages."""
    if message is body:
        return
    if not message.is_multipart() or message.get_content_type() == "message/rfc822":
        yield message
        return
    for part in message.iter_parts():
        is_version = message.get_content_type() == "multipart/alternative" and not part.is_multipart()
        if not is_version:
            yield from _attachments(part, body)


def _write_attachment(writer: BlockWriter, part: EmailMessage, depth: int, members: Members) -> None:
    name = " ".join((part.get_filename() or "").split())
    if part.get_content_type() == "message/rfc822" and depth <= _MAX_DEPTH:
        inner = part.get_payload(0)
        writer.end_block()
        writer.add_line(f"Attachment: {name or 'message'}")
        _write_message(writer, inner, depth, members)
        return
    if not name and part.get_content_maintype() != "text":
        return  # inline images, signatures
    writer.end_block()
    writer.add(f"Attachment: {name or 'text'}")
    writer.end_heading(depth)
    if part.get_content_maintype() == "text":
        _write_text(writer, part, members)
    elif part.get_content_maintype() != "image" and (data := part.get_payload(decode=True)):
        members.write(writer, name, data, depth, is_titled=True)


def _write_text(writer: BlockWriter, part: EmailMessage, members: Members) -> None:
    data = part.get_payload(decode=True) or b""
    try:
        if part.get_content_type() == "text/html":
            parsed = parse_html(data)
            text = parsed.text
            if parsed.unread:
                members.skip("the text of a message", parsed.unread)
        else:
            text = read_text(data, part.get_content_charset())
    except ParseError as error:
        if error.code not in {"empty_document", "undecodable_text"}:
            raise
        return
    for paragraph in text.split("\n\n"):
        writer.add(paragraph, keep_space=True)
        writer.end_block()
