"""Turns one documentation file (HTML, text, info, man, POD, DocBook, dictionary, game script) into blocks of prose.

Handles formats only; `corpora.py` decides what is kept. Start at `extract_file`.
"""

import gzip
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lxml import etree, html


class Block(NamedTuple):
    """A paragraph, heading, list item, table row or code sample; `kind` is one of p, h, li, row, code."""

    kind: str
    text: str


_SPACE = re.compile(r"\s+")
_SKIP_TAGS = frozenset(
    (
        "script",
        "style",
        "nav",
        "header",
        "footer",
        "aside",
        "form",
        "button",
        "select",
        "svg",
        "math",
        "noscript",
        "iframe",
        "object",
    )
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "caption", "title"))
_ITEMS = frozenset(("li", "dd", "dt"))
_BREAKS = frozenset(
    (
        "p",
        "div",
        "section",
        "article",
        "body",
        "main",
        "blockquote",
        "table",
        "tbody",
        "thead",
        "tr",
        "ul",
        "ol",
        "dl",
        "center",
        "td",
        "th",
        "html",
        "figure",
        "figcaption",
        "address",
        "fieldset",
        "hr",
    )
)
_CHROME = re.compile(
    r"nav|toc\b|\btoc|contents|sidebar|footer|header(?!link)|breadcrumb|related|copyright|search|menu|banner|"
    r"headerlink|legal|index|skip|pilcrow|memproto|memitem|summary-nav|edit-this",
    re.IGNORECASE,
)
_KEEP = re.compile(r"index-(?:entry|body)|header-?(?:content|text)", re.IGNORECASE)


def extract_file(path: Path) -> tuple[str, list[Block]]:
    """Title and blocks of one file, by its name; ("", []) if the format is not supported or there is no text."""
    name = path.name.removesuffix(".gz").removesuffix(".dz").lower()
    data = _read(path)
    if name.endswith((".html", ".htm", ".xhtml")):
        return _from_html(data)
    if "/man/man" in str(path):
        return _from_man(data)
    if name.endswith((".docbook", ".page", ".dbk", ".xml")):
        return _from_docbook(data)
    text = _decode(data)
    if name.endswith(".pod") or (name.endswith(".pm") and "\n=head1" in text):
        return _from_pod(text)
    if name.endswith(".dict"):
        return "", list(_dictionary_entries(text))
    if "/games/fortunes/" in str(path):
        return name, [Block("p", _tidy(quote)) for quote in text.split("\n%\n")]
    if name.endswith((".cfg", ".lua")) or "/endless-sky/data/" in str(path):
        return name, list(_script_strings(text))
    if name.endswith(".rdb"):
        return "", list(_plain_paragraphs(_strings_of_rdb(data)))
    if ".info" in name:
        text = re.sub(r"\x1f\n[^\n]*\n|^\* [^\n]*::[^\n]*\n", "\n", text, flags=re.MULTILINE)
    return "", list(_plain_paragraphs(text))


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _tidy(text: str) -> str:
    return _SPACE.sub(" ", text.replace("\xad", "").replace("\u200b", "").replace("¶", "")).strip()


