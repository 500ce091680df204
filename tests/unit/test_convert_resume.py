"""A conversion that ends before its time: nothing loads by mistake, and the next one goes on or starts over."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import loading, runs
from model import UnsupportedWeights, convert_checkpoint, load_model, weights
from model.convert import ConversionRunning
from model.weights import CheckpointReader

SHARD = 4096  # bytes: some dozens of shards
SLOW = """
import sys, time
from model import convert_checkpoint

def report(done, total):
    print(done, flush=True)
    time.sleep(0.05)

convert_checkpoint(sys.argv[1], sys.argv[2], "int8", report, max_shard_bytes=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def expected(tiny_jamba_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "whole"
    convert_checkpoint(tiny_jamba_dir, path, "int8", max_shard_bytes=SHARD)
    return path


def stop_at(when: int) -> Callable[[int, int], None]:
    def stop(done: int, total: int) -> None:
        if done == when:
            raise KeyboardInterrupt

    return stop


def interrupt(source: Path, target: Path, when: int, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, progress=stop_at(when), **{"max_shard_bytes": SHARD} | options)


def work_dir(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def assert_same_files(ours: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert filecmp.cmpfiles(ours, expected, names, shallow=False) == (names, [], [])


def test_the_whole_conversion_is_what_it_should_be(tiny_jamba_dir, expected):
    names = {path.name for path in expected.iterdir()}
    assert {"config.json", "model.safetensors.index.json"} < names and len(names) > 20
    assert not names & {"lock", "conversion.json"}
    assert set(CheckpointReader(expected).names) == set(CheckpointReader(tiny_jamba_dir).names)


def test_a_killed_conversion_loads_nowhere_and_is_finished_by_the_next(tiny_jamba_dir, expected, tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(tiny_jamba_dir), str(target), str(SHARD)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        while int(run.stdout.readline()) < 40:
            pass
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(UnsupportedWeights, match=r"config\.json"):
        load_model(work_dir(target))
    parts = {path.name: path.stat().st_mtime_ns for path in work_dir(target).glob("part-*.safetensors")}
    assert len(parts) > 3
    done: list[tuple[int, int]] = []
    convert_checkpoint(tiny_jamba_dir, target, "int8", lambda *now: done.append(now), max_shard_bytes=SHARD)
    assert [at for at, _ in done] == list(range(done[0][0], done[-1][1] + 1)) and done[0][0] > 3
    assert_same_files(target, expected)
    kept = {path.stat().st_mtime_ns for path in target.glob("model-*.safetensors")}
    assert set(parts.values()) < kept  # they were not written again
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("when", [1, 17, 60])
def test_an_interrupted_conversion_goes_on_anywhere(tiny_jamba_dir, expected, tmp_path, when):
    interrupt(tiny_jamba_dir, tmp_path / "out", when)
    interrupt(tiny_jamba_dir, tmp_path / "out", when + 15)
    convert_checkpoint(tiny_jamba_dir, tmp_path / "out", "int8", max_shard_bytes=SHARD)
    assert_same_files(tmp_path / "out", expected)


def test_a_half_written_shard_is_not_used(tiny_jamba_dir, expected, tmp_path):
    interrupt(tiny_jamba_dir, tmp_path / "out", 40)
    work = work_dir(tmp_path / "out")
    last = max(work.glob("part-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    last.with_suffix(".unfinished").write_bytes(last.read_bytes()[:-7])
    last.unlink()
    convert_checkpoint(tiny_jamba_dir, tmp_path / "out", "int8", max_shard_bytes=SHARD)
    assert_same_files(tmp_path / "out", expected)


@pytest.mark.parametrize("other", [{"to": "bf16"}, {"max_shard_bytes": 3 * SHARD}])
def test_another_conversion_starts_over(tiny_jamba_dir, tmp_path, other):
    interrupt(tiny_jamba_dir, tmp_path / "out", 40)
    options = {"to": "int8", "max_shard_bytes": SHARD} | other
    convert_checkpoint(tiny_jamba_dir, tmp_path / "out", **options)
    convert_checkpoint(tiny_jamba_dir, tmp_path / "at-once", **options)
    assert_same_files(tmp_path / "out", tmp_path / "at-once")


def test_changed_weights_start_over(write_jamba, expected, tmp_path):
    write_jamba(tmp_path / "source", seed=1)
    interrupt(tmp_path / "source", tmp_path / "out", 40)
    write_jamba(tmp_path / "source", seed=0)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", "int8", max_shard_bytes=SHARD)
    assert_same_files(tmp_path / "out", expected)


def test_two_conversions_do_not_share_a_directory(tiny_jamba_dir, tmp_path):
    interrupt(tiny_jamba_dir, tmp_path / "out", 10)
    with (work_dir(tmp_path / "out") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConversionRunning, match="wait for it"):
            convert_checkpoint(tiny_jamba_dir, tmp_path / "out", "int8", max_shard_bytes=SHARD)


def test_large_matrices_are_rounded_in_pieces_to_the_same(tiny_jamba_dir, monkeypatch):
    whole = load_model(tiny_jamba_dir, quantize="int8")
    monkeypatch.setitem(weights._ROUND_ELEMENTS, "cpu", 100)  # three rows of d = 32
    for (name, ours), theirs in zip(
        load_model(tiny_jamba_dir, quantize="int8").named_parameters(), whole.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_loading_benchmark_runs_on_a_small_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    monkeypatch.setattr(runs, "_RESULTS", tmp_path)
    monkeypatch.setattr(loading, "SHARD_BYTES", 100_000)
    loading.main(["--shape", "small-test", "--layers", "8", "--device", "cpu", "--directory", str(tmp_path)])
    rows = json.loads(next(tmp_path.glob("loading-*.json")).read_text())["rows"]
    assert [row["what"].split(",")[0] for row in rows[-4:]] == [
        "plain read of the int8 files",
        "plain read of the int8 files",
        "load int8",
        "load int8",
    ]
    assert len(rows) == 9 and all(row["gb_per_s"] > 0 for row in rows)
    assert rows[-1]["file_gb"] < 0.7 * rows[0]["file_gb"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == []
