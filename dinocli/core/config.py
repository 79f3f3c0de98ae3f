"""Config: base class of every table of a preset, overrides of single keys, and errors that suggest a fix."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from dinocli.core.errors import DinoError, nearest

_MAX_DEPTH = 32  # levels of nested tables and lists; a preset has about 6
LARGEST = 3.4028234663852886e38  # largest finite float32


class Config(BaseModel):
    """Frozen settings in which an unknown key is an error.

    Fields that define a recipe have no default: a preset must state them. Every other default switches its feature off
    (no warm-up, no drop path). Numbers must be finite.
    """

    # TOML and JSON readers accept nan and inf, but a learning rate of nan destroys all weights in one step.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: dict[str, Any], what: str) -> Self:
        """Validate `data`; an error names the first wrong key.

        Args:
            data: Nested plain values, as `tomllib` or `json` return them.
            what: Name of the data for the error line, such as `preset vits16`.

        Raises:
            DinoError: If a key is unknown or missing, or a value is out of range.
        """
        if _is_deeper_than(data, _MAX_DEPTH):
            raise DinoError(
                f"{what} is nested more than {_MAX_DEPTH} levels deep", "nest its tables and lists less deeply"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            errors = error.errors()
            # A union reports an error for each member. That a number is not finite explains more than a wrong type.
            first = next((e for e in errors if e["type"] == "finite_number"), errors[0])
            raise _explain(first, data, cls, what) from None

    @field_validator("*")
    @classmethod
    def _check_float32(cls, value: Any) -> Any:
        """Check that numbers fit float32, in which networks compute: a larger number would become infinite."""
        if any(abs(number) > LARGEST for number in _collect_floats(value)):
            raise ValueError(f"Input should be at most {LARGEST:.1e} in magnitude, the largest float32")
        return value


def change(data: dict[str, Any], override: str) -> None:
    """Apply an override `key.path=value` to nested values, in place.

    The value is TOML, or a bare word for a string; `none` removes the key. If the key is a schedule with a single
    value, a number sets this value.

    Raises:
        DinoError: If the override is not an assignment, or a single value would replace a table.
    """
    key, equals, typed = override.partition("=")
    *tables, last = key.strip().split(".")
    if not equals or not last:
        raise DinoError(
            f"--set {override!r} is not an assignment; expected key.path=value", "for example --set training.epochs=10"
        )
    for table in tables:
        if not isinstance(data.get(table, {}), dict):
            raise DinoError(f"--set {override}: {table} is a single value, not a table", f"--set {table}=VALUE")
        data = data.setdefault(table, {})
    if typed.strip() == "none":
        if last in data:
            del data[last]
        else:
            data[last] = None  # so that an unknown key is still an error
        return
    try:
        value = tomllib.loads(f"value = {typed}")["value"]
    except RecursionError:
        raise DinoError(f"--set {key.strip()}: its value is nested too deeply", "check its brackets") from None
    except ValueError:  # not TOML, or a number of thousands of digits
        value = typed.strip()
        if value[:1] in ("[", "{", '"', "'"):  # the shell removed the quotes, or split the value at a space
            raise DinoError(
                f"--set {override} is not valid TOML", f"quote all of it: --set '{key}=[0.5, 0.5]' or '{key}={{a=1}}'"
            ) from None
    current = data.get(last)
    if isinstance(current, dict) and current and not isinstance(value, dict):
        if current.get("kind") not in ("constant", "warmup") or isinstance(value, (str, list)):
            raise _explain_value_for_table(key.strip(), typed.strip(), current)
        value = current | {"value": value}
    data[last] = value


def _explain_value_for_table(key: str, typed: str, table: dict[str, Any]) -> DinoError:
    message = f"--set {key}={typed}: {typed} is a single value; {key} is a table"
    number = is_number(typed)
    if "start" in table:
        constant = f'{{kind="constant", value={typed if number else "NUMBER"}}}'
        start = f"--set {key}.start={typed if number else 'NUMBER'}"
        return DinoError(message, f"{start} keeps the schedule; --set '{key}={constant}' replaces it")
    same_type = [name for name, inner in table.items() if isinstance(inner, (int, float) if number else str)]
    names = same_type or [name for name, inner in table.items() if not isinstance(inner, dict)] or list(table)
    return DinoError(message, " or ".join(f"--set {key}.{name}={typed}" for name in names[:3]))


def format_toml(value: Any) -> str:
    """Format a value as TOML, for `--set`. Only tables differ from JSON; None becomes `none`."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}={format_toml(inner)}' for key, inner in value.items() if inner is not None)}}}"
    return "none" if value is None else json.dumps(value)


