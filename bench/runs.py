"""One run of a benchmark: collects rows, prints a table and writes a JSON file under bench/results/.

The JSON records arguments, versions, CPU, GPU, commit and whether the tree was modified, and the load of the machine
before and after. Times are in seconds unless a column's name says otherwise.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "faiss-cpu", "tantivy", "redis")


class BenchRun:
    """Collects the rows of one benchmark; `finish` prints and stores them."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name, self.argv, self.rows = name, list(argv), []
        self._started, self._load_before = datetime.now(UTC), os.getloadavg()

    def add(self, **columns: Any) -> None:
        """One row; rows may differ in their columns."""
        self.rows.append(columns)

    def finish(self) -> Path:
        """Print one table and write the JSON; returns its path, which is also the last line printed."""
        print(format_table(self.rows))
        stamp = self._started.strftime("%Y%m%d-%H%M%S")
        path = _RESULTS / f"{self.name}-{stamp}.json"
        _RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(self._record(), indent=1, ensure_ascii=False) + "\n")
        print(path.relative_to(_ROOT))
        return path

    def _record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "argv": [_without_place(argument) for argument in self.argv],
            "started": self._started.isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
            "machine": _machine(),
            "load": {"before": self._load_before, "after": os.getloadavg()},
            "versions": _versions(),
            "rows": self.rows,
        }


def _without_place(argument: str) -> str:
    """An absolute path reduced to its name, because the folders of a machine mean nothing to others."""
    option, is_one, value = argument.rpartition("=")
    return f"{option}{is_one}{os.path.basename(value)}" if os.path.isabs(value) else argument


def time_interleaved(
    cases: Mapping[str, Callable[[], object]], warmup: int = 1, repeats: int = 7
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times, interleaved so that noise affects all cases equally."""
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times_s[name].append(time.perf_counter() - start)
    return times_s


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of all columns, with numbers to four significant digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_format(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _format(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _cpu_name() -> str:
    """The CPU's name, and those of its features that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    values = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in values.items()}
    features = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"}
    return " ".join([fields.get("model name", platform.processor()), *sorted(features)])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
