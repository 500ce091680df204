"""Holds the import rules of the rooms: `app -> ingest, retrieval, model`; `ingest -> retrieval`; nothing back."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "app": {"ingest", "retrieval", "model"},
    "ingest": {"retrieval"},
    "retrieval": set(),
    "model": set(),
}
OURS = {*ROOMS, "bench", "tests", "samples"}
SQL_FREE = ("app", "ingest", "model")


packages_of = cache(packages_distributions)


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it; relative imports stay in its own room."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    forbidden = OURS - ROOMS[room] - {room}
    found = {str(path.relative_to(ROOT)): imported(path) & forbidden for path in modules(room)}
    assert {path: names for path, names in found.items() if names} == {}


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml asks for, in lower case with dashes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return {re.split(r"[^\w.-]", one, maxsplit=1)[0].lower().replace("_", "-") for one in wanted}


@pytest.mark.parametrize(
    ("room", "extras"),
    [
        ("app", ()),
        ("ingest", ()),
        ("retrieval", ()),
        ("model", ()),
        ("model/train", ("train",)),
        ("tests", ("test", "fuzz")),
    ],
)
def test_every_package_imported_is_declared(room, extras):
    known, packages = declared(*extras), packages_of()
    kits = {path.stem for path in modules("tests")}
    paths = [path for path in modules(room) if room == "model/train" or "train" not in path.parts]
    names = set().union(*map(imported, paths)) - sys.stdlib_module_names - OURS - kits - {""}
    if room.startswith("model"):
        names -= {"triton", "cuda"}  # the CUDA builds of PyTorch bring it, and nothing else needs it
    unknown = [n for n in names if not known & {d.lower().replace("_", "-") for d in packages.get(n, [n])}]
    assert sorted(unknown) == []


@pytest.mark.parametrize("room", SQL_FREE)
def test_sql_stands_in_the_store_alone(room):
    allowed = {ROOT / "app" / "backup.py"}  # copies the file as it is, without a statement
    assert [path for path in modules(room) if "sqlite3" in imported(path) and path not in allowed] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_pickle_and_nothing_read_from_the_environment_outside_the_settings(room):
    allowed = {ROOT / "app" / "settings.py"}
    for path in modules(room):
        assert not imported(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        names = {n.attr for n in nodes(path) if isinstance(n, ast.Attribute)}
        if path not in allowed and "train" not in path.parts:
            assert not names & {"environ", "getenv"}, path


@pytest.mark.parametrize("room", sorted(OURS))
def test_files_and_functions_keep_to_their_size(room):
    for path in modules(room):
        assert len(path.read_text().splitlines()) <= 400, path
        limit = 120 if path.name.endswith("_triton.py") else 60  # a kernel is one function
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < limit, f"{path}: {node.name}"
