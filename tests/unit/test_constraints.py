"""Holds deploy/constraints.txt, the versions in the images, to pyproject.toml; `make lock` makes it anew."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASKED_FOR = [Requirement(line) for line in PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]]
LINES = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
PINNED = {canonicalize_name(one.name): one for one in (Requirement(line) for line in LINES if not line.startswith("#"))}


def version(pinned: Requirement) -> str:
    return re.sub("^==", "", str(pinned.specifier))


def test_every_line_is_one_exact_version():
    assert [one for one in PINNED.values() if not re.fullmatch(r"==[\w.+]+", str(one.specifier))] == []


@pytest.mark.parametrize("asked", ASKED_FOR, ids=lambda one: one.name)
def test_every_dependency_is_pinned_within_its_range(asked):
    pinned = PINNED.get(canonicalize_name(asked.name))
    assert pinned and asked.specifier.contains(version(pinned)), "run: make lock"


def test_what_the_dependencies_need_is_pinned_too():
    """As far as the very versions that are pinned are installed here, for only those tell what they need."""
    to_see, seen = list(ASKED_FOR), set()
    while to_see:
        name = canonicalize_name(to_see.pop().name)
        if name in seen:
            continue
        seen.add(name)
        assert name in PINNED, f"{name}: run make lock"
        here = distribution(name)
        if here.version.partition("+")[0] == version(PINNED[name]):
            needs = map(Requirement, here.requires or [])
            to_see += [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    assert len(seen) > len(ASKED_FOR)
