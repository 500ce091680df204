"""Known vulnerabilities of what the images hold (deploy/constraints.txt) and of what is installed here.

`audit.py PIP_AUDIT SITE_PACKAGES [--lenient] [options of pip-audit]` exits with 1 when a vulnerability is known, with 2
when the advisories could not be asked; --lenient makes the latter a warning, for a CI without a way to them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_S = 300
CONSTRAINTS = Path(__file__).resolve().parents[1] / "deploy" / "constraints.txt"


def ask(pip_audit: str, *options: str) -> list[dict]:
    """What is known of each package; nothing where nobody could be asked. Either makes pip-audit exit with 1."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [pip_audit, "--progress-spinner", "off", "--format", "json", "--output", str(report), *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{pip_audit}: {error}", file=sys.stderr)
            return []
        if not report.exists():
            print(*done.stderr.strip().splitlines()[-1:], file=sys.stderr)
            return []
        return json.loads(report.read_text())["dependencies"]


def main(pip_audit: str, site_packages: str, *options: str) -> int:
    lenient = "--lenient" in options
    further = [option for option in options if option != "--lenient"]
    sources = {
        "the images": ["--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"],
        "this installation": ["--path", site_packages],
    }
    found = unasked = 0
    for name, source in sources.items():
        packages = ask(pip_audit, *source, *further)
        known = [package for package in packages if "vulns" in package]
        for package in known:
            for hole in package["vulns"]:
                fixed = ", ".join(hole["fix_versions"]) or "no version yet"
                print(f"{name}: {package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")
                found += 1
        unasked += not known
        print(f"{name}: {len(known)} packages looked up, {len(packages) - len(known)} unknown to the index")
    if found:
        return 1
    if unasked:
        print("The advisories could not be asked: nothing is known either way.", file=sys.stderr)
    return 2 if unasked and not lenient else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
