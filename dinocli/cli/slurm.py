"""`dino slurm`: job scripts for a SLURM cluster."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import MACHINE
from dinocli.cli.words import Misuse, is_option
from dinocli.core.errors import DinoError, nearest

_SHARED = ("pretrain", "extract")  # run in several processes, with torchrun
_TRAINS = ("pretrain", "adapt", "finetune")  # save and end on USR1, and resume in the same run folder
# Options that name inputs.
_INPUTS = frozenset(
    "--checkpoint --data --features --from --images --init --keypoints --mask --monitor --normal --on --paper --seeds "
    "--teacher --test --train --truth --with".split()
)
_GRACE = 120  # seconds between USR1 and the time limit


def slurm(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...", help="Command to run, with its arguments and options: pretrain, extract, adapt, ..."
        ),
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.", rich_help_panel=MACHINE)] = 1,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs per machine; one process runs on each. 0: CPU.", rich_help_panel=MACHINE)
    ] = 1,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU cores per machine. Default: the cluster's.", rich_help_panel=MACHINE)
    ] = None,
    time: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Time limit of a job, such as 8:00:00 or 2-00:00:00.", rich_help_panel=MACHINE
        ),
    ] = "24:00:00",
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="Partition. Default: the cluster's.", rich_help_panel=MACHINE)
    ] = None,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Account to charge.", rich_help_panel=MACHINE)
    ] = None,
) -> None:
    """Print a SLURM job script for a command; options of the job come before the command.

    Before the time limit, a training saves and ends, the job is queued again, and the same command resumes.

    Examples:
        dino slurm --nodes 2 --gpus 4 pretrain ./images > job.sbatch
        dino slurm --partition gpu --time 8:00:00 knn | sbatch
    """
    name, *rest = words
    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    if name == "slurm" or name not in commands:
        raise Misuse(f"dino slurm has no command {name}", f"dino slurm {nearest(name, {*commands} - {'slurm'})} ...")
    _check_job(name, rest, nodes, gpus, {"--time": time, "--partition": partition, "--account": account})
    # Mistakes in the command are reported now, not when the job starts.
    for option, place in _missing(commands[name], name, rest, context.find_root()):
        console.say(f"note: {option}{place} does not exist here; the job needs it on its machines")
    for line in _script(words, nodes, gpus, cpus, time, partition, account):
        console.out(line)
    console.saved([], "sbatch FILE, with the script in FILE")


def _missing(command: Any, name: str, rest: list[str], parent: Any) -> Iterator[tuple[str, str]]:
    """Parse a command, and return its inputs that are not on this machine, each after its option.

    They are no error, because a job may run on machines with other disks.
    """
    inner = command.make_context(name, list(rest), parent=parent)
    if hasattr(command, "commands"):
        word, subcommand, rest = command.resolve_command(inner, rest)
        yield from _missing(subcommand, word, rest, inner)
        return
    from dinocli.data.sources.several import split_weight
    from dinocli.weights.identify import kind_of

    for each in command.params:
        option = "" if each.param_type_name == "argument" else f"{each.opts[-1]} "
        values = inner.params.get(each.name)
        if each.name == "out" or (option and option.strip() not in _INPUTS):
            continue
        for value in values if isinstance(values, list | tuple) else [values]:
            place = split_weight(str(value))[0]
            if value is not None and kind_of(place) in ("missing", "pattern"):
                yield option, place


def _check_job(name: str, rest: list[str], nodes: int, gpus: int, texts: dict[str, str | None]) -> None:
    """Check the options of the job.

    Raises:
        DinoError: If a value is invalid, or the command runs in one process and the job has several.
    """
    for option, value in texts.items():
        valid = r"(\d+-)?\d+(:\d+){0,2}" if option == "--time" else r"[\w.,@+-]+"
        if value is not None and not re.fullmatch(valid, value):
            expected, hint = ("a time", "8:00:00") if option == "--time" else ("a name", "NAME")
            raise DinoError(f"{option} {value!r} is invalid; expected {expected}", f"use {option} {hint}")
    if "--gpus" in rest or any(word.startswith("--gpus=") for word in rest):
        raise DinoError(f"--gpus comes before {name}: the job has them", f"dino slurm --gpus N {name} ...")
    if name not in _SHARED and (nodes > 1 or gpus > 1):
        raise DinoError(
            f"dino {name} runs in one process; --nodes {nodes} --gpus {gpus} is a job of {nodes * max(1, gpus)}",
            f"dino slurm --nodes 1 --gpus 1 {name} ...",
        )


def _script(
    words: list[str], nodes: int, gpus: int, cpus: int | None, time: str, partition: str | None, account: str | None
) -> Iterator[str]:
    """Yield the lines of a job script."""
    name = words[0]
    directives = {
        "job-name": f"dino-{name}",
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus or None,
        "cpus-per-task": cpus,
        "time": time,
        "partition": partition,
        "account": account,
        "signal": f"B:USR1@{_GRACE}",
        "open-mode": "append",
        "output": f"dino-{name}-%j.log",
    }
    yield "#!/bin/bash"
    yield from (f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None)
    yield "#SBATCH --requeue"
    yield ""
    yield f"# {_GRACE} seconds before the time limit, SLURM sends USR1 to this script, which passes it on. The command"
    yield "# saves and ends, and the job is queued again. It then runs the same command, which resumes."
    yield "stopped="
    yield "trap 'stopped=1; scancel --signal=USR1 \"$SLURM_JOB_ID\"' USR1"
    yield ""
    yield f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    if nodes > 1:
        yield 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    srun = "srun" + (f" --cpus-per-task={cpus}" if cpus else "")  # srun does not inherit it from sbatch
    if name in _TRAINS:
        yield "# torchrun would end on USR1; ignored here, it reaches the training, which handles it."
        srun += ' bash -c \'trap "" USR1; exec "$@"\' bash'
    yield f"{srun} \\"
    if name in _SHARED:
        meeting = (
            '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))"'
            if nodes > 1
            else "--standalone"
        )
        yield f"  torchrun --nnodes={nodes} --nproc-per-node={max(1, gpus)} {meeting} \\"
        run = f"-m dinocli {shlex.join(words)}"
    else:
        run = f"dino {shlex.join(words)}"
    out = any(is_option(word) and word.partition("=")[0] == "--out" for word in words)
    # A job that is queued again keeps its number, so it finds its run.
    yield f"  {run}" + (f' --out "runs/{name}-$SLURM_JOB_ID"' if name in _TRAINS and not out else "") + " &"
    yield "wait $!"
    yield "code=$?"
    yield 'if [ -n "$stopped" ]; then'
    yield "  wait $!"
    yield '  scontrol requeue "$SLURM_JOB_ID"'
    yield "fi"
    yield 'exit "$code"'
