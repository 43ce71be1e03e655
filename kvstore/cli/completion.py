"""`kvstore completion`: a script that lets the shell complete commands and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: Annotated[Shell, Parameter(help="Which shell.")], /) -> None:
    """Print the completion script of a shell: ``eval "$(kvstore completion bash)"``."""
    from kvstore.cli.app import app

    print(app.generate_completion(prog_name="kvstore", shell=shell))
