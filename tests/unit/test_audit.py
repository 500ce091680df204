"""The audit of dependencies: a known hole fails, advisories that cannot be asked only where that is wanted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLEAN = [{"name": "idna", "version": "3.20", "vulns": []}, {"name": "torch", "skip_reason": "not found"}]
HOLE = {"id": "GHSA-1", "fix_versions": ["1.2"], "aliases": [], "description": "bad"}
BROKEN = [*CLEAN, {"name": "httpx", "version": "0.28.1", "vulns": [HOLE]}]


def audit(folder: Path, dependencies: list | None, *options: str) -> subprocess.CompletedProcess:
    """Runs it over a stand-in for pip-audit, which writes this report or, with None, fails as without a network."""
    tool = folder / "pip-audit"
    lines = ["#!" + sys.executable, "import sys"]
    if dependencies is None:
        lines += ["sys.exit('ConnectionError: no route to the index')"]
    else:
        report = json.dumps({"dependencies": dependencies, "fixes": []})
        lines += [f"open(sys.argv[sys.argv.index('--output') + 1], 'w').write({report!r})"]
        lines += [f"sys.exit({int('GHSA' in report)})"]
    tool.write_text("\n".join(lines))
    tool.chmod(0o755)
    command = [sys.executable, ROOT / ".ci" / "audit.py", tool, folder, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", [(), ("--lenient",)])
def test_a_known_hole_fails(tmp_path, options):
    done = audit(tmp_path, BROKEN, *options)
    assert done.returncode == 1
    assert "httpx 0.28.1: GHSA-1, fixed in 1.2" in done.stdout


def test_nothing_known_passes(tmp_path):
    done = audit(tmp_path, CLEAN)
    assert done.returncode == 0 and "1 packages looked up, 1 unknown to the index" in done.stdout


@pytest.mark.parametrize("dependencies", [None, [], [{"name": "idna", "skip_reason": "not found"}]])
@pytest.mark.parametrize(("options", "status"), [((), 2), (("--lenient",), 0)])
def test_advisories_out_of_reach_are_said_and_fail_only_a_person(tmp_path, dependencies, options, status):
    done = audit(tmp_path, dependencies, *options)
    assert done.returncode == status and "could not be asked" in done.stderr


def test_ci_calls_it_and_forgives_no_hole():
    assert "make audit AUDIT=--lenient\n" in (ROOT / ".ci" / "run").read_text()
