"""Holds README and docs to the code: every setting, file, command, link and result they name exists.

`python tests/unit/test_docs.py` rewrites the table of settings in docs/operations.md.
"""

import re
from pathlib import Path

import pytest

from app import cli
from app.settings import describe_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OPERATIONS = ROOT / "docs" / "operations.md"
TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)
MADE_AT_RUN_TIME = ("audit/", "build/", "data/", "files/", "faiss/", "words/")


def settings_table() -> str:
    rows = ["| setting | default | unit or values | what it does |", "| --- | --- | --- | --- |"]
    for setting in describe_settings():
        unit = setting.unit.replace("|", "or")
        rows.append(f"| `{setting.name}` | `{setting.default}` | {unit} | {setting.description} |")
    return "\n".join(rows) + "\n"


def named_files(text: str) -> set[str]:
    """Paths of this repository in backticks: with a slash and without a blank, a glob or a placeholder."""
    spans = re.findall(r"`([^`\n]+)`", text)
    pattern = re.compile(r"\.?[a-z0-9_-]+(/[A-Za-z0-9_.-]+)*/([A-Za-z0-9_-]+\.[a-z0-9]+)?")
    return {span for span in spans if pattern.fullmatch(span) and not span.startswith(MADE_AT_RUN_TIME)}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_operations_lists_every_setting():
    found = TABLE.search(OPERATIONS.read_text())
    assert found, "docs/operations.md has lost the marks around its table of settings"
    assert found[0] == settings_table(), "run: python tests/unit/test_docs.py"


def test_settings_named_anywhere_exist(page):
    known = {setting.name for setting in describe_settings()}
    named = set(re.findall(r"JAMBA_RAG_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
    assert named <= known


@pytest.mark.parametrize("name", ["Dockerfile", "docker-compose.yml"])
def test_settings_of_the_images_exist(name):
    known = {setting.name for setting in describe_settings()}
    assert set(re.findall(r"JAMBA_RAG_[A-Z0-9_]*[A-Z0-9]", (ROOT / name).read_text())) <= known


def test_files_named_exist(page):
    missing = {name for name in named_files(page.read_text()) if not (ROOT / name).exists()}
    assert not missing


def test_files_named_in_the_code_exist():
    pattern = re.compile(
        r"\b(?:app|bench|docs|ingest|model|retrieval|samples|tests)/[\w./-]+\.(?:md|py|json|txt|c|h)\b"
    )
    code = [
        path
        for room in ("app", "bench", "ingest", "model", "retrieval", "tests")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    named = {name for path in code for name in pattern.findall(path.read_text())}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_make_targets_named_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets


def test_commands_named_exist(page):
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert set(re.findall(r"(?<![/\w])jamba-rag ([a-z]+)\b", page.read_text())) <= known


def test_options_of_benchmarks_exist(page):
    for name, options in re.findall(r"`python -m bench\.(\w+)\b([^`]*)`", page.read_text()):
        code = (ROOT / "bench" / f"{name}.py").read_text()
        assert [option for option in re.findall(r"--[a-z0-9-]+", options) if f'"{option}"' not in code] == [], name


if __name__ == "__main__":
    OPERATIONS.write_text(TABLE.sub(lambda _: settings_table(), OPERATIONS.read_text()))