def _from_html(data: bytes) -> tuple[str, list[Block]]:
    if not data.strip():
        return "", []
    encoding = "utf-8" if re.search(rb"charset=[\"']?utf-8", data[:2000], re.IGNORECASE) or _is_utf8(data) else None
    try:
        root = html.fromstring(data, parser=html.HTMLParser(encoding=encoding or "iso-8859-1"))
    except (etree.ParserError, ValueError):
        return "", []
    title = _tidy(root.findtext(".//title") or "")
    main = root.xpath('//*[@role="main"] | //main | //div[@class="body"] | //div[@id="content"]')
    walker = _HtmlWalker()
    walker.walk(main[0] if main else (root.find("body") if root.find("body") is not None else root))
    walker.flush("p")
    return title, walker.blocks


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class _HtmlWalker:
    """Collects blocks while it walks the tree; inline text gathers in `_inline` until a block boundary."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._inline: list[str] = []

    def flush(self, kind: str) -> None:
        text = _tidy("".join(self._inline))
        self._inline = []
        if text:
            self.blocks.append(Block(kind, text))

    def walk(self, node: html.HtmlElement, kind: str = "p", depth: int = 0) -> None:
        tag = node.tag if isinstance(node.tag, str) else ""
        if not tag or tag in _SKIP_TAGS or depth > 60 or _is_chrome(node):
            return
        if tag in ("pre", "textarea"):
            self.flush(kind)
            self.blocks.append(Block("code", node.text_content().strip("\n")))
        elif tag == "tr":
            self.flush(kind)
            cells = [_tidy(cell.text_content()) for cell in node if cell.tag in ("td", "th")]
            if sum(len(cell) for cell in cells) > 600 or len(cells) < 2:
                self._children(node, "p", depth)
                self.flush("p")
            elif any(cells):
                self.blocks.append(Block("row", " | ".join(cells)))
        elif tag in _HEADINGS or tag in _ITEMS or tag in _BREAKS:
            inner = "h" if tag in _HEADINGS else "li" if tag in _ITEMS else kind if tag in ("p", "div") else "p"
            self.flush(kind)
            self._children(node, inner, depth)
            self.flush(inner)
        elif tag == "br":
            self._inline.append("\n")
        else:
            self._children(node, kind, depth)

    def _children(self, node: html.HtmlElement, kind: str, depth: int) -> None:
        if node.text:
            self._inline.append(node.text)
        for child in node:
            self.walk(child, kind, depth + 1)
            if child.tail:
                self._inline.append(child.tail)


def _is_chrome(node: html.HtmlElement) -> bool:
    if node.tag not in ("div", "ul", "ol", "table", "p", "span", "a", "td", "section", "dl", "h1", "h2", "h3"):
        return False
    marks = f"{node.get('class', '')} {node.get('id', '') if node.tag in ('div', 'table', 'ul') else ''}"
    if node.tag in ("h1", "h2", "h3", "section", "p"):
        return bool(re.search(r"\b(?:navigation|toc|footer)\b", marks))
    return bool(_CHROME.search(marks)) and not _KEEP.search(marks)


def _from_man(data: bytes) -> tuple[str, list[Block]]:
    # mdoc and man both; groff knows them, -rLL keeps paragraphs on few lines, col-like backspaces are off with -P-c.
    shown = subprocess.run(
        ["groff", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=2000n", "-rHY=0", "-k"],
        input=data, capture_output=True, timeout=30, check=False,
    ).stdout.decode("utf-8", "replace")  # fmt: skip
    lines = shown.replace("\u2010", "-").splitlines()
    title = lines[0].split()[0] if lines and lines[0].split() else ""
    return title, list(_plain_paragraphs("\n".join(lines[1:-1]), unwrapped=True))


def _from_docbook(data: bytes) -> tuple[str, list[Block]]:
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=False)
    root = etree.fromstring(data, parser)
    if root is None:
        return "", []
    blocks, title = [], ""
    for node in root.iter():
        tag = node.tag.rsplit("}", 1)[-1] if isinstance(node.tag, str) else ""
        if tag in ("title", "para", "simpara", "p", "term", "programlisting", "screen", "code"):
            text = "".join(node.itertext())
            kind = {"title": "h", "term": "h", "programlisting": "code", "screen": "code"}.get(tag, "p")
            if tag == "code" and node.getparent() is not None and "\n" not in text:
                continue
            text = text.strip("\n") if kind == "code" else _tidy(text)
            title = title or (text if kind == "h" else "")
            blocks.append(Block(kind, text))
    return title, blocks


def _from_pod(text: str) -> tuple[str, list[Block]]:
    text = re.sub(r"[IBCLEFSXZ]<<+ (.*?) >>+|[IBCFSXZ]<([^<>]*)>", lambda m: m[1] or m[2] or "", text)
    text = re.sub(r"L<(?:[^|<>]*\|)?([^<>]*)>", r"\1", text).replace("E<gt>", ">").replace("E<lt>", "<")
    blocks = []
    for piece in re.split(r"\n\s*\n", text[max(0, text.find("=")) :]):
        head = re.match(r"=(head\d|item)\s+(.*)", piece, re.DOTALL)
        if head:
            blocks.append(Block("h", _tidy(head[2])))
        elif piece.startswith(("=", "#")):
            continue
        elif piece.startswith((" ", "\t")):
            blocks.append(Block("code", piece.strip("\n")))
        else:
            blocks.append(Block("p", _tidy(piece)))
    return "", blocks


_BULLET = re.compile(r"^\s*(?:[-*+o•·]|\d{1,2}[.)])\s+")
_UNDERLINE = re.compile(r"^\s*([-=*~^#_.])\1{2,}\s*$")


def _plain_paragraphs(text: str, unwrapped: bool = False) -> Iterator[Block]:
    """Blocks of plain text: blank lines separate paragraphs, an underlined or all-capital line is a heading."""
    for piece in re.split(r"\n[ \t]*\n+|\f", text.replace("\r", "")):
        lines = [line for line in piece.split("\n") if line.strip()]
        if not lines:
            continue
        if len(lines) > 1 and _UNDERLINE.match(lines[1]):
            yield Block("h", _tidy(lines[0]))
            lines = lines[2:]
        elif unwrapped and not lines[0].startswith(" ") and len(lines[0]) < 80:
            yield Block("h", _tidy(lines[0]))
            lines = lines[1:]
        if lines:
            yield from _paragraph(lines)


def _paragraph(lines: list[str]) -> Iterator[Block]:
    if _looks_like_code(lines):
        yield Block("code", "\n".join(lines))
        return
    starts = [i for i, line in enumerate(lines) if i == 0 or _BULLET.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        first = lines[start]
        kind = "li" if _BULLET.match(first) else "p"
        joined = "\n".join([_BULLET.sub("", first) if kind == "li" else first, *lines[start + 1 : end]])
        text = _tidy(re.sub(r"(?<=[a-z])-\n\s*(?=[a-z])", "", joined))
        yield Block("h" if kind == "p" and len(lines) == 1 and text.isupper() and len(text) < 80 else kind, text)


def _looks_like_code(lines: list[str]) -> bool:
    joined = " ".join(lines)
    odd = sum(joined.count(c) for c in "{}[]<>|=;$\\_/#@&*~") / max(1, len(joined))
    gaps = sum(bool(re.search(r"\S {3,}\S|\t\S", line.strip())) for line in lines)
    return odd > 0.06 or (len(lines) > 1 and gaps > 0.5 * len(lines))


def _dictionary_entries(text: str) -> Iterator[Block]:
    """One block per entry of a dict(1) database: headwords start in column 0, the body is indented."""
    for entry in re.split(r"\n(?=\S)", text):
        if not entry.startswith("00-database"):
            yield Block("p", _tidy(re.sub(r"[{}\\]", "", entry)))


_CHARSXP = re.compile(rb"\x00[\x00-\x0f]\x00\x09(\x00\x00[\x00-\x07].)", re.DOTALL)
_SCRIPT_STRING = re.compile(
    r"`([^`\n]{20,})`"
    r'|(?:description|message|story|text|caption|note|_)\s*=?\s*_?\s*"((?:[^"]|""){20,})"'
)


def _script_strings(text: str) -> Iterator[Block]:
    """The narrative text of game scripts (Endless Sky back quotes, Wesnoth strings), joined to paragraphs."""
    told: list[str] = []
    for match in _SCRIPT_STRING.finditer(text):
        line = match[1] or re.sub(r"<[^<>]{1,40}>|\{[^{}]{1,40}\}", "", match[2]).replace('""', '"')
        told.append(_tidy(line))
        if sum(map(len, told)) > 400:
            yield Block("p", "\n".join(told))
            told = []
    if told:
        yield Block("p", "\n".join(told))


def _strings_of_rdb(data: bytes) -> str:
    """Character strings of an R lazy-load database, in order, one per line. Source: R Internals, 1.8 Serialization."""
    found, at = [], 0
    while (at := data.find(b"\x78", at)) >= 0:
        unpack = zlib.decompressobj()
        try:
            raw = unpack.decompress(data[at:])
        except zlib.error:
            at += 1
            continue
        at = len(data) - len(unpack.unused_data)
        place = 0
        while match := _CHARSXP.search(raw, place):
            place = match.end() + int.from_bytes(match[1], "big")
            found.append(raw[match.end() : place].decode("utf-8", "replace"))
    return "\n".join(found)
