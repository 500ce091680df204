"""No package that the project stands on, itself or through another, binds who uses it by the GPL or the AGPL."""

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
# The LGPL, and the GPL with an exception for who links or runs it, leave those free who only use the package.
_STRICT = re.compile(r"A-?GPL|Affero|(?<![A-Za-z])GPL|(?<!Lesser )(?<!Library )General Public License", re.I)
_FREED = re.compile(r"exception|\bWITH\b", re.I)


def installed() -> dict[str, Distribution]:
    """By name, all that pyproject.toml's requirements lead to, its extras included, as far as they are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    waiting, seen, found = [(Requirement(text), "") for text in texts], set(), {}
    while waiting:
        wanted, asked_with = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": asked_with}):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
            waiting += [(Requirement(text), extra) for text in found[name].requires or []]
    return found


def licences(package: Distribution) -> list[str]:
    """What it says of its licence, each way to say it; of several licences that one may choose from, each."""
    metadata = package.metadata
    expression = metadata.get("License-Expression") or ""
    given = [part.strip("() ") for part in re.split(r"\bOR\b", expression)]
    given += [text.rpartition("::")[2].strip() for text in metadata.get_all("Classifier") or [] if "License ::" in text]
    given.append((metadata.get("License") or "").strip()[:200])  # some put the whole text there, its name first
    return [text for text in given if text and text != "OSI Approved"]


def is_strict(given: Iterable[str]) -> bool:
    """Whether there is no choice but the GPL or the AGPL."""
    return all(_STRICT.search(text) and not _FREED.search(text) for text in given)


def test_no_package_is_under_the_gpl_or_the_agpl_alone():
    packages = installed()
    assert {"torch", "fastapi", "lxml", "jinja2", "markupsafe"} <= packages.keys()  # direct, and through another
    given = {name: licences(package) for name, package in packages.items()}
    assert {name: texts for name, texts in given.items() if is_strict(texts)} == {}  # or says nothing


@pytest.mark.parametrize(
    ("given", "strict"),
    [
        (["AGPL-3.0-or-later"], True),
        (["GNU Affero General Public License v3"], True),
        (["GNU General Public License v3 (GPLv3)", "GPL-3.0-only"], True),
        (["GPLv2+"], True),
        (["GPL-2.0-only", "MIT"], False),
        (["GPL-2.0-or-later WITH GCC-exception-3.1"], False),
        (["LGPL-2.1-only"], False),
        (["GNU Lesser General Public License v3 (LGPLv3)"], False),
        (["MPL-2.0 AND MIT"], False),
        (["Apache-2.0"], False),
        ([], True),
    ],
)
def test_what_counts(given, strict):
    assert is_strict(given) is strict
