"""Options that commands of cli.py share, and the settings that follow from them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from app.datadir import DataDir
from app.field_checks import in_plain_words
from app.settings import Settings, load_settings

Url = Annotated[
    str | None, typer.Option("--url", help="Talk to a running service. (Or: JAMBA_RAG_URL in the environment.)")
]
Key = Annotated[str | None, typer.Option("--key", help="API key for --url. (Or: JAMBA_RAG_KEY in the environment.)")]


def _directory(name: str) -> Path:
    if not name:  # an unset shell variable; Path("") would be the working directory
        raise typer.BadParameter("must name a directory")
    return Path(name)


def _json_object(text: str) -> str:
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise typer.BadParameter("must be a JSON object, such as '{\"year\": 2024}'")
    return text


DataDirectory = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        parser=_directory,
        metavar="PATH",
        help="Work in process on this directory. (Or: JAMBA_RAG_DATA_DIR in the environment.)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Collection = Annotated[str, typer.Option("--collection", "-c", help="Collection to work on.")]
Metadata = Annotated[
    str | None, typer.Option(parser=_json_object, metavar="JSON", help="A JSON object kept with every document.")
]


def choose_settings(
    url: str | None, key: str | None, data_dir: Path | None, known: bool = False, **groups: Any
) -> Settings:
    """Settings from the environment, overridden by the command line. Raises SettingsError, and ValueError if the data
    directory must be `known`, that is, already have a database, and has none."""
    given: dict[str, Any] = {"url": url, "key": key, "data_dir": data_dir}
    given = {name: value for name, value in given.items() if value is not None}
    if data_dir is not None and url is None:
        given["url"] = None  # --data-dir overrides a URL in the environment
    settings = load_settings(**given, **groups)
    known = known and settings.url is None and not settings.data_dir.is_file()
    if known and not DataDir.database_in(settings.data_dir).is_file():
        raise ValueError(
            f"{settings.data_dir} holds no documents and no keys: name another directory with --data-dir, or a service "
            "with --url, or begin with `jamba-rag ingest` or `jamba-rag serve`"
        )
    return settings


class PlainGroup(TyperGroup):
    """A command group that reports wrong usage in plain words, not in pydantic's."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = in_plain_words(error.message)
            raise
