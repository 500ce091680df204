"""Arguments and options of commands for documents and keys; options of all commands are in cli_options.py."""

from typing import Annotated

import typer

from retrieval.types import Role

_Document = typer.Argument(metavar="ID", help="As `documents list` shows it.")
DocumentId, DocumentIds = Annotated[str, _Document], Annotated[list[str], _Document]
KeyRole = Annotated[
    Role,
    typer.Option(
        metavar="ROLE", help="reader: asks; writer: also adds and deletes documents; admin: also handles keys."
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it, not the key.")]
Limit = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Limit of this key; 0: none. Default: the service's.")
]
