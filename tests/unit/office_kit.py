"""Office files for tests: zip archives, the relations of their parts, and the sections that were read of them."""

import zipfile
from pathlib import Path

from retrieval.types import ParsedDocument

RELS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE_RELS = "http://schemas.openxmlformats.org/package/2006/relationships"


def write_zip(path: Path, members: dict[str, str | bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_STORED if name == "mimetype" else None)


def sections(parsed: ParsedDocument) -> list[tuple[int, str]]:
    for heading in parsed.headings:
        assert parsed.text.startswith(heading.title, heading.char_start)
    return [(heading.level, heading.title) for heading in parsed.headings]


def relations(*targets: tuple[str, str, str]) -> str:
    items = "".join(f'<Relationship Id="{i}" Type="{RELS}/{kind}" Target="{to}"/>' for i, kind, to in targets)
    return f'<Relationships xmlns="{PACKAGE_RELS}">{items}</Relationships>'
