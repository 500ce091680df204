"""What a benchmark's JSON says of the run."""

from __future__ import annotations

import json

from bench import runs


def test_arguments_are_kept_without_the_machine_s_folders(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    monkeypatch.setattr(runs, "_RESULTS", tmp_path / "results")
    given = [
        str(tmp_path / "stages.py"),
        "--held-out",
        str(tmp_path / "held_out"),
        f"--out={tmp_path}/x.json",
        "a/b",
        "-1",
    ]
    run = runs.BenchRun("some", given)
    run.add(rows=1)
    record = run.finish().read_text()
    assert json.loads(record)["argv"] == ["stages.py", "--held-out", "held_out", "--out=x.json", "a/b", "-1"]
    assert str(tmp_path) not in record