def as_overrides(settings: Mapping[str, object], above: str = "") -> list[str]:
    """Return Python values by key as overrides for `change`.

    Args:
        settings: Values by full key. A mapping sets the keys of a table one by one, or replaces the table if it has a
            `kind`.
        above: Key of the table that holds the settings.
    """
    overrides = []
    for name, value in settings.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping) and "kind" not in value:
            overrides += as_overrides(value, key)
        else:
            overrides.append(f"{key}={format_toml(value)}")
    return overrides


def is_number(text: str) -> bool:
    """Return whether a text is a finite number: no key or option accepts nan or inf."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_deeper_than(data: object, levels: int) -> bool:
    """Check for tables and lists nested deeper than `levels`, without recursion, which could overflow the stack."""
    values = [data]
    for _ in range(levels + 1):
        tables = [value for value in values if isinstance(value, dict | list | tuple)]
        values = [each for table in tables for each in (table.values() if isinstance(table, dict) else table)]
    return bool(values)


def _collect_floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple | list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _collect_floats(inner)


def _explain(first: ErrorDetails, data: dict[str, Any], model: type[BaseModel], what: str) -> DinoError:
    # A discriminated union adds its tag to the location; only names in the data are keys that the user typed.
    path = _find_data_path(first["loc"], data, first["type"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return DinoError(f"{what}: there is no key {key}", _suggest_key(path, data, model))
    if first["type"] == "missing":
        table, models = _find_models(model, data, path[:-1])
        others = [name for name in table if models and name not in models[0].model_fields]
        if others and len(path) > 1:  # keys of another kind of this table
            return DinoError(
                f"{what}: the key {key} is missing, and this kind has no key {', '.join(others)}",
                f"--set '{'.'.join(path[:-1])}={_format_example(models[0], None)}'",
            )
        return DinoError(f"{what}: the key {key} is missing", f"add it with --set {key}=VALUE")
    message = first["msg"].removeprefix("Value error, ")
    # Validators of several keys end their message in "; it needs KEY=VALUE", which becomes the hint.
    message, _, override = message.partition("; it needs ")
    if not key:
        return DinoError(f"{what}: {message}", f"--set {override}" if override else "change it with --set KEY=VALUE")
    context: dict[str, Any] = dict(first.get("ctx") or {})
    if first["type"].startswith("union_tag"):
        kinds = context.get("expected_tags") or ", ".join(f"{k!r}" for k in _list_kinds(model, data, path))
        kind = context.get("tag")
        # Without a kind, suggest the first one that has all the given keys.
        matching = [
            m for m in _find_models(model, data, path)[1] if not kind and set(first["input"]) <= set(m.model_fields)
        ]
        choice = _kinds_of(matching[0])[0] if matching else nearest(str(kind or ""), kinds.replace("'", "").split(", "))
        problem = f"is {kind!r}; expected {kinds}" if kind else f"is missing; expected {kinds}"
        return DinoError(f"{what}: {key}.kind {problem}", f"--set {key}.kind={choice}")
    value = first["input"]
    if first["type"] in ("model_attributes_type", "model_type") and not isinstance(value, dict):
        models = _find_models(model, data, path)[1]
        example = _format_example(models[0], value) if models else "{...}"
        return DinoError(f"{what}: {key} is {value!r}; expected a table", f"--set '{key}={example}'")
    valid = message.removeprefix("Input ") if message.startswith("Input should be ") else f"is not valid: {message}"
    shown = repr(value) if not isinstance(value, dict) else "a table of another kind"
    override = override or f"{key}=VALUE with a valid value"
    if first["type"] == "literal_error":
        options = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        override = f"{key}={nearest(str(value), options)}"
    return DinoError(f"{what}: {key} {valid}; it is {shown}", f"--set {override}")


# Names in papers, in the original's options and in other tools, each with this project's key.
MEANT = {
    "arch": "backbone.name", "model": "backbone.name", "patch_size": "backbone.options.patch_size",
    "img_size": "backbone.options.img_size", "embed_dim": "backbone.options.embed_dim",
    "depth": "backbone.options.depth", "num_heads": "backbone.options.num_heads",
    "dropout": "backbone.drop_path", "drop_path_rate": "backbone.drop_path",
    "batch": "training.batch_size", "bs": "training.batch_size", "batch_size_per_gpu": "training.batch_size",
    "num_epochs": "training.epochs", "max_epochs": "training.epochs",
    "dtype": "training.precision", "use_fp16": "training.precision",
    "crops": "views.locals", "n_crops": "views.locals", "local_crops_number": "views.locals", "crop_size": "size",
    "image_size": "size", "amp": "training.precision", "fp16": "training.precision", "bf16": "training.precision",
    "global_crops_scale": "views.global_1.scale", "local_crops_scale": "views.local.scale",
    "k": "prototypes", "num_prototypes": "prototypes", "out_dim": "prototypes",
    "learning_rate": "optimizer.lr", "min_lr": "optimizer.lr.end", "wd": "optimizer.weight_decay",
    "warmup": "optimizer.lr.warmup_epochs", "warmup_epochs": "optimizer.lr.warmup_epochs",
    "optim": "optimizer.kind", "clip_grad": "optimizer.clip",
    "ema": "teacher.momentum", "momentum_teacher": "teacher.momentum",
    "temp": "temperature", "teacher_temp": "temperature", "warmup_teacher_temp_epochs": "temperature.epochs",
    "freeze_last_layer": "freeze_last_layer_epochs",
}  # fmt: skip


def find_keys(word: str, data: dict[str, Any], model: type[BaseModel] | None = None) -> list[str]:
    """Return the full paths of the keys that a word may refer to, such as `optimizer.lr.start` for `lr`.

    Args:
        word: Last part of a key, as a user or another tool spells it.
        data: Nested values of a preset.
        model: Config class of the values. If None, only the keys present in the values are searched.

    Returns:
        The paths; empty if no key is similar.
    """
    word = word.lower().replace("-", "_")
    key = MEANT.get(word, word)
    paths = sorted(_list_paths(data, model) if model else _list_plain_paths(data), key=lambda path: path.count("."))
    matches = [path for path in paths if f".{path}".endswith(f".{key}")]
    if not matches and word in MEANT and "." in key:  # timm's options, and tables that this preset does not have
        matches = [key]
    if not matches:
        close = nearest(word, {path.rpartition(".")[2] for path in paths}, least=0.75)
        matches = [path for path in paths if close and path.rpartition(".")[2] == close]
    leaves = []
    for path in matches:
        table: Any = data
        for name in path.split("."):
            table = table.get(name) if isinstance(table, dict) else None
        inner = next((name for name in ("start", "value") if isinstance(table, dict) and name in table), "")
        leaves.append(f"{path}.{inner}" if inner else path)
    return leaves


def _list_paths(data: Any, model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the path of every key that a config may have, given the kinds and the user's own names in the data."""
    for name, field in model.model_fields.items():
        path = f"{above}.{name}" if above else name
        yield path
        value = data.get(name) if isinstance(data, dict) else None
        models = _list_models(field.annotation)
        if not models:
            yield from (f"{path}.{key}" for key in (value if isinstance(value, dict) else {}))
        elif get_origin(field.annotation) is dict:
            for key, inner in value.items() if isinstance(value, dict) else ():
                yield from _list_paths(inner, models[0], f"{path}.{key}")
        elif isinstance(value, dict):
            yield from _list_paths(value, _pick_kind(models, value), path)


