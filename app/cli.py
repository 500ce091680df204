"""The command `jamba-rag`. Commands speak HTTP to a service, a running one (`--url`) or one in this process.

Exit codes: 0 fine, 1 the work failed (message on stderr), 2 wrong usage.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer
from typer.completion import get_completion_script

from app import render
from app.cli_arguments import DocumentId, DocumentIds, KeyId, KeyRole, Limit
from app.cli_collections import collections
from app.cli_options import Collection, DataDirectory, Json, Key, Metadata, PlainGroup, Url, choose_settings
from app.settings import SettingsError
from retrieval.types import OnConflict, Status

app = typer.Typer(
    name="jamba-rag",
    cls=PlainGroup,
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
documents = typer.Typer(help="List, show, delete and retry documents.", no_args_is_help=True)
keys = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
app.add_typer(collections, name="collections")
app.add_typer(documents, name="documents")
app.add_typer(keys, name="keys")


@app.callback()
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Ask questions about your own documents; every quote is checked against the source."""
    if show_version:
        sys.stdout.write(f"jamba-rag {version('jamba-rag')}\n")
        raise typer.Exit


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: DataDirectory = None,
) -> None:
    """Run the service until it is interrupted."""
    import uvicorn

    from app.log import configure_logging
    from app.main import create_app
    from app.serving import SteadyServer, check_address

    server = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = choose_settings(None, None, data_dir, **({"server": server} if server else {}))
    configure_logging(settings.log.level, settings.log.format)
    check_address(settings.server.host, settings.server.port)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.server.shutdown_s,
    )
    running = SteadyServer(config, settings.server.stall_s)
    try:
        running.run()
    except SystemExit:  # uvicorn's own codes; the cause has been logged
        failed = "start" if running.lifespan.should_exit else f"listen on {config.host}:{config.port}"
        raise typer.Exit(_fail(f"cannot {failed}; the messages above say why")) from None
    except KeyboardInterrupt:  # after an orderly shutdown
        pass


