"""The commands on collections, a part of cli.py."""

import typer

from app import render
from app.cli_options import DataDirectory, Json, Key, Url, choose_settings

collections = typer.Typer(help="List collections.", no_args_is_help=True)


@collections.callback()  # or its only command would be the group itself
def _group() -> None:
    pass


@collections.command("list")
def list_collections(url: Url = None, key: Key = None, data_dir: DataDirectory = None, as_json: Json = False) -> None:
    """All collections with their documents and tokens, oldest first.

    Where the state is ready, a running service has read the whole collection: the next question starts at once.
    """
    from app.client import connect

    with connect(choose_settings(url, key, data_dir, known=True), answering=False) as service:
        found = service.request("GET", "/v1/collections")
    render.print_json(found) if as_json else render.show_collections(found["data"])
