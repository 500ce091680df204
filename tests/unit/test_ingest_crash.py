"""What was accepted is there after a kill at any step and a full disk at any size: ready, whole, and once."""

import json
import signal
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).parent / "crash_kit.py"


def run_kit(folder: Path, *arguments: str) -> list[dict]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{KIT.parents[2]}:{KIT.parent}"}
    command = [sys.executable, KIT, folder, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_killed_before_every_step_to_the_disk(tmp_path):
    rows = run_kit(tmp_path, "kill")
    assert [row for row in rows if row["checked"]] == []
    assert rows[-1]["status"] == 0 and {row["status"] for row in rows[:-1]} == {-9}
    promises = [len(row["said"]) for row in rows]  # the walk goes through all of the work, not around it
    assert promises == sorted(promises) and set(promises) == {0, 1, 2, 3}
    assert len(rows) > 150


def test_a_full_disk_at_any_size(tmp_path):
    rows = run_kit(tmp_path, "full", "0", "1000000", "8000")
    assert [row for row in rows if row["checked"]] == []
    assert rows[-1]["status"] == 0 and {row["status"] for row in rows[:-1]} == {1}
    promises = [sum(line.startswith(("created doc_", "replaced", "deleted")) for line in row["said"]) for row in rows]
    assert {0, 1, 2, 3} >= set(promises) >= {0, 2, 3}


def test_killed_at_any_time_between_the_store_and_the_word_index(tmp_path):
    rows = run_kit(tmp_path, "time", "100", "1000", "45")
    assert [row for row in rows if row["checked"]] == []
    assert {row["status"] for row in rows} == {-signal.SIGALRM}
    assert any("words were behind" in row["trouble"] for row in rows)


def test_killed_at_any_time_while_lost_indexes_are_made_anew(tmp_path):
    rows = run_kit(tmp_path, "fill", "60", "1200", "90")
    assert [row for row in rows if row["checked"]] == []
    assert {row["status"] for row in rows} == {-signal.SIGALRM}
    assert any("words were being filled" in row["trouble"] for row in rows)  # in how many depends on the machine's load
