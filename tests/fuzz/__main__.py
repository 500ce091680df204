"""Fuzzes the parsers for a while, guided by coverage, and adds to the corpus what reached something new.

    pip install '.[fuzz]'
    python -m tests.fuzz [--minutes 60] [FORMAT ...]

Each format gets its share of the time in a process of its own. A fault ends that process with its traceback; the input
is kept under data/fuzz/ and named on the last line. Exit 1 if there was one.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.target import CORPUS, FORMATS

_WORK = Path(__file__).parents[2] / "data" / "fuzz"
_MAX_BYTES = 16 * 1024
_TURN_S = 120  # formats take turns, so that a short run has tried them all
_LIBFUZZER = ("-timeout=60", "-rss_limit_mb=3000", f"-max_len={_MAX_BYTES}", "-print_final_stats=1", "-verbosity=1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}; all when none is named")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    if unknown := set(arguments.formats) - set(FORMATS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install '.[fuzz]'")
    formats = arguments.formats or list(FORMATS)
    share_s = 60 * arguments.minutes / len(formats)
    turns = max(1, round(share_s / _TURN_S))
    failed = []
    for _ in range(turns):
        failed += [name for name in formats if not fuzz_format(name, int(share_s / turns))]
    for name in formats:
        grow_corpus(name)
    print("faults: " + (", ".join(failed) or "none"))
    return bool(failed)


def fuzz_format(name: str, seconds: int) -> bool:
    """Whether nothing was found."""
    found, faults = _WORK / name, _WORK / "faults"
    for folder in (found, faults, CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    options = (f"-max_total_time={seconds}", f"-artifact_prefix={faults}/{name}-", *_LIBFUZZER)
    return _run(name, *options, str(found), str(CORPUS / name)) == 0


def grow_corpus(name: str) -> None:
    """Copy from what was found only what the corpus doesn't cover."""
    _run(name, "-merge=1", f"-max_len={_MAX_BYTES}", str(CORPUS / name), str(_WORK / name))


def _run(name: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "tests.fuzz.one", name, *arguments]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