def _list_plain_paths(data: Any, above: str = "") -> Iterator[str]:
    for key, value in data.items() if isinstance(data, dict) else ():
        yield f"{above}{key}"
        yield from _list_plain_paths(value, f"{above}{key}.")


def _suggest_key(path: list[str], data: dict[str, Any], model: type[BaseModel]) -> str:
    """Return a hint for an unknown key: the nearest one in its table, or the same name elsewhere."""
    *above, last = path
    known = list(next((m.model_fields for m in _find_models(model, data, above)[1]), {}))
    elsewhere = [key for key in find_keys(last, _remove_key(data, path), model) if key != ".".join(path)]
    near = [".".join([*above, name]) for name in difflib.get_close_matches(last, known, n=1, cutoff=0.6)]
    # An unknown key at the top is mostly a nested key typed without its path.
    keys = near or elsewhere[:4] if above else elsewhere[:4] or near
    return f"did you mean {' or '.join(keys)}?" if keys else f"remove {'.'.join(path)}"


def _remove_key(data: dict[str, Any], path: list[str]) -> dict[str, Any]:
    first, *rest = path
    inner = data[first]
    others = {key: value for key, value in data.items() if key != first}
    return others | {first: _remove_key(inner, rest)} if rest and isinstance(inner, dict) else others


