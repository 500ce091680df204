"""EPUB: the chapters in reading order, parsed as HTML; a chapter without heading gets its title from the contents."""

from lxml import etree

from ingest.parse import ParseError, Report, Source
from ingest.parse.archive import Package, open_package, resolve
from ingest.parse.decode import normalize_text
from ingest.parse.html import parse_html
from retrieval.parsed import Heading, ParsedDocument

MEDIA_TYPE = "application/epub+zip"
_GAP = "\n\n"
_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_HTML_TYPES = frozenset({"application/xhtml+xml", "text/html"})


def parse_epub(source: Source, *, report: Report) -> ParsedDocument:
    """Read the book's main text. Raises ParseError broken_epub, encrypted_epub, zip_bomb."""
    with open_package(source, "epub", "EPUB book") as package:
        opf = _package_document(package)
        root = package.xml(opf)
        items = {item.get("id", ""): item for item in root.iterfind("./{*}manifest/{*}item")}
        chapters = _reading_order(root, items, opf)
        if set(chapters) & _encrypted(package):
            raise ParseError("encrypted_epub", "the book is protected against copying; upload one without protection")
        if chapters and not any(chapter in package for chapter in chapters):
            raise ValueError("none of its chapters is in the file")
        names = _contents(package, items, opf)
        texts: list[str] = []
        headings: list[Heading] = []
        unread: list[str] = []
        length = 0
        for number, chapter in enumerate(chapters, 1):
            if chapter not in package:
                unread.append(f"{chapter} is named in the book, but not in the file")
                continue
            parsed = _read_chapter(package, chapter, names.get(chapter))
            if parsed is not None:
                length += len(_GAP) if texts else 0
                headings += (Heading(item.level, item.title, item.char_start + length) for item in parsed.headings)
                texts.append(parsed.text)
                length += len(parsed.text)
                unread += [f"in {names.get(chapter) or chapter}: {parsed.unread}"] if parsed.unread else []
            report(number, len(chapters))
        title = " ".join((root.findtext(f".//{_TITLE}") or "").split())
        return ParsedDocument(
            _GAP.join(texts), (), tuple(headings), title or None, MEDIA_TYPE, "; ".join(unread) or None
        )


def _package_document(package: Package) -> str:
    rootfile = package.xml("META-INF/container.xml").find(".//{*}rootfile")
    if rootfile is None:
        raise ValueError("META-INF/container.xml names no package document")
    return resolve("", rootfile.get("full-path", ""))


def _reading_order(root: etree._Element, items: dict[str, etree._Element], opf: str) -> list[str]:
    """Members of the spine, without duplicates and without the book's own table of contents."""
    chapters: dict[str, None] = {}
    for reference in root.iterfind("./{*}spine/{*}itemref"):
        item = items.get(reference.get("idref", ""))
        if item is None or item.get("media-type") not in _HTML_TYPES:
            continue
        if "nav" not in item.get("properties", "").split():
            chapters[resolve(opf, item.get("href", ""))] = None
    return list(chapters)


def _read_chapter(package: Package, member: str, name: str | None) -> ParsedDocument | None:
    """None for a chapter without text, such as a cover."""
    try:
        parsed = parse_html(package.read(member))
    except ParseError as error:
        if error.code == "empty_document":
            return None
        raise
    if not parsed.text.strip():
        return None
    if parsed.headings or not name:
        return parsed
    text = parsed.text if parsed.text.startswith(name) else f"{name}{_GAP}{parsed.text}"
    return ParsedDocument(text, (), (Heading(1, name, 0),), None, MEDIA_TYPE, parsed.unread)


def _contents(package: Package, items: dict[str, etree._Element], opf: str) -> dict[str, str]:
    """Member -> title of the first entry that links to it, from EPUB 3's nav or EPUB 2's NCX."""
    names: dict[str, str] = {}
    for item in items.values():
        member = resolve(opf, item.get("href", ""))
        is_nav = "nav" in item.get("properties", "").split()
        if member not in package or not (is_nav or item.get("media-type") == "application/x-dtbncx+xml"):
            continue
        root = package.xml(member)
        if is_nav:
            entries = [(link.get("href", ""), "".join(link.itertext())) for link in root.iter("{*}a")]
        else:
            entries = [
                (content.get("src", ""), point.findtext("./{*}navLabel/{*}text") or "")
                for point in root.iter("{*}navPoint")
                if (content := point.find("./{*}content")) is not None
            ]
        for target, name in entries:
            names.setdefault(resolve(member, target), normalize_text(" ".join(name.split())))
    return names


def _encrypted(package: Package) -> set[str]:
    if "META-INF/encryption.xml" not in package:
        return set()
    root = package.xml("META-INF/encryption.xml")
    return {resolve("", item.get("URI", "")) for item in root.iter("{*}CipherReference")}
