"""How the C kernels are built: once per user, by whatever compiler is here, and what happens where none is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.kernels import cpu, cpu_build

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler")


def test_no_compiler_means_not_available_and_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_build.shutil, "which", lambda _: None)
    cpu_build._load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not cpu.available() and not cpu.supports(torch.zeros(1))
        assert [record.name for record in caplog.records] == ["model.kernels.cpu_build"]
    finally:
        cpu_build._load_library.cache_clear()


def test_a_compiler_that_fails_means_not_available(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_build, "_FLAGS", ["--no-such-flag"])
    monkeypatch.setattr(cpu_build, "cache_dir", lambda: tmp_path)
    cpu_build._load_library.cache_clear()
    try:
        assert not cpu.available()
        assert "--no-such-flag" in caplog.text
        assert list(tmp_path.iterdir()) == []
    finally:
        cpu_build._load_library.cache_clear()


def test_a_user_without_a_home_builds_in_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cpu_build.cache_dir() == tmp_path / f"jamba-rag-{os.getuid()}"


def test_two_processes_building_at_once_both_get_the_library(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from model.kernels import cpu_build; "
        f"cpu_build.cache_dir = lambda: pathlib.Path({str(tmp_path)!r}); "
        "cpu_build._FLAGS = [*cpu_build._FLAGS, '-O0']; sys.exit(not cpu_build.load_library())"  # a short build
    )
    # torch first: the library takes OpenMP from it
    command = [sys.executable, "-c", "import torch; " + code]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
