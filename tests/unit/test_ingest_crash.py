"""What was accepted is there after a kill at any step and a full disk at any size: ready, whole, and once."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KIT = Path(__file__).parent / "crash_kit.py"


@pytest.fixture(scope="module")
def kit() -> Iterator[subprocess.Popen[str]]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{KIT.parents[2]}:{KIT.parent}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, KIT], **pipes, text=True, env=environment) as kit:
        yield kit


@pytest.fixture
def run_kit(kit: subprocess.Popen[str], tmp_path: Path) -> Callable[..., list[dict]]:
    def run(*arguments: str) -> list[dict]:
        print(tmp_path, *arguments, file=kit.stdin, flush=True)
        rows = []
        for line in kit.stdout:
            if line == "\n":
                return rows
            rows.append(json.loads(line))
        pytest.fail("the kit has ended; its standard error says why")

    return run


def test_killed_before_every_step_to_the_disk(run_kit):
    rows = run_kit("kill")
    assert [row for row in rows if row["checked"]] == []
    assert rows[-1]["status"] == 0 and {row["status"] for row in rows[:-1]} == {-9}
    promises = [len(row["said"]) for row in rows]  # the walk goes through all of the work, not around it
    assert promises == sorted(promises) and set(promises) == {0, 1, 2, 3}
    assert len(rows) > 100


def test_a_full_disk_at_any_size(run_kit):
    rows = run_kit("full", "0", "1000000", "8000")
    assert [row for row in rows if row["checked"]] == []
    assert rows[-1]["status"] == 0 and {row["status"] for row in rows[:-1]} == {1}
    promises = [sum(line.startswith(("created doc_", "replaced", "deleted")) for line in row["said"]) for row in rows]
    assert {0, 1, 2, 3} >= set(promises) >= {0, 2, 3}


def test_killed_at_any_time_between_the_store_and_the_word_index(run_kit):
    rows = run_kit("time", "100", "1000", "45")
    assert [row for row in rows if row["checked"]] == []
    assert {row["status"] for row in rows} == {-signal.SIGALRM}
    assert any("words were behind" in row["trouble"] for row in rows)


def test_killed_at_any_time_while_lost_indexes_are_made_anew(run_kit):
    rows = run_kit("fill", "60", "1200", "90")
    assert [row for row in rows if row["checked"]] == []
    assert {row["status"] for row in rows} == {-signal.SIGALRM}
    assert any("words were being filled" in row["trouble"] for row in rows)  # in how many depends on the machine's load
