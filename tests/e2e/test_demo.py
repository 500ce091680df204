"""`make demo` with the checkpoint that ships: answers, the page of the PDF, the cache, README.md's copy of it; and a
question it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.client import connect
from app.ingesting import expand_paths, ingest_files
from app.settings import load_settings

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
SAMPLES = ROOT / "samples"
OR_NOT = "at most "  # with and without, a quote is as likely, to what CPUs round differently
DEMO_IN = "import pathlib, sys; from app import demo; demo.DATA_DIR = pathlib.Path(sys.argv[1]); demo.main()"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data dir of its own, so that nothing is there already; the demo leaves the samples in it."""
    return tmp_path_factory.mktemp("demo") / "data"


@pytest.fixture(scope="module")
def printed(data: Path) -> str:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", DEMO_IN, str(data)]
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    demo = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=240, check=False
    )
    assert demo.returncode == 0, demo.stderr
    assert "there already" not in demo.stdout and "Traceback" not in demo.stderr
    return demo.stdout


def test_demo_answers_with_page_and_cache(printed):
    first, second, third = re.split(r"^Question \d, ", printed, flags=re.MULTILINE)[1:]
    assert re.search(f"“(?:{OR_NOT})?6 hours”", first)
    assert "“Tuesday at 10:00" in second
    assert "“9 October 2017”" in third and "page 2" in third
    cached = re.search(r"(\d+) of (\d+) prompt tokens came from the cache", second)
    assert cached and 1000 < int(cached[1]) < int(cached[2])


def test_readme_shows_what_the_demo_prints(printed):
    """Answers, quotes, places and counts of tokens are equal; milliseconds and OR_NOT are those of some machine."""
    fenced = re.search(r"(?<=```\n)Question 1, .*?(?=\n```)", README.read_text(encoding="utf-8"), re.DOTALL)
    assert fenced, "README.md has lost its block of what `make demo` prints"
    paragraphs = re.sub(r"^  The second question .*\n", "", printed, flags=re.MULTILINE).split("\n\n")
    today = "\n\n".join(p for p in paragraphs if p.startswith(("Question 1, ", "Question 2, ")))
    told, found = (re.sub(r"\d+ ms", "… ms", text).replace(OR_NOT, "") for text in (fenced[0], today))
    assert told == found, f"README.md does not show what the demo prints; put in place of its block:\n\n{today}\n"


def test_price_that_no_document_gives_is_not_found(data):
    """With default settings, over all samples. Not every near miss is refused: bench/answers.py says how many."""
    questions = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))["unanswerable"]
    question = next(item["question"] for item in questions if item["id"] == "u01")
    settings = load_settings(None, data_dir=data, url=None)
    with connect(settings) as service:
        ingest_files(service, expand_paths([str(SAMPLES / "documents")]), {"collection": "samples"})
        answer = service.request("POST", "/v1/answers", json={"question": question, "collections": ["samples"]})
    assert answer["grounding"] == "not_found"
    assert answer["citations"] == [] and answer["sources"]
