"""The command line: `ls` this folder to see the commands. Nothing here imports torch before a command has to run."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import Annotated

import typer

import dinocli
from dinocli import console, distributed
from dinocli.cli.attn_map import attn_map
from dinocli.cli.curate import curate
from dinocli.cli.dedup import dedup
from dinocli.cli.demo import demo
from dinocli.cli.doctor import doctor
from dinocli.cli.export import export
from dinocli.cli.extract import extract
from dinocli.cli.knn import knn
from dinocli.cli.linear import linear
from dinocli.cli.match import match
from dinocli.cli.mistakes import App
from dinocli.cli.pack import pack
from dinocli.cli.presets import presets
from dinocli.cli.pretrain import pretrain
from dinocli.cli.push import push
from dinocli.cli.search import search
from dinocli.cli.segment import segment
from dinocli.cli.track import track
from dinocli.cli.usage import explain
from dinocli.cli.words import Misuse
from dinocli.errors import DinoError

app = App(
    help="DINO self-supervised pretraining: a folder of unlabelled images to a vision transformer, its features, its "
    "scores and its attention maps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(pack)
app.command()(pretrain)
app.command()(extract)
app.command()(knn)
app.command()(linear)
app.command()(search)
app.command()(dedup)
app.command()(curate)
app.command()(attn_map)
app.command()(match)
app.command()(track)
app.command()(segment)
app.command()(export)
app.command()(push)
app.add_typer(presets, name="presets")
app.command()(demo)


_SHARED = ("pretrain", "extract")  # by several processes


def _version(asked: bool) -> None:
    if asked:
        console.out(f"dino {dinocli.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if "--help" in sys.argv:
        return
    command, found = context.invoked_subcommand, distributed.started()
    if command in _SHARED:
        distributed.check_launch(command)
        if found and found.launcher != "torchrun":
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            console.say(f"note: joining {found.size} processes of {found.launcher}, which meet at {where}")
        distributed.begin()
    # RANK and WORLD_SIZE alone may be about a whole container, in which other commands run once.
    elif found and found.launcher != "torch.distributed":
        raise DinoError(
            f"dino {command} is done by one process; {found.size or 'several'} were started",
            f"leave {found.launcher} out: dino {command} ...",
        )


def main() -> None:
    """Run a command; a mistake becomes `error:` and `hint:`, and exit code 1, or 2 where it is one of usage."""
    # Threads that wait without spinning: on a busy machine a step otherwise takes four times as long. It must be set
    # before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The interpreter looks through half a million objects of torch before it ends, which takes a second.
    atexit.register(gc.freeze)
    try:
        code = app(prog_name="dino", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C, without a word
            console.say("stopped")
        sys.stdout.flush()
        distributed.end()
    except DinoError as mistake:
        code = _said(mistake.message, mistake.hint) + isinstance(mistake, Misuse)
    except (KeyboardInterrupt, typer.Abort):
        console.say("stopped")
        code = 130
    except BrokenPipeError:
        # Whoever read our output has enough, as in `dino presets | head -1`; nothing is left to be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as failure:
        code = _said(*_explain(failure))
    except Exception as error:
        code = _told(error)
    if code and distributed.size() > 1:
        sys.stdout.flush()
        os._exit(code)  # at once: what lies open between processes would wait for those that are gone
    sys.exit(code)


def _said(message: str, hint: str) -> int:
    """Say what went wrong, unless another process of the run has said why it ends; the exit code."""
    if distributed.first_to_fail():
        console.error(message, hint)
    return 1


def _told(error: Exception) -> int:
    """Say what a parser or an allocator raised and return the exit code; anything else is a defect of ours."""
    words = str(error)
    if getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message"):
        # By its face and not its class: typer has carried a copy of click's classes since 0.24.
        if not words or "Usage:" in words:
            for line in words.splitlines() or [""]:
                console.say(line)
        else:
            _said(*explain(error, sys.argv[1:]))
        return 2
    if isinstance(error, MemoryError) or "out of memory" in words.lower() or "can't allocate memory" in words:
        return _said("there is too little memory for this", "a smaller --batch-size or --size")
    if distributed.lost(error):
        return _said(
            "another process of this run has ended, or cannot be reached any more",
            "the same command again; a training run goes on from its last saved state",
        )
    if not distributed.first_to_fail():
        return 1
    raise error


def _explain(failure: OSError) -> tuple[str, str]:
    place = failure.filename or "a file of this run"
    if failure.errno == errno.ENOSPC or "No space left" in str(failure):
        return f"no space left on the disk of {place}", "free some space, or name another place with --out"
    if isinstance(failure, PermissionError) or failure.errno == errno.EROFS:
        return f"no permission for {place}", "name a place of your own (--out), or files that you may read"
    return f"{failure.strerror or failure} ({place})", "check that path and that disk"
