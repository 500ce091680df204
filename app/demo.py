"""The script behind `make demo`: ingests `samples/documents`, asks three questions, shows answers, quotes and timings.

The first two questions are about the same document, so most of the second prompt comes from the cache.
"""

import sys
import time
from pathlib import Path

from app import render
from app.client import CommandFailed, Service, connect
from app.ingesting import expand_paths, ingest_files
from app.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
DATA_DIR = ROOT / "build" / "demo"
COLLECTION = "samples"
QUESTIONS = (
    ("How long may store-and-forward stay on?", "oncall-runbook.md"),
    ("When does the on-call week start?", "oncall-runbook.md"),
    ("When was the FR-12 first deployed on the Varanger peninsula?", "fr12-handbook.pdf"),
)


def run_demo(documents: Path, data_dir: Path) -> None:
    """Raises CommandFailed if a document cannot be read."""
    start = time.perf_counter()
    settings = load_settings(data_dir=data_dir, url=None)
    _say(f"Starting the service in this process, with the model in {settings.model.path.name} …")
    with connect(settings) as service:
        ids = _ingest(service, documents)
        for number, (question, filename) in enumerate(QUESTIONS, 1):
            render.out.print()
            _say(f"Question {number}, about {filename}: {question}")
            body = {"question": question, "document_ids": [ids[filename]]}
            answer = service.request("POST", "/v1/answers", json=body)
            render.show_answer(answer)
            if number == 2:
                usage = answer["usage"]
                _say(
                    f"  The second question about this document: {usage['cached_input_tokens']} of "
                    f"{usage['input_tokens']} prompt tokens came from the cache."
                )
    render.out.print()
    _say(f"Done in {time.perf_counter() - start:.1f} s. `make serve` starts the service with a page to upload and ask.")


def _ingest(service: Service, documents: Path) -> dict[str, str]:
    """Name -> id of every document, ingested now or by an earlier run."""
    files = expand_paths([str(documents)])
    _say(f"Reading {len(files)} documents …")
    result = ingest_files(service, files, {"collection": COLLECTION, "on_conflict": "skip"})
    for document in result["data"]:
        if document["status"] == "failed":
            raise CommandFailed(f"{document['filename']}: {document['last_error']['message']}")
        pages = f"{document['pages']} pages, " if document["pages"] else ""
        again = ", there already" if document["duplicate_of"] else ""
        _say(f"  {document['filename']}: {pages}{document['chunks']} chunks, {document['tokens']} tokens{again}")
    if result["errors"]:
        raise CommandFailed("; ".join(f"{error['filename']}: {error['detail']}" for error in result["errors"]))
    return {document["filename"]: document["id"] for document in result["data"]}


def _say(text: str) -> None:
    render.out.print(text, markup=False)


def main() -> None:
    render.accept_any_text()
    try:
        run_demo(ROOT / "samples" / "documents", DATA_DIR)
    except (ValueError, RuntimeError, OSError) as error:
        render.err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
