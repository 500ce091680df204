"""The command `ingest`: finds the files, uploads them, and waits until they are searchable."""

import difflib
import glob
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app import render
from app.client import CommandFailed, Service, connect
from app.datadir import DataDir, is_own
from app.settings import Settings

_POLL_S = 0.1
_NAMED = 5  # skipped files that are named


def expand_paths(patterns: Sequence[str]) -> list[Path]:
    """The files of paths, folders and globs, sorted, without duplicates; hidden files below a folder are skipped.

    Raises CommandFailed for a pattern that matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        found = (
            [path] if pattern and path.exists() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        )
        inside = [file for one in found for file in _files_of(one)]
        if not inside:
            raise CommandFailed(f"{pattern}: no such file, or a folder without files")
        files.update(dict.fromkeys(inside))
    return list(files)


def _files_of(path: Path) -> list[Path]:
    """The files below a folder, sorted, or the file itself; unreadable ones are reported on stderr, and so is the data
    directory of a service and what it keeps there, because that is no document, and may be the key of its admin."""
    if not path.is_dir() and not _is_kept_by_a_service(path):
        return [path]
    files: list[Path] = []
    left_out: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=lambda error: left_out.append(Path(error.filename))):
        if _is_kept_by_a_service(Path(folder)):
            left_out.append(Path(folder))
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out.extend(Path(folder, name) for name in folders if Path(folder, name).is_symlink())
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            (files if file.is_file() else left_out).append(file)
    if left_out:
        named = ", ".join(render.tame(str(file)) for file in sorted(left_out)[:_NAMED])
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        what = (
            "links to folders or to nothing, or what cannot be read: name them to have them sent; or a data directory"
        )
        render.err.print(f"left out: {named}{more} ({what})", style="yellow", markup=False)
    return sorted(files)


def _is_kept_by_a_service(path: Path) -> bool:
    path = path.resolve()
    above = filter(lambda folder: DataDir.database_in(folder).is_file(), (path, *path.parents))
    return any(folder == path or is_own(path, folder) for folder in above)


def ingest_paths(settings: Settings, paths: Sequence[str], fields: dict[str, str]) -> dict[str, Any]:
    """The command: `ingest_files` for all files of the paths; reports a new collection at once."""
    files = expand_paths(paths)
    try:
        with connect(settings, answering=False) as service:
            check_ingests(service)
            return ingest_files(service, files, fields, _tell_new)
    except KeyboardInterrupt:
        render.err.print("interrupted; nothing that was sent is lost: the same command goes on from here")
        raise


def check_ingests(service: Service) -> None:
    """Raises CommandFailed if the service is configured to ingest nothing, so that waiting would never end."""
    if service.checks().get("ingestion", "ok") != "ok":  # not every service reports it
        raise CommandFailed(
            "nothing would be ingested: the service runs with JAMBA_RAG_INGEST__WORKERS=0; start it without that"
        )


def _tell_new(name: str, nearest: str | None) -> None:
    meant = f"; did you mean {nearest!r}?" if nearest else ""
    render.err.print(f"made the new collection {name!r}{meant}", style="yellow" if nearest else None, markup=False)


def ingest_files(
    service: Service,
    files: Sequence[Path],
    fields: dict[str, str],
    on_new: Callable[[str, str | None], None] = lambda name, nearest: None,
) -> dict[str, Any]:
    """Upload files, creating the collection if necessary, and wait for them: {"data": [Document], "errors": [...]}.

    After creating it, calls `on_new` with its name and the most similar existing name; both are also in the result.
    """
    new, nearest = _ensure_collection(service, fields["collection"])
    if new:
        on_new(new, nearest)
    uploaded: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    with render.progress_bar() as progress:
        for file in progress.track(files, description="sending"):
            try:
                uploaded += service.upload(file, fields)["data"]
            except (CommandFailed, OSError, UnicodeError) as error:  # file names may not be valid UTF-8
                code = error.code if isinstance(error, CommandFailed) else "unreadable_file"
                name = os.fsencode(file).decode(errors="replace")
                errors.append({"filename": name, "code": code, "detail": str(error)})
    result = {"object": "list", "data": wait_for(service, uploaded), "errors": errors}
    return result | {"new_collection": new, "nearest_collection": nearest}


def _ensure_collection(service: Service, name: str) -> tuple[str | None, str | None]:
    """Create the collection if it does not exist; returns its name if so, and the most similar existing name."""
    known = [collection["name"] for collection in service.request("GET", "/v1/collections")["data"]]
    if name in known:
        return None, None
    service.request("POST", "/v1/collections", json={"name": name})
    return name, next(iter(difflib.get_close_matches(name, known, n=1)), None)


def delete_document(service: Service, document_id: str) -> str | None:
    """Delete a document; returns the reason if that fails."""
    try:
        service.request("DELETE", f"/v1/documents/{quote(document_id, safe='')}")
    except CommandFailed as error:
        return str(error)
    return None


def wait_for(service: Service, queued: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wait until every document is ready or failed; returns them in the same order."""
    done: list[dict[str, Any]] = []
    with render.progress_bar() as progress:
        task = progress.add_task("reading", total=len(queued))
        for document in queued:
            while document["status"] not in ("ready", "failed"):
                time.sleep(_POLL_S)
                document = service.request("GET", f"/v1/documents/{document['id']}")
                progress.update(task, description=f"{document['status']} {document['filename']}")
            done.append(document)
            progress.advance(task)
    return done
