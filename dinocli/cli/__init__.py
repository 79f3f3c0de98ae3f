"""The command line: `ls` this folder to see the commands. Nothing here imports torch before a command has to run."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

import dinocli
from dinocli import console
from dinocli.cli.attn_map import attn_map
from dinocli.cli.demo import demo
from dinocli.cli.extract import extract
from dinocli.cli.knn import knn
from dinocli.cli.linear import linear
from dinocli.cli.presets import presets
from dinocli.cli.pretrain import pretrain
from dinocli.errors import DinoError

app = typer.Typer(
    help="DINO self-supervised pretraining: a folder of unlabelled images to a vision transformer, its features, its "
    "scores and its attention maps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(pretrain)
app.command()(extract)
app.command()(knn)
app.command()(linear)
app.command()(attn_map)
app.add_typer(presets, name="presets")
app.command()(demo)


def _version(asked: bool) -> None:
    if asked:
        console.out(f"dino {dinocli.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; a mistake of the user's becomes `error:` and `hint:` and exit code 1."""
    # Threads that wait without spinning: on a busy machine a step otherwise takes four times as long. It must be set
    # before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except DinoError as mistake:
        console.error(mistake.message, mistake.hint)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has enough, as in `dino presets | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as failure:
        message, hint = _explain(failure)
        console.error(message, hint)
        sys.exit(1)


def _explain(failure: OSError) -> tuple[str, str]:
    place = failure.filename or "the disk"
    if failure.errno == errno.ENOSPC or "No space left" in str(failure):
        return f"no space left to write {place}", "free some space, or name another place with --out"
    if isinstance(failure, PermissionError) or failure.errno in (errno.EROFS, errno.EACCES) or "denied" in str(failure):
        return f"no permission to write {place}", "name a place of your own with --out"
    return f"{failure.strerror or failure} ({place})", "check that path and that disk"
