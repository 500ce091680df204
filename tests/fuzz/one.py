"""One format under libFuzzer: `python -m tests.fuzz.one FORMAT [libFuzzer's arguments]`. Start at __main__.py."""

import importlib
import pkgutil
import random
import sys

import atheris

with atheris.instrument_imports(include=["ingest"]):
    import ingest.parse

    for parser in pkgutil.iter_modules(ingest.parse.__path__, "ingest.parse."):
        importlib.import_module(parser.name)  # they are imported late otherwise, and not watched
    from tests.fuzz.mutate import damage_inside
    from tests.fuzz.target import FORMATS, check_parser


def main() -> None:
    name = sys.argv[1]
    itself = f"{sys.executable} -m tests.fuzz.one {name}"  # libFuzzer's way to call it again, through a shell

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = damage_inside(data, random.Random(seed), lambda part: atheris.Mutate(part, len(part) + 1024))
        return changed if len(changed) <= max_size else data

    atheris.Setup([itself, *sys.argv[2:]], lambda data: check_parser(FORMATS[name], data), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