def _format_example(model: type[BaseModel], value: Any) -> str:
    """Format a table with a placeholder for each required value, as `--set` takes it."""
    required = {name: field for name, field in model.model_fields.items() if name != "kind" and field.is_required()}
    numbers = [name for name, field in required.items() if field.annotation in (int, float)]
    words = [f'kind="{kind}"' for kind in _kinds_of(model)[:1]]
    words += [f"{name}={value if numbers == [name] and is_number(str(value)) else 'VALUE'}" for name in required]
    return f"{{{', '.join(words)}}}"


def _find_data_path(location: tuple[int | str, ...], data: Any, kind: str) -> list[str]:
    path: list[str] = []
    for i, part in enumerate(location):
        if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]  # the message names the key inside, for whichever table of an array
            continue
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif not (kind == "missing" and i == len(location) - 1):
            continue
        path.append(str(part))
    return path


def _find_models(model: type[BaseModel], data: Any, path: list[str]) -> tuple[dict[str, Any], list[type[BaseModel]]]:
    """Return the table at a path and its possible config classes, that of its `kind` first.

    Both are empty for a single value, and for a table whose names the user chooses, such as `heads`.
    """
    models = [model]
    names = iter(path)
    for name in names:
        field = models[0].model_fields.get(name)
        models = _list_models(field.annotation) if field else []
        data = data.get(name) if isinstance(data, dict) else None
        if not field or not models:
            return {}, []
        if get_origin(field.annotation) is dict:
            chosen = next(names, None)
            if chosen is None:
                return {}, []
            data = data.get(chosen) if isinstance(data, dict) else None
        if isinstance(data, dict) and data.get("kind"):
            models = [_pick_kind(models, data), *models]
    return data if isinstance(data, dict) else {}, models


def _pick_kind(models: list[type[BaseModel]], table: dict[str, Any]) -> type[BaseModel]:
    return next((model for model in models if table.get("kind") in _kinds_of(model)), models[0])


def _list_kinds(model: type[BaseModel], data: Any, path: list[str]) -> list[str]:
    return [kind for inner in _find_models(model, data, path)[1] for kind in _kinds_of(inner)]


def _list_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _list_models(arg)]


def _kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
