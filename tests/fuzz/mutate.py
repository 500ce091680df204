"""Damages a document. One that is packed is opened, damaged inside and packed again: damage to the outside of a ZIP
or GZIP is caught by its checksums and never reaches a parser."""

import io
import random
import zipfile
import zlib
from collections.abc import Callable

Damage = Callable[[bytes], bytes]
_MAX_MEMBER_BYTES = 1 << 20
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError)  # all that zipfile raises
_TOKENS = b'\0 \xff\xfe < > &#0; { } [ " \\u \r\n\r\n \xf0\x9f -1 1e999'.split(b" ")


def damage_inside(data: bytes, choice: random.Random, damage: Damage) -> bytes:
    """`damage` on one member of a ZIP, else, and one time in four, on the whole."""
    if data.startswith(b"PK") and choice.random() < 0.75:
        try:
            return _damage_member(data, choice, damage)
        except _DAMAGED:
            pass
    return damage(data)


def _damage_member(data: bytes, choice: random.Random, damage: Damage) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as target:
        infos = [info for info in archive.infolist() if info.file_size <= _MAX_MEMBER_BYTES]
        victim = choice.randrange(len(infos))
        for number, info in enumerate(infos):
            content = archive.read(info)
            if number == victim:
                content = damage(content)
            target.writestr(info.filename, content)
    return made.getvalue()


def random_damage(choice: random.Random) -> Damage:
    """A few random edits: bytes changed, cut out, repeated, moved, or replaced by what parsers find hard."""

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(choice.randint(1, 4)):
            start = choice.randrange(len(changed) + 1)
            end = min(len(changed), start + choice.choice((1, 2, 8, 64, 512)))
            match choice.randrange(5):
                case 0:
                    del changed[start:end]
                case 1:
                    changed[start:start] = changed[start:end] * choice.choice((1, 2, 50))
                case 2:
                    changed[start:end] = choice.randbytes(end - start)
                case 3:
                    changed[start:start] = choice.choice(_TOKENS)
                case 4:
                    place = choice.randrange(len(changed) + 1)
                    changed[place:place] = changed[start:end]
        return bytes(changed)

    return damage