@app.command()
def ingest(
    paths: Annotated[list[str], typer.Argument(help="Files, folders and globs.", metavar="PATH")],
    collection: Collection = "default",
    metadata: Metadata = None,
    on_conflict: Annotated[OnConflict, typer.Option(help="Same bytes again: skip, replace or error.")] = "skip",
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """Upload files and wait until they are searchable. Exit 1 if one of them failed.

    May be interrupted: the same command resumes and repeats nothing.
    """
    from app.ingesting import ingest_paths

    fields = {"collection": collection, "on_conflict": on_conflict, **({"metadata": metadata} if metadata else {})}
    result = ingest_paths(choose_settings(url, key, data_dir), paths, fields)
    if as_json:
        render.print_json(result)
    else:
        render.show_documents(result["data"])
    for error in result["errors"]:
        render.err.print(f"{error['filename']}: {error['detail']}", style="red", markup=False)
    _exit_if_failed(result["data"])
    if result["errors"]:
        raise typer.Exit(1)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know, in quotation marks.")],
    collection: Annotated[list[str] | None, typer.Option("--collection", "-c", help="May be repeated.")] = None,
    mode: Annotated[Literal["auto", "rag", "full_context"], typer.Option(help="How much the model reads.")] = "auto",
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Default: on a terminal.")] = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """Answer a question from the documents, with quotes."""
    from app.client import connect

    body: dict[str, Any] = {"question": question, "mode": mode, "collections": collection or None}
    with connect(choose_settings(url, key, data_dir, known=True)) as service:
        if as_json:
            render.print_json(service.request("POST", "/v1/answers", json=body))
        elif stream or (stream is None and sys.stdout.isatty()):
            _show_stream(service.stream("/v1/answers", body | {"stream": True}))
        else:
            render.show_answer(service.request("POST", "/v1/answers", json=body))


def _show_stream(events: Any) -> None:
    with render.reading_bar() as show_progress:
        for kind, data in events:
            show_progress(data if kind == "answer.progress" else None)
            if kind == "answer.text.delta":
                render.out.print(render.tame(data["text"]), end="", markup=False, style="bold")
            elif kind == "answer.completed":
                render.out.print()
                render.show_answer(data, with_text=False)
            elif kind == "answer.error":
                raise typer.Exit(_fail(data["detail"]))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="Words or a question, in quotation marks.")],
    collection: Annotated[list[str] | None, typer.Option("--collection", "-c", help="May be repeated.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=50, help="Maximum passages.")] = 10,
    mode: Annotated[Literal["hybrid", "dense", "lexical"], typer.Option(help="By words, meaning or both.")] = "hybrid",
    rerank: Annotated[bool | None, typer.Option(help="Default: in hybrid mode.")] = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """Find passages without asking the model."""
    from app.client import connect

    body = {"query": query, "collections": collection or None, "max_num_results": limit, "mode": mode, "rerank": rerank}
    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        found = service.request("POST", "/v1/search", json=body)
    render.print_json(found) if as_json else render.show_hits(found["data"])


@documents.command("list")
def list_documents(
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Only this collection.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only in this state.")] = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """All documents, oldest first."""
    from app.client import connect

    found: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": 1000}
    params |= {name: value for name, value in (("collection", collection), ("status", status)) if value is not None}
    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        while True:
            page = service.request("GET", "/v1/documents", params=params)
            found += page["data"]
            if not page["has_more"]:
                break
            params["after"] = found[-1]["id"]
    render.print_json({"object": "list", "data": found}) if as_json else render.show_documents(found)


@documents.command("show")
def show_document(
    document_id: DocumentId, url: Url = None, key: Key = None, data_dir: DataDirectory = None, as_json: Json = False
) -> None:
    """Everything known about one document."""
    from app.client import connect

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        document = service.request("GET", f"/v1/documents/{quote(document_id, safe='')}")
    render.print_json(document) if as_json else render.show_document(document)


@documents.command("delete")
def delete_documents(
    document_ids: DocumentIds,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
) -> None:
    """Delete documents and everything made from them. Exit 1 if one does not exist; the others are deleted."""
    from app.client import connect
    from app.ingesting import delete_document

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        failed = [_fail(problem) for document_id in document_ids if (problem := delete_document(service, document_id))]
    if failed:
        raise typer.Exit(1)


@documents.command("retry")
def retry_documents(
    document_ids: DocumentIds,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """Ingest failed documents again and wait for them."""
    from app.client import connect
    from app.ingesting import check_ingests, wait_for

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        check_ingests(service)
        paths = [f"/v1/documents/{quote(document_id, safe='')}/retry" for document_id in document_ids]
        queued = [service.request("POST", path) for path in paths]
        done = wait_for(service, queued)
    render.print_json({"object": "list", "data": done}) if as_json else render.show_documents(done)
    _exit_if_failed(done)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: KeyRole = "reader",
    collection: Annotated[list[str] | None, typer.Option("--collection", "-c", help="Bind the key to these.")] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    upload_bytes_per_day: Limit = None,
    documents_per_collection: Limit = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDirectory = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it; it is never shown again."""
    from app.client import connect

    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "upload_bytes_per_day": upload_bytes_per_day,
        "documents_per_collection": documents_per_collection,
    }
    body = {"name": name, "role": role, "collections": collection or None, "limits": limits}
    with connect(choose_settings(url, key, data_dir), answering=False) as service:
        made = service.request("POST", "/v1/keys", json=body)
    render.print_json(made) if as_json else sys.stdout.write(made["key"] + "\n")


@keys.command("list")
def list_keys(url: Url = None, key: Key = None, data_dir: DataDirectory = None, as_json: Json = False) -> None:
    """All keys with id, name, role and collections, without the secrets."""
    from app.client import connect

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        found = service.request("GET", "/v1/keys")
    headers = ("id", "name", "role", "collections", "revoked_at")
    rows = ([key[name] for name in headers] for key in found["data"])
    render.print_json(found) if as_json else render.show_table(headers, rows)


