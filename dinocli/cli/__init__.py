"""Command line, with one file per command. Nothing here imports torch before a command runs."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import Annotated

import typer

from dinocli.cli import console, eval_copies, eval_match, eval_retrieval, eval_segment, eval_track
from dinocli.cli.adapt import adapt
from dinocli.cli.anomaly import anomaly
from dinocli.cli.attn_map import attn_map
from dinocli.cli.classify import classify
from dinocli.cli.compare import compare
from dinocli.cli.curate import curate
from dinocli.cli.dedup import dedup
from dinocli.cli.demo import demo
from dinocli.cli.doctor import doctor
from dinocli.cli.export import export
from dinocli.cli.extract import extract
from dinocli.cli.finetune import finetune
from dinocli.cli.knn import knn
from dinocli.cli.linear import linear
from dinocli.cli.match import match
from dinocli.cli.mistakes import App
from dinocli.cli.pack import pack
from dinocli.cli.plot import plot
from dinocli.cli.presets import presets
from dinocli.cli.pretrain import pretrain
from dinocli.cli.push import push
from dinocli.cli.renamed import renew
from dinocli.cli.report import report
from dinocli.cli.runs import runs
from dinocli.cli.search import search
from dinocli.cli.segment import segment
from dinocli.cli.slurm import slurm
from dinocli.cli.track import track
from dinocli.cli.usage import explain
from dinocli.cli.words import Misuse
from dinocli.core import distributed
from dinocli.core.errors import DinoError
from dinocli.core.version import __version__

app = App(
    help="DINO self-supervised pretraining: train a vision transformer on unlabelled images, then extract, evaluate "
    "and draw its features and attention maps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# In the order of the help, which is the order of use. The help lists groups after the commands of their panel.
for panel, commands in {
    "Start": (demo, doctor),
    "Main job": (pretrain, adapt, finetune, slurm, runs, report, extract, knn, linear, classify, compare, attn_map),
    "Find": (search, dedup, curate, anomaly),
    "Look": (plot, segment, match, track),
    "Share": (pack, export, push),
}.items():
    for command in commands:
        # The words after the command of a job belong to that command, options too.
        apart = {"allow_interspersed_args": command is not slurm}
        app.command(rich_help_panel=panel, context_settings=apart)(command)
app.add_typer(presets, name="presets", rich_help_panel="Start")
scores = App(
    help="Score a network on labelled data: retrieval, copy detection, segmentation, matching, tracking.",
    no_args_is_help=True,
)
scores.command()(eval_retrieval.retrieval)
scores.command()(eval_copies.copies)
scores.command()(eval_segment.segment)
scores.command()(eval_match.match)
scores.command()(eval_track.track)
app.add_typer(scores, name="eval", rich_help_panel="Main job")


_SHARED = ("pretrain", "extract")  # run in several processes too
_WITHOUT_OUTPUT = ("presets", "runs", "doctor", "slurm")  # may run in each of several processes: they write no file


def _print_version(requested: bool) -> None:
    if requested:
        console.out(f"dino {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if "--help" in sys.argv:
        return
    command, found = context.invoked_subcommand, distributed.started()
    if command in _SHARED:
        distributed.check_launch(command)
        if found and found.launcher != "torchrun":
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            console.say(f"note: joining {found.size} processes started by {found.launcher}, rendezvous at {where}")
        distributed.begin()
    elif found and command not in _WITHOUT_OUTPUT:
        distributed.refuse_several(found, command or "")


def main() -> None:
    """Run a command; print a failure as `error:` and `hint:`, and exit with code 1, or 2 for a usage error."""
    # Idle OpenMP threads sleep: if they spin, a step takes four times as long on a busy machine. Must be set before
    # torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without this, garbage collection at exit scans half a million objects of torch for about a second.
    atexit.register(gc.freeze)
    words, note = renew(sys.argv[1:])
    if note:
        console.say(f"note: {note}")
    try:
        code = app(words, prog_name="dino", standalone_mode=False)
        if code == 130:  # typer's exit code for Ctrl-C, without a message
            console.say("stopped")
        sys.stdout.flush()
        distributed.end()
    except DinoError as mistake:
        code = _print_error(mistake.message, mistake.hint) + isinstance(mistake, Misuse)
    except (KeyboardInterrupt, typer.Abort):
        console.say("stopped")
        code = 130
    except BrokenPipeError:
        # The reader closed the pipe, as in `dino presets | head -1`. Without this, Python's flush at exit fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as failure:
        code = _print_error(*_explain(failure))
    except Exception as error:
        code = _handle_error(error, words)
    if code and distributed.size() > 1:
        sys.stdout.flush()
        os._exit(code)  # a normal exit closes the process group, which waits for processes that have ended
    sys.exit(code)


def _print_error(message: str, hint: str) -> int:
    """Print an error, unless another process of the run already did; return exit code 1."""
    if distributed.first_to_fail():
        console.error(message, hint)
    return 1


def _handle_error(error: Exception, typed: list[str]) -> int:
    """Print a usage error, lack of memory or the loss of a process, and return the exit code; re-raise bugs."""
    words = str(error)
    if getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message"):
        # Recognised by attributes, not by class: typer has its own copy of click's classes since 0.24.
        if not words or "Usage:" in words:
            for line in words.splitlines() or [""]:
                console.say(line)
        else:
            _print_error(*explain(error, typed))
        return 2
    if isinstance(error, MemoryError) or "out of memory" in words.lower() or "can't allocate memory" in words:
        return _print_error("not enough memory for this command", "use a smaller --batch-size, --size or --short-side")
    if distributed.lost(error):
        return _print_error(
            "another process of this run has ended or can no longer be reached",
            "run the same command again; training resumes from the last checkpoint",
        )
    if not distributed.first_to_fail():
        return 1
    raise error


def _explain(failure: OSError) -> tuple[str, str]:
    place = failure.filename or "a file of this run"
    if failure.errno == errno.ENOSPC or "No space left" in str(failure):
        return f"no space left on the disk of {place}", "free some space, or write to a folder on another disk"
    if isinstance(failure, PermissionError) or failure.errno == errno.EROFS:
        return f"no permission for {place}", "write to a folder of your own, and use inputs that you can read"
    return f"{failure.strerror or failure} ({place})", "check the path and the disk"
