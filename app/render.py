"""Output of the command line for people, and as JSON for programs."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich import markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from app.support import unsupported_spans

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
_NARROW = 100  # terminal width below which counts are left out in favour of file names
_PIPE_WIDTH = 10_000  # width of tables that do not go to a terminal
_WHOLE = ("id", "status", "pages", "chunks", "bytes", "field")  # columns that are never wrapped
_NEAREST = 3  # passages shown where there is no answer
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")


def accept_any_text() -> None:
    """Make stdout and stderr write characters that their encoding lacks as escapes, such as `\\u2248`."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None: they were closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tame(text: str) -> str:
    """The text with control characters replaced, because documents are untrusted."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> str:
    """The text, safe to embed in rich markup."""
    return markup.escape(tame(text))


def print_json(value: Any) -> None:
    plain = (sys.stdout.encoding or "").lower() not in {"utf-8", "utf8"}  # JSON has escapes of its own
    sys.stdout.write(json.dumps(value, ensure_ascii=plain, indent=None if not sys.stdout.isatty() else 2) + "\n")


def on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; call the yielded function with (done, total)."""
    with progress_bar() as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def reading_bar() -> Iterator[Callable[[Mapping[str, Any] | None], None]]:
    """A progress bar on stderr for the data of `answer.progress`; None removes it, before other output."""
    with progress_bar() as bar:
        bar.stop()
        task = bar.add_task("", total=None)

        def show(progress: Mapping[str, Any] | None) -> None:
            if progress is None:
                bar.stop()
                return
            bar.update(task, description=progress["stage"], completed=progress["done"], total=progress["total"])
            bar.start()

        yield show


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on stderr what is being waited for, on a terminal only."""
    if not on_terminal():
        yield
        return
    with err.status(what):
        yield


def progress_bar() -> Progress:
    """A progress bar on stderr, shown only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, disable=not on_terminal(), transient=True)


def show_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table as wide as the terminal; in a pipe one line per row, not truncated, without trailing spaces."""
    columns = (Column(header, no_wrap=header in _WHOLE, overflow="fold") for header in headers)
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_show_cell(cell)) for cell in row))
    if out.is_terminal:
        out.print(table)
        return
    wide = Console(highlight=False, width=_PIPE_WIDTH, file=io.StringIO())
    with wide.capture() as captured:
        wide.print(table)
    sys.stdout.writelines(line.rstrip() + "\n" for line in captured.get().splitlines())


def _show_cell(cell: object) -> str:
    if cell is None:
        return "-"
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else str(cell)


def show_answer(answer: Mapping[str, Any], with_text: bool = True) -> None:
    """Print text, numbered quotes with file and page, and timings."""
    if with_text:
        out.print(escape(answer["text"]), style="bold" if answer["citations"] else "yellow")
    for number, citation in enumerate(answer["citations"], 1):
        quote = " ".join(citation["cited_text"].split())
        out.print(f"  \\[{number}] “{escape(quote)}”")
        out.print(f"      {escape(place_of(citation))}, {citation['verification']} quote", style="cyan")
    if not answer["citations"] and answer["sources"]:
        out.print("  The nearest passages:", style="dim")
        for hit in answer["sources"][:_NEAREST]:
            out.print(f"  ≈ {escape(_excerpt(hit, 160))}")
            out.print(f"      {escape(place_of(hit))}", style="cyan")
    quotes = [(citation["start"], citation["end"]) for citation in answer["citations"]]
    if quotes and (unsupported := unsupported_spans(answer["text"], quotes)):
        out.print(f"  {_count_unsupported(len(unsupported))}", style="yellow")
    out.print(f"  {measures_of(answer)}", style="dim")


def _count_unsupported(count: int) -> str:
    return "1 sentence has no quote in it: unchecked" if count == 1 else f"{count} sentences have no quote: unchecked"


def place_of(found: Mapping[str, Any]) -> str:
    """File, pages and heading of a citation or hit."""
    location = found["location"]
    place = found["filename"]
    if "page_start" in location:
        first, last = location["page_start"], location["page_end"]
        place += f", page {first}" if first == last else f", pages {first}-{last}"
    return place + (f", “{location['heading_path'][-1]}”" if location["heading_path"] else "")


def _excerpt(hit: Mapping[str, Any], chars: int) -> str:
    """The beginning of a hit on one line, without its heading, cut between words if possible."""
    text = " ".join(_without_heading(hit["text"], hit["location"]["heading_path"]).split())
    if len(text) <= chars:
        return text
    end = text.rfind(" ", chars - 30, chars + 1)
    return f"{text[:end]} …" if end > 0 else f"{text[:chars]}…"


def _without_heading(text: str, path: Sequence[str]) -> str:
    """The text without its first line if that is the innermost heading."""
    heading = r"\s+".join(map(re.escape, path[-1].split())) if path else ""
    return (re.sub(rf"\A[#*\s]*{heading}[#* \t]*\n[*\s]*", "", text) if heading else "") or text


def measures_of(answer: Mapping[str, Any]) -> str:
    """First token, total, and how much of the prompt came from the cache."""
    timings, usage, cache = answer["timings"], answer["usage"], answer["cache"]
    if not usage["input_tokens"]:
        return "no document was read"
    total_ms = timings["ttft_ms"] + timings["generation_ms"]
    text = f"first token {timings['ttft_ms']:.0f} ms, all {total_ms:.0f} ms; {usage['input_tokens']} prompt tokens"
    if usage["cached_input_tokens"]:
        text += f", {usage['cached_input_tokens']} of them from the cache ({cache['tier']})"
    return text + ("; cut off at the length limit" if answer["truncated"] else "")


def show_hits(hits: Sequence[Mapping[str, Any]]) -> None:
    for number, hit in enumerate(hits, 1):
        out.print(f"[bold]{number}.[/bold] {escape(place_of(hit))} [dim]score {hit['score']:.3f}[/dim]")
        out.print(f"   {escape(_excerpt(hit, 300))}")
    if not hits:
        out.print("nothing found", style="yellow")


def show_collections(collections: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per collection."""
    columns = ("name", "documents", "pending", "failed", "tokens")
    rows = ([one[name] for name in columns] + ["ready" if one["state_ready"] else "-"] for one in collections)
    show_table((*columns, "state"), rows)


def show_documents(documents: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per document. On a terminal, errors follow below the table, a common collection is left out, and
    counts are if it is narrow."""
    if not documents:
        out.print("no documents", style="yellow")
        return
    columns = ["id", "collection", "file", "status", "pages", "chunks", "bytes", "why"]
    if out.is_terminal:
        several = len({document["collection"] for document in documents}) > 1
        omitted = {"why"} | ({"pages", "chunks"} if out.width < _NARROW else set())
        columns = [name for name in columns if name not in omitted and (several or name != "collection")]
    rows = [{**document, "file": document["filename"], "why": _why(document)} for document in documents]
    show_table(columns, ([row[name] for name in columns] for row in rows))
    for row in rows if out.is_terminal else ():
        if row["why"]:
            style = "red" if row["status"] == "failed" else "yellow"
            out.print(f"{escape(row['file'])}: {escape(row['why'])}", style=style)


def show_document(document: Mapping[str, Any]) -> None:
    """Print all fields of a document, one per line."""
    times = {name: _show_time(document[name]) for name in ("created_at", "updated_at")}
    show_table(("field", "value"), {**document, **times}.items())


def _show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _why(document: Mapping[str, Any]) -> str:
    error = document["last_error"]
    return f"{error['code']}: {error['message']}" if error else ""