@keys.command("revoke")
def revoke_key(key_id: KeyId, url: Url = None, key: Key = None, data_dir: DataDirectory = None) -> None:
    """Revoke a key at once."""
    from app.client import connect

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        service.request("DELETE", f"/v1/keys/{quote(key_id, safe='')}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", exists=True, file_okay=False)],
    target: Annotated[Path, typer.Argument(metavar="DST")],
    to: Annotated[Literal["int8", "int4", "bf16", "fp32"], typer.Option(help="How weights are stored.")] = "int8",
    rotate: Annotated[bool, typer.Option("--rotate", help="Rotate the residual stream, for w8a8.")] = False,
) -> None:
    """Write a Hugging Face checkpoint in another number format."""
    from model import convert_checkpoint

    with render.progress("tensors") as show:
        convert_checkpoint(source, target, to, show, rotate=rotate)


@app.command()
def doctor(url: Url = None, key: Key = None, data_dir: DataDirectory = None, as_json: Json = False) -> None:
    """Check device, kernels, checkpoint, Redis, and the index against the database. Exit 1 on a fault."""
    from app.doctor import examine

    findings = examine(choose_settings(url, key, data_dir))
    if as_json:
        render.print_json({"ok": all(finding.ok for finding in findings), "checks": [vars(f) for f in findings]})
    else:
        rows = [("ok" if f.ok else "FAULT", f.name, f.detail) for f in findings]
        render.show_table(("", "check", "finding"), rows)
    if faults := [finding.name for finding in findings if not finding.ok]:
        raise typer.Exit(_fail(f"{len(faults)} of {len(findings)} checks found a fault: {', '.join(faults)}"))


@app.command()
def reembed(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[EMBEDDER]", help="Directory of the new embedder; default: the one that ships."),
    ] = None,
    data_dir: DataDirectory = None,
) -> None:
    """Compute all vectors with another embedder; a running service keeps using its current one.

    May be interrupted: the same command resumes. The vectors are used from the next start with that embedder.
    """
    from app.embedding import reembed_all

    with render.progress("chunks") as show:
        name = reembed_all(choose_settings(None, None, data_dir), path, show)
    setting = f"with JAMBA_RAG_RETRIEVAL__EMBEDDER_PATH={path.resolve()}" if path else "without an embedder's path"
    render.err.print(f"all chunks have vectors of {name}; restart the service {setting} to use them", markup=False)


@app.command()
def backup(file: Annotated[Path, typer.Argument(metavar="FILE")], data_dir: DataDirectory = None) -> None:
    """Write database and originals into one file; works while the service runs."""
    from app.backup import write_backup

    count = write_backup(choose_settings(None, None, data_dir).data_dir, file)
    render.err.print(f"{file}: the database and its originals ({count})", markup=False)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False)], data_dir: DataDirectory = None
) -> None:
    """Unpack a backup into an empty data directory."""
    from app.backup import restore_backup

    count = restore_backup(file, choose_settings(None, None, data_dir).data_dir)
    render.err.print(f"restored the database and its originals ({count})", markup=False)


@app.command()
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.")]) -> None:
    """Print the script that completes commands and options in a shell: eval "$(jamba-rag completion bash)"."""
    script = get_completion_script(prog_name="jamba-rag", complete_var="_JAMBA_RAG_COMPLETE", shell=shell)
    sys.stdout.write(script + "\n")


def _exit_if_failed(documents: Sequence[dict[str, Any]]) -> None:
    """Exit with 1 if documents failed; the reasons have been printed on stdout."""
    if failed := [render.tame(document["filename"]) for document in documents if document["status"] == "failed"]:
        raise typer.Exit(_fail(f"{len(failed)} of {len(documents)} documents failed: {', '.join(failed)}"))


def _fail(message: str) -> int:
    render.err.print(f"error: {message}", style="red", markup=False)
    return 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    render.accept_any_text()
    try:
        app(arguments)
    except SettingsError as error:
        _fail(str(error))
        sys.exit(2)
    except (ValueError, RuntimeError, OSError) as error:  # the messages of our own errors say what to do
        hint = "; name a key with --key or JAMBA_RAG_KEY" if getattr(error, "code", "") == "unauthorized" else ""
        sys.exit(_fail(f"{error}{hint}"))


if __name__ == "__main__":  # `python -m app.cli`
    main()
