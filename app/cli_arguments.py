"""Arguments and options of commands for documents and keys; options of all commands are in cli_options.py."""

from typing import Annotated

import typer

from retrieval.types import Role

_Document = typer.Argument(metavar="ID", help="As shown by `documents list`.")
DocumentId, DocumentIds = Annotated[str, _Document], Annotated[list[str], _Document]
KeyRole = Annotated[
    Role,
    typer.Option(
        metavar="ROLE", help="reader: asks; writer: also adds and deletes documents; admin: also manages keys."
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As shown by `keys list`, not the key itself.")]
Limit = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Limit of this key; 0: none. Default: the service's.")
]
