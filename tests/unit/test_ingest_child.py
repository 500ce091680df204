import os
from pathlib import Path

import pytest

from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child, run_in_child
from ingest.parse.child import ParseLimits

SAMPLES = Path(__file__).parents[2] / "samples" / "documents"
HANDBOOK = SAMPLES / "fr12-handbook.pdf"


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def code_of(path: Path, media_type: str, limits: ParseLimits) -> tuple[str, bool]:
    before = children()
    with pytest.raises(ParseError) as caught:
        parse_in_child(path, media_type, limits)
    assert children() == before  # nothing is left running
    return caught.value.code, caught.value.retryable


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_text("words and more words\n" * 1000)
    return path


def test_the_result_is_that_of_the_parser_and_progress_comes_through():
    reports: list[tuple[int, int]] = []
    parsed = parse_in_child(HANDBOOK, "application/pdf", report=lambda done, total: reports.append((done, total)))
    assert parsed == parse_file(HANDBOOK, "application/pdf")
    assert reports[-1] == (13, 13)


def test_errors_of_the_parser_come_through(tmp_path):
    (tmp_path / "x").write_bytes(b"%PDF-1.7 nothing")
    with pytest.raises(ParseError, match="print it to a new PDF") as caught:
        parse_in_child(tmp_path / "x", "application/pdf")
    assert (caught.value.code, caught.value.page, caught.value.retryable) == ("broken_pdf", None, False)


def test_the_child_inherits_no_environment_and_no_directory(text_file, monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_SECRET", "hunter2")
    before, seen = children(), []

    def look() -> None:
        for pid in children() - before:
            seen.append((Path(f"/proc/{pid}/environ").read_bytes(), os.readlink(f"/proc/{pid}/cwd"), os.getsid(pid)))

    parse_in_child(text_file, "text/plain", check=look)
    started = [entry for entry in seen if entry[0]]  # empty until the child has become Python
    assert all(b"hunter2" not in environment for environment, _, _ in started)
    assert all(session != os.getsid(0) for _, _, session in started)


def test_taking_too_long_ends_the_child(text_file):
    assert code_of(text_file, "text/plain", ParseLimits(wall_s=0.001)) == ("parse_timeout", True)


def test_using_too_much_processor_time_ends_the_child(tmp_path):
    (tmp_path / "x").write_bytes(b"# heading\n" * 4_000_000)
    assert code_of(tmp_path / "x", "text/markdown", ParseLimits(cpu_s=1)) == ("parse_timeout", True)


def test_using_too_much_memory_is_an_error_on_the_document(tmp_path):
    (tmp_path / "x").write_bytes(b"words " * 20_000_000)
    assert code_of(tmp_path / "x", "text/plain", ParseLimits(memory_bytes=200 << 20)) == ("memory_limit", False)


@pytest.mark.parametrize(("held_mib", "code"), [(1, "parser_crashed"), (900, "memory_limit")])
def test_a_library_that_aborts_for_lack_of_memory_is_told_from_one_that_crashes(held_mib, code):
    with pytest.raises(ParseError) as caught:
        run_in_child("tests.unit.aborting_child", [str(held_mib)], ParseLimits(memory_bytes=1 << 30))
    assert caught.value.code == code


def test_a_child_that_closes_its_output_and_stays_is_ended(monkeypatch):
    monkeypatch.setattr("ingest.parse.cage._END_S", 0.2)
    with pytest.raises(ParseError, match="did not end"):
        run_in_child("tests.unit.aborting_child", ["0"], ParseLimits())


def test_writing_too_much_ends_the_child(text_file):
    assert code_of(text_file, "text/plain", ParseLimits(output_bytes=1000)) == ("output_too_large", False)


def test_too_many_pages():
    assert code_of(HANDBOOK, "application/pdf", ParseLimits(pages=12)) == ("too_many_pages", False)


def test_a_crash_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(ParseError, match=r"crashed.*No such file") as caught:
        parse_in_child(tmp_path / "missing", "text/plain")
    assert caught.value.code == "parser_crashed"


def test_being_killed_from_outside_is_told_apart(text_file):
    before = children()

    def kill() -> None:
        for pid in children() - before:
            os.kill(pid, 9)

    with pytest.raises(ParseError, match="killed from outside") as caught:
        parse_in_child(text_file, "text/plain", check=kill)
    assert (caught.value.code, caught.value.retryable) == ("parser_killed", True)


def test_what_check_raises_ends_the_child(text_file):
    before = children()

    def check() -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        parse_in_child(text_file, "text/plain", check=check)
    assert children() == before
