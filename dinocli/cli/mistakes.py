"""Usage errors; the hint is the corrected command with the user's own values."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from dinocli.cli.layout import Layout, epilog, set_metavars, split_examples
from dinocli.cli.words import Misuse, Words, is_option
from dinocli.core.config import is_number
from dinocli.core.errors import DinoError, nearest
from dinocli.method import shipped

F = TypeVar("F", bound=Callable[..., Any])
# Options of other tools and other spellings, grouped by this tool's option.
_ALIASES = {
    "--out": "-o --output --output-dir --out-dir --outdir --save --save-dir --dest --target",
    "--batch-size": "-b --bs --batch --batchsize",
    "--k": "-k --n --neighbors --neighbours --nb-knn --top --topk --top-k --n-neighbors",
    "--help": "-h -help -?",
    "--workers": "-j --num-workers --jobs --threads --n-workers",
    "--size": "--img-size --image-size --imgsz --resolution --input-size --res",
    "--short-side": "--side --shortest-edge",
    "--mass": "--keep",
    "--truth": "--evaluate --gt --ground-truth --gnd",
    "--projection-head": "--heads --head",
    "--checkpoint": "-c -m --ckpt --weights --model --pretrained --pretrained-weights --run --arch",
    "--features": "-f --feature --feats --embeddings",
    "--to": "-t --format",
    "--blocks": "--n-last-blocks --layers --last-blocks",
    "--temperature": "--temp --tau",
    "--tokens": "--token --pool --pooling",
    "--device cuda": "--gpu --cuda",
    "--device cpu": "--cpu",
    "--data": "-d -i --dir --folder --path --images --data-path --data-dir --input --dataset",
    "--epochs": "-e --epoch",
    "--threshold": "--thresh --thr",
    "--with": "--classifier --clf --probe",
    "--sort-into": "--sort --move-into --copy-into",
}
_TARGETS = {alias: target for target, aliases in _ALIASES.items() for alias in aliases.split()}
# Options to suggest instead, in commands that lack the first one.
_INSTEAD = {"--size": ("--short-side", "--long-side"), "--data": ("--images", "--on")}
# Option that a number without an option most likely belongs to, by command.
_NUMBERS = {
    "knn": "--k", "search": "--k", "curate": "--k", "dedup": "--threshold", "doctor": "--sample",
    "extract": "--size", "compare": "--k", "export": "--size", "attn-map": "--short-side", "match": "--short-side",
    "track": "--short-side", "segment": "--short-side", "pack": "--short-side", "pretrain": "--epochs",
    "eval retrieval": "--long-side", "eval copies": "--size", "eval segment": "--short-side",
    "eval match": "--short-side", "eval track": "--short-side", "classify": "--top", "anomaly": "--short-side",
    "plot": "--clusters",
}  # fmt: skip
_SIDES = ("--size", "--short-side", "--long-side")
_VALUES = {
    "--to": ("official", "timm", "onnx", "torch-export"),
    "--tokens": ("cls", "patches", "cls+avg"),
    "--network": ("teacher", "student"),
    "--device": ("cpu", "cuda", "mps", "auto"),
    "--dtype": ("float16", "float32"),
    "--index": ("exact", "ivf", "hnsw"),
    "--film": ("strip", "gif", "mp4"),
    "--by": ("cut", "border", "attention", "pca"),
}
_TAKE_IMAGES = (
    "extract",
    "pack",
    "doctor",
    "attn-map",
    "segment",
    "search",
    "classify",
    "anomaly",
    "track",
    "eval segment",
    "eval track",
)
_OF_IMAGES = ("--data", "--checkpoint", "--size", "--tokens", "--device cuda", "--batch-size", "--workers")
_EXAMPLES = {
    "pretrain": "dino pretrain IMAGES --preset tiny",
    "report": "dino report runs/tiny-1 runs/tiny-2",
    "extract": "dino extract ckpt.safetensors IMAGES",
    "compare": "dino compare RUN OTHER --on IMAGES",
    "curate": "dino curate features --clusters 100",
    "attn-map": "dino attn-map photo.jpg",
    "eval retrieval": "dino eval retrieval gnd_roxford5k.pkl",
    "eval copies": "dino eval copies COPIES",
    "eval match": "dino eval match a.jpg b.jpg --keypoints points.csv",
    "eval track": "dino eval track FRAMES --mask first.png --truth MASKS",
    "anomaly": "dino anomaly NORMAL --test IMAGES",
    "match": "dino match a.jpg b.jpg",
    "track": "dino track FRAMES --mask first.png",
    "export": "dino export --to onnx",
    "pack": "dino pack IMAGES SHARDS",
    "presets show": "dino presets show vits16",
}
_REQUIRED = {"--on": "IMAGES", "--mask": "first.png", "--keypoints": "points.csv", "--truth": "MASKS"}
_COMMANDS = {
    "pretrain": "train fit pretraining",
    "extract": "embed features feature extraction encode",
    "knn": "evaluate test k-nn score accuracy",
    "classify": "infer predict inference label classification",
    "linear": "probe lineareval linear-probe linear-eval eval-linear",
    "runs": "list ls experiments",
    "report": "plot curves plots graph tensorboard",
    "compare": "diff versus vs benchmark",
    "eval retrieval": "retrieval oxford paris",
    "eval copies": "copies copydays copy-detection",
    "search": "find query retrieve",
    "anomaly": "anomalies defects outliers patchcore inspect",
    "plot": "scatter pca tsne t-sne umap project embedding",
    "dedup": "duplicates deduplicate dedupe",
    "attn-map": "attention attn attention-map attn_map attnmap visualize visualise attention-maps",
    "export": "convert save onnx",
    "push": "upload publish",
    "pack": "shard tar webdataset",
    "doctor": "check info env status diagnose",
    "presets": "preset list models configs config recipes",
    "demo": "example tutorial quickstart",
    "--version": "version -v -V -version",
    "--help": "help -h -help -?",
}


class Command(Layout, TyperCommand):
    """Command whose usage errors have the corrected command as a hint."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line's parts: `IMAGES`, or `[IMAGES]` if it is optional, without typer's braces."""
        arguments = [p for p in self.params if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(str(p.metavar) if p.required else f"[{p.metavar}]" for p in arguments)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, after checking for mistakes that the parser explains poorly."""
        path = ctx.command_path.partition(" ")[2] or str(self.name)
        words = Words.of(path, args, self.params)
        if words.places and not ctx.allow_interspersed_args:  # the rest are the words of another command
            words = Words.of(path, args[: words.places[0] + 1], self.params)
        words.keep(ctx)
        if not ctx.resilient_parsing and "--help" not in args:
            _check(words, self.params)
        try:
            return super().parse_args(ctx, args)
        except DinoError:
            raise
        except Exception as error:
            mistake = _explain(words, error)
            if mistake is None:
                raise
            raise mistake from error

    def invoke(self, ctx: Any) -> Any:
        """Check that all numbers are finite, and run the command. The parser accepts nan, which no bound excludes."""
        for name, value in ctx.params.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    option = f"--{name.replace('_', '-')}"
                    raise Misuse(f"{option} {number} is not a finite number", f"use {option} NUMBER")
        return super().invoke(ctx)


class Group(Layout, TyperGroup):
    """Group of commands that suggests the nearest one for an unknown command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; treat `dino --help knn` as `dino knn --help`."""
        if len(args) == 2 and args[0] == "--help" and args[1] in self.commands:
            args = [args[1], "--help"]
        first = args[0] if args else ""
        if first.startswith("-") and not ctx.resilient_parsing and first not in self._options():
            raise self._explain_unknown(ctx, first, args[1:])
        return super().parse_args(ctx, args)

    def _options(self) -> set[str]:
        return {name for p in self.params for name in p.opts} | {"--help", "--install-completion", "--show-completion"}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command named by the first word."""
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise self._explain_unknown(ctx, args[0], args[1:])
        return super().resolve_command(ctx, args)

    def _explain_unknown(self, ctx: Any, word: str, rest: list[str]) -> Misuse:
        path = ctx.command_path
        fault = f"{path} has no {'option' if word.startswith('-') else 'command'} {word}"
        if path.endswith("presets"):
            close = nearest(word, [*shipped.names(), *shipped.stages()], least=0.5)
            return Misuse(fault, f"dino presets show {close}" if close else "dino presets, which lists them")
        if path.endswith("eval"):
            return Misuse(fault, self._suggest_in_group(path, ctx.find_root().command, word, rest))
        if Path(word).exists() and (hint := _suggest_for_path(word)):
            return Misuse(fault, hint)
        target = word.lower().replace("_", "-") if word.lower().replace("_", "-") in self.commands else ""
        target = target or next((name for name, others in _COMMANDS.items() if word in others.split()), "")
        if target == "--help" and rest and rest[0] in self.commands:
            return Misuse(fault, f"dino {rest[0]} --help")
        if target.startswith("--"):
            return Misuse(fault, f"dino {target}")
        if not target and word.startswith("-"):
            owner = next((n for n, c in self.commands.items() for p in c.params if word.split("=")[0] in p.opts), "")
            hint = f"name the command first: {shlex.join(['dino', owner, word, *rest])}" if owner else "dino --help"
            return Misuse(f"{fault}" if not owner else f"{word} is an option of a command; no command was given", hint)
        if not target:
            target = nearest(word, self.commands, least=0.6)
        if target:
            again = shlex.join(["dino", *target.split(), *rest])
            return Misuse(fault, f"{again} (labelled data: or dino linear)" if target == "knn" and not rest else again)
        return Misuse(fault, "dino --help, which lists the commands")

    def _suggest_in_group(self, path: str, root: Any, word: str, rest: list[str]) -> str:
        """Return the hint for an unknown command of a group: the nearest one of the group, else of `dino`."""
        if close := nearest(word, self.commands, least=0.6):
            return shlex.join([*path.split(), close, *rest])
        if close := nearest(word, root.commands, least=0.8):
            return shlex.join(["dino", close, *rest])
        return f"{path} --help, which lists the commands"


def _suggest_for_path(word: str) -> str:
    from dinocli.weights.identify import WEIGHTS, kind_of

    kind = kind_of(word)
    if kind in WEIGHTS:
        return f"dino extract {shlex.quote(word)} IMAGES"
    if kind == "features":
        return f"dino knn --features {shlex.quote(word)}"
    if kind == "image":
        return f"dino attn-map {shlex.quote(word)}"
    return f"dino pretrain {shlex.quote(word)}" if kind in ("images", "source") else ""


class App(typer.Typer):
    """Typer application that builds its commands with `Command` and `Group`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Register a command, as `typer.Typer.command` does, with the examples of its docstring."""

        def register(function: F) -> F:
            text, examples = split_examples(function)
            set_metavars(function)
            again = super(App, self).command(name, cls=Command, help=text, epilog=epilog(examples), **settings)
            return again(function)

        return register

    def callback(self, **settings: Any) -> Callable[[F], F]:
        """Register the function of a group, as `typer.Typer.callback` does, with the examples of its docstring."""

        def register(function: F) -> F:
            text, examples = split_examples(function)
            set_metavars(function)
            if text:
                settings.update(help=text, epilog=epilog(examples))
            return super(App, self).callback(**settings)(function)

        return register


def _check(words: Words, parameters: Sequence[Any]) -> None:
    name = words.command
    for i, word in enumerate(words.typed):
        if word[:1] in ("–", "—"):
            fixed = "--" + word.lstrip("–—-")
            raise Misuse(
                f"{word} begins with a long dash; expected two hyphens, as in --out", words.again({i: [fixed]})
            )
    for i, word in enumerate(words.typed):
        if i in words.places or (i and words.known.get(words.typed[i - 1])):
            continue
        if word == "--":
            break
        # usage.py explains options of `pretrain`: it knows the preset's keys, such as that for --lr.
        if is_option(word) and word.partition("=")[0] not in words.known:
            if name == "pretrain":
                return
            raise _explain_unknown_option(words, i)
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    several = any(p.nargs == -1 for p in arguments)
    most = 2 if name == "extract" and "--merge" not in words.typed else None if several else len(arguments)
    if name == "pretrain":
        _check_values(words)
    if most is None:
        return
    _check_shell_pattern(words, most)
    # The shell splits unquoted brackets after --set into words; usage.py explains that.
    if len(words.places) <= most or "--set" in words.typed:
        return
    raise _explain_surplus(words, most)


def _check_values(words: Words) -> None:
    """Refuse values without their option among several places of images.

    Raises:
        Misuse: If a place that does not exist belongs to --set, or is the value of another option.
    """
    from dinocli.cli.usage import suggest_set
    from dinocli.weights.identify import kind_of

    extra = [word for word in words.positional[1:] if kind_of(word) == "missing"]
    if hint := suggest_set(words.typed, extra) if extra and "--set" in words.typed else "":
        raise Misuse(f"dino pretrain takes images; unexpected argument {extra[0]}", hint)
    if any(_guess_option(words, word) for word in extra):
        raise _explain_surplus(words, 1)


def _explain_unknown_option(words: Words, index: int) -> Misuse:
    option, equals, value = words.typed[index].partition("=")
    fault = f"dino {words.command} has no option {option}"
    plain = option.lower().replace("_", "-")
    plain = plain if plain.startswith("--") or plain in _TARGETS else f"-{plain}"
    target = plain if plain in words.known or plain in _ALIASES else _TARGETS.get(plain, "")
    target = next((name for name in (target, *_INSTEAD.get(target, ())) if name in words.known), target)
    if target == "--help":
        return Misuse(fault, f"dino {words.command} --help")
    if target in ("--device cuda", "--device cpu") and "--device" in words.known:
        return Misuse(fault, words.again({index: target.split()}))
    if target not in words.known:
        if target in ("--data", "--out") and (moved := _move_to_arguments(words)):
            return Misuse(f"{fault}; that is an argument", moved)
        if target in _OF_IMAGES and "--features" in words.known:
            hint = f"dino extract CHECKPOINT IMAGES with that option, then dino {words.command}"
            return Misuse(f"{fault}: it reads features", hint)
        target = nearest(plain, words.known, least=0.6)
    if not target:
        return Misuse(fault, f"dino {words.command} --help, which lists its options")
    return Misuse(fault, words.again({index: [f"{target}={value}" if equals else target]}))


def _move_to_arguments(words: Words) -> str:
    """Return the command with the values of --data and --out as arguments, or an empty string if it takes none."""
    takes = {"--data": words.command in _TAKE_IMAGES, "--out": words.command in ("pack", "push")}
    found: dict[str, list[str]] = {target: [] for target in takes}
    rest, typed = [], list(words.typed)
    while typed:
        word = typed.pop(0)
        name, equals, value = word.partition("=")
        target = name if name in found else _TARGETS.get(name.lower().replace("_", "-"), "")
        if not takes.get(target) or name in words.known or not (equals or (typed and not is_option(typed[0]))):
            rest.append(word)
        else:
            found[target].append(value if equals else typed.pop(0))
    moved = [*(found["--data"] if found["--out"] else []), *rest]
    if words.command == "push" and found["--out"] and all(is_option(word) for word in rest):
        moved.insert(0, "CHECKPOINT")  # comes before OUT
    moved += found["--out"] or found["--data"]
    return shlex.join(["dino", words.command, *moved]) if len(rest) < len(words.typed) else ""


def _check_shell_pattern(words: Words, most: int) -> None:
    """Refuse the many files or folders of an expanded shell pattern, if the command takes one folder.

    Raises:
        Misuse: If there are two or more images, or more files or folders than the command takes.
    """
    from dinocli.weights.identify import WEIGHTS, kind_of

    if words.command not in ("extract", "doctor", "pack") or len(words.places) < 2:
        return
    kinds = [kind_of(word) for word in words.positional]
    walls: dict[str, list[str]] = {"image files": ["image"]}
    if len(kinds) > most or (words.command == "extract" and all("/" in word for word in words.positional)):
        walls |= {"folders": ["images"], "files": ["image", "file", "video"]}
    for what, those in walls.items():
        wall = [word for word, kind in zip(words.positional, kinds, strict=True) if kind in those]
        if len(wall) < 2:
            continue
        others = [word for word in words.positional if word not in wall]
        if words.command == "extract":
            others = [word for word in others if kind_of(word) in WEIGHTS][:1]
        folders = {str(Path(word).parent) for word in wall}
        together = len(folders) == 1 and (what != "folders" or "." not in folders)
        images = folders.pop() if together else "list.txt"
        shards = others or [f"{Path(images).name or 'images'}-shards"]
        first = {"extract": [*others, images], "pack": [images, shards[-1]]}
        hint = words.ordered(first.get(words.command, [images]))
        if not together:
            listed = (
                f"find {shlex.join(wall[:3])} -type f > list.txt"
                if what == "folders"
                else "one name per line in list.txt"
            )
            hint = f"{listed}, then {hint}"
        came = f"{len(wall)} {what} ({wall[0]} ...)" + ", as from an unquoted *" * together
        raise Misuse(f"dino {words.command} takes one folder; got {came}", hint)


def _explain_surplus(words: Words, most: int) -> Misuse:
    """Return the error for more positional words than the command takes."""
    name = words.command
    takes = (
        "dino pretrain takes images"
        if name == "pretrain"
        else f"dino {name} takes {('no argument', 'one argument', 'two arguments')[min(most, 2)]}"
    )
    if name == "linear" and is_number(words.positional[0]):
        hint = "dino linear, which tries 13 learning rates (--lr is for --paper DATA)"
        return Misuse(f"{takes}; unexpected argument {words.positional[0]}", hint)
    for i in reversed(words.places):
        word = words.typed[i]
        if "--save" in words.known and i and words.typed[i - 1] == "--save":
            return Misuse(f"--save takes no value; unexpected {word}", words.again({i: ["--out", word]}))
        if option := _guess_option(words, word):
            value = _choose_value(option[0], float(word)) if is_number(word) else word
            return Misuse(f"{takes}; unexpected argument {word}", words.again({i: [*option, value]}))
    if name == "export":
        return _explain_export_order(words)
    if most == 0 and "--features" in words.known:
        return Misuse(
            f"{takes} and reads features; unexpected argument {words.positional[0]}",
            _suggest_features(name, words.positional[0]),
        )
    extra, others = words.positional[most], len(words.places) - most - 1
    more = f" and {others} more" if others else ""
    hint = f"dino {name} --help"
    if name == "demo":
        hint = (
            f"dino pretrain IMAGES --preset {extra}" if extra in shipped.names() else words.ordered([], "--out", extra)
        )
    return Misuse(f"{takes}; unexpected argument {extra}{more}", hint)


def _suggest_features(command: str, word: str) -> str:
    """Return the hint for a command that reads features and was given something else."""
    from dinocli.weights.identify import WEIGHTS, kind_of

    kind, quoted = kind_of(word), shlex.quote(word)
    if kind in WEIGHTS:
        return f"dino extract {quoted} IMAGES, then dino {command}"
    if kind in ("images", "source"):
        return f"dino extract ckpt.safetensors {quoted}, then dino {command}"
    return f"dino {command} --features {quoted}"


def _choose_value(option: str, number: float) -> str:
    """Return a valid value of an option that is closest to what a bare number most likely meant."""
    if option == "--threshold":
        return f"{number / 100 if 1 < number <= 100 else min(max(number, -1), 1):g}"
    least = {"--k": 20, **dict.fromkeys(_SIDES, 224)}.get(option, 1)
    return str(least if number < (8 if option in _SIDES else 1) else round(number))


def _guess_option(words: Words, word: str) -> list[str]:
    """Return the option that a bare word most likely belongs to, such as `["--to"]` for onnx, else an empty list."""
    from dinocli.weights.identify import WEIGHTS, kind_of

    free = [option for option in words.known if not words.value([option])]
    kind = kind_of(word)
    of_kind = {"features": "--like" if words.command == "curate" else "--features", "image": "--mask"}
    if kind != "missing":
        option = "--checkpoint" if kind in WEIGHTS else of_kind.get(kind, "")
        if option == "--checkpoint" and words.command in ("extract", "export", "push"):
            return []  # of these it is an argument, in the wrong order
        # The first word of curate is its pool.
        return [option] if option in free and not (option == "--like" and word == words.positional[0]) else []
    if is_number(word):
        return [option for option in [_NUMBERS.get(words.command, "")] if option in free]
    values = {**_VALUES, "--preset": (*shipped.names(), *shipped.stages())}
    return [option for option, those in values.items() if option in free and word in those][:1]


def _explain_export_order(words: Words) -> Misuse:
    """Return the error for `dino export OUT RUN` and `dino export RUN OUT`, because the output is an option."""
    from dinocli.weights.identify import WEIGHTS, kind_of

    fault = "dino export takes one argument, the run or checkpoint"
    run = next((word for word in words.positional if kind_of(word) in WEIGHTS), "")
    others = [word for word in words.positional if word != run]
    if not run or len(others) != 1:
        return Misuse(f"{fault}; got {len(words.places)}", "dino export CHECKPOINT --to onnx --out FILE")
    out = others[0]
    ends = {".pth": "official", ".pt": "official", ".onnx": "onnx", ".pt2": "torch-export"}
    to = [] if words.value(["--to"]) else ["--to", ends.get(Path(out).suffix, "timm")]
    return Misuse(f"{fault}; unexpected argument {out}", words.ordered([run], *to, "--out", out))


def _explain(words: Words, error: Exception) -> Misuse | None:
    """Add a hint to a parser error, or return None.

    Errors are recognised by attributes, because typer has its own copy of click's classes.
    """
    parameter = getattr(error, "param", None)
    if getattr(error, "exit_code", None) != 2 or not hasattr(error, "format_message") or words.command == "pretrain":
        return None
    fault = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    hint = ""
    if type(error).__name__ == "MissingParameter":
        hint = _suggest_missing(words, parameter)
    elif option := getattr(error, "option_name", "") if "requires an argument" in fault else "":
        hint = f"dino {words.command} {option} VALUE"
    return Misuse(fault, hint) if hint else None


def _suggest_missing(words: Words, parameter: Any) -> str:
    if parameter is not None and "--to" in parameter.opts:
        for i in words.places:
            if words.typed[i] in _VALUES["--to"]:
                return words.again({i: ["--to", words.typed[i]]})
        return words.again({}, "--to", "onnx")
    for option, value in _REQUIRED.items():
        if parameter is not None and option in parameter.opts:
            return words.again({}, option, value)
    if words.command in ("attn-map", "search", "segment", "classify"):
        return words.again({}, "photo.jpg")
    if words.command == "pack" and words.places:
        return words.again({}, f"{Path(words.positional[0]).name or 'images'}-shards")
    if words.command in ("match", "eval match") and words.places:
        return words.again({}, "b.jpg")
    return _EXAMPLES.get(words.command, "")
