"""Lists of image files with labels, as people and spreadsheets write them."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import HOLDERS
from dinocli.data.sources.indexed import label_fields
from dinocli.data.sources.kinds import kind_of
from dinocli.data.sources.listing import ARRAY, KNOWN, Names
from dinocli.data.sources.parts import part_of

JSON = ".jsonl"
LISTS = (".txt", ".csv", ".tsv", JSON)
_PATHS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "imagepath", "image_file",
    "image_name", "imagename", "img", "img_path", "img_name", "photo", "picture", "relative_path",
)  # fmt: skip
_LABELS = (
    "label",
    "labels",
    "class",
    "class_name",
    "label_name",
    "category",
    "target",
    "species",
    "class_id",
    "label_id",
)
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t;,|", ".txt": "\t;,|"}
# A path up to the last image suffix that spaces follow, and the rest of the line.
_SUFFIXES = KNOWN.union({ARRAY, ".npz"}, *(extra.suffixes for extra in HOLDERS))
_SUFFIX = rf"(?:{'|'.join(map(re.escape, sorted(_SUFFIXES)))})(?:#\w+=[\w.,]+)?"
_SPACED = re.compile(rf"(.*{_SUFFIX})[ \t]+(\S.*)", re.IGNORECASE)
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # halves of characters, except those that stand for bytes of names
_QUOTES = "\"'"
IsFile = Callable[[str], bool]


class Entry(NamedTuple):
    """A row of a list.

    Attributes:
        name: Path of the image, spelled as on disk.
        label: Label, or an empty string.
        row: Line number in the file, from 1; of the last line if a row spans several.
        more: Cells of the further columns.
    """

    name: str
    label: str
    row: int
    more: tuple[str, ...] = ()


class FileList(NamedTuple):
    """Contents of a list.

    Attributes:
        entries: Rows in file order.
        notes: Messages for the user about incomplete rows.
        columns: Names of the columns besides those of paths and labels.
    """

    entries: list[Entry]
    notes: tuple[str, ...]
    columns: tuple[str, ...] = ()


def read_list(path: Path) -> FileList:
    """Read a text file with one path per line, or a table with a column of paths, optionally one of labels, and more.

    Relative paths start at the list's own folder. A label follows its path after a tab, comma, semicolon or space. In a
    table with a header, and in the JSON objects of a `.jsonl` file, the columns are found by name. The encoding may be
    UTF-8 or UTF-16, with or without a byte order mark, or cp1252. If a path does not exist as written, quotes and
    spaces around the cell are removed and Windows backslashes are converted.

    Raises:
        DinoError: If the list is empty, no column holds paths, or the first file does not exist.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DinoError(
            f"{path} cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error
    return parse_list(data, str(path), partial(_is_file, path.parent))


def parse_list(data: bytes, where: str, is_file: IsFile) -> FileList:
    """Parse a list as `read_list` does.

    Args:
        data: Bytes of the list.
        where: Path or address of the list.
        is_file: Function that checks if a name, relative to the list's folder, is a file.

    Raises:
        DinoError: If the list is empty, no column holds paths, or the first file does not exist.
    """
    text, suffix = _decode(data, is_file).removeprefix("\ufeff"), os.path.splitext(where)[1].lower()
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if suffix == ".txt":
        lines = ["" if line.startswith("#") else line for line in lines]  # blank, to keep row numbers
    notes, columns = list[str](), list[str]()
    found = _objects(lines, where, columns) if suffix == JSON else _rows(lines, where, is_file, notes, columns)
    rows = [row for row in found if any(cell.strip() for cell in row.cells)]
    if not rows:
        raise DinoError(
            f"{where} is empty; expected a list of files", "write one path per line, relative to the list's folder"
        )
    named, unnamed = list[Entry](), list[Entry]()
    convert = _convention(rows, is_file)
    for cells, row in rows:
        name, label, *more = cells if len(cells) > 1 else (*cells, "")
        (named if name.strip() else unnamed).append(Entry(convert(name), _unquote(label), row, tuple(more)))
    if not named or not is_file(named[0].name):
        first = named[0].name if named else ""
        raise DinoError(
            f"the first file of {where} does not exist: {os.path.join(os.path.dirname(where), first)}",
            "write paths relative to the list's folder" + _suggest_move(first),
        )
    return FileList(named, (*notes, *_notes(where, named, unnamed)), tuple(columns))


def merge_rows(found: FileList, where: str, place_of: Callable[[str], str]) -> tuple[FileList, str]:
    """Merge rows of the same image. Return one row per image, and the first clash of labels in words.

    Args:
        found: Contents of a list.
        where: Path or address of the list.
        place_of: Function from a name to the path of its image, the same for all spellings.
    """
    merged: dict[str, Entry] = {}
    repeated: dict[str, list[Entry]] = {}
    for row in found.entries:
        place = place_of(row.name)
        first = merged.setdefault(place, row)
        if first is not row:
            repeated.setdefault(place, [first]).append(row)
    clash = ""
    for place, same in repeated.items():
        labels = {row.label: row.row for row in reversed(same) if row.label}
        one, *others = sorted(labels, key=lambda label: labels[label]) or [""]
        merged[place] = same[0]._replace(label=";".join([one, *others]))
        if others and not clash:
            clash = f"{same[0].name} the labels {one} (row {labels[one]}) and {others[0]} (row {labels[others[0]]})"
    entries, notes = list(merged.values()), found.notes
    if count := len(found.entries) - len(entries):
        notes += (f"{count} rows of {where} name an image again: each image counts once",)
    return FileList(entries, notes, found.columns), clash


def fields_of(listed: FileList, clash: str) -> dict[str, Any]:
    """Return what a list, merged by `merge_rows`, states of `Images`: names, classes, labels, metadata and notes."""
    entries, notes, columns = listed
    metadata = {column: Names.of([entry.more[i] for entry in entries]) for i, column in enumerate(columns)}
    names = Names.of([entry.name for entry in entries])
    labels = label_fields([entry.label for entry in entries])
    return {"names": names, **labels, "notes": notes, "clash": clash, "metadata": metadata}


class _Row(NamedTuple):
    cells: Sequence[str]
    row: int


def _decode(data: bytes, is_file: IsFile) -> str:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data.removeprefix(mark).decode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    # UTF-16 without its mark, from a spreadsheet: every other byte of ASCII text is zero.
    head = data[:1000]
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if zeros and zeros.count(0) > len(zeros) // 2:
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        # File names may hold any bytes, and so may lists of them. Spreadsheets on Windows write cp1252 instead.
        raw = data.decode("utf-8", "surrogateescape")
        odd = next(line for line in raw.split("\n") if any("\udc80" <= sign <= "\udcff" for sign in line))
        cells = [odd, *re.split(r"[,;\t]", odd)]
        exists = any(is_file(_unquote(cell).replace("\\", "/")) for cell in cells if cell)
        return raw if exists else data.decode("cp1252", "replace")


def _objects(lines: list[str], where: str, columns: list[str]) -> Iterator[_Row]:
    """Yield path, label and the further values of the JSON object in each line, and add their names to `columns`.

    Raises:
        DinoError: If a line is not an object, or no key holds paths.
    """
    rows: list[tuple[dict[str, str], int]] = []
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DinoError(f"line {row} of {where} is not a JSON object", 'write {"path": "a.jpg", "label": "cat"}')
        rows.append(({_encodable(key): _encodable(_text_of(item)) for key, item in value.items()}, row))
    keys = list(dict.fromkeys(key for values, _ in rows for key in values))
    head = _header(keys)
    at, label = _column(head, _PATHS), _column(head, _LABELS)
    if rows and at is None:
        raise DinoError(
            f"no key of {where} holds paths; its keys are {', '.join(keys)[:300]}",
            "name the key of paths `path` and that of labels `label`",
        )
    columns += [key for i, key in enumerate(keys) if i not in (at, label)]
    for values, row in rows:
        cells = [values.get(key, "") for key in keys]
        yield _Row((_cell(cells, at), _cell(cells, label), *(values.get(key, "") for key in columns)), row)


def _encodable(text: str) -> str:
    """Replace characters that JSON can state and no file can hold."""
    return _LONE.sub("\ufffd", text)


def _text_of(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _rows(lines: list[str], where: str, is_file: IsFile, notes: list[str], columns: list[str]) -> Iterator[_Row]:
    """Yield path, label and, if there is a header, the further cells of each row as written.

    Adds the names of further columns to `columns`, and a message to `notes` if there is a header without labels.

    Raises:
        DinoError: If no column holds paths.
    """
    suffix = os.path.splitext(where)[1].lower()
    delimiters = _DELIMITERS[suffix]
    if lines and (told := re.fullmatch(r'"?sep=(.)"?', lines[0])):  # Excel's line that names the delimiter
        delimiters, lines[0] = told[1], ""
    first = next((line for line in lines if line.strip()), "")
    if not first:
        return
    for delimiter in delimiters:
        cells = next(_table([first], delimiter)).cells
        head = _header(cells)
        if (column := _column(head, _PATHS)) is not None and not _exists(is_file, cells[column]):
            label = _column(head, _LABELS)
            columns += [_unquote(cell) for i, cell in enumerate(cells) if i not in (column, label) and cell.strip()]
            if label is None and columns:
                others = ", ".join(columns)
                notes.append(f"no column of {where} is named label or class; its other columns are {others[:200]}")
            yield from _below_header(lines, delimiter, column, label)
            return
    if _exists(is_file, first):  # the file name may hold a delimiter
        yield from _labels_behind(lines, is_file)
        return
    for delimiter in delimiters:
        cells = next(_table([first], delimiter)).cells
        column = next((i for i, cell in enumerate(cells) if _exists(is_file, cell)), None)
        if len(cells) > 1 and column is not None:
            label = column + 1 if column + 1 < len(cells) else column - 1
            for cells, row in _table(lines, delimiter):
                yield _Row((_cell(cells, column), _cell(cells, label)), row)
            return
    split = (next(_table([first], delimiter)).cells for delimiter in delimiters)
    parts = next(([cell.strip() for cell in cells if cell.strip()] for cells in split if len(cells) > 1), [])
    if (suffix != ".txt" or len(parts) > 1) and not any(_is_name(cell) for cell in [first, *parts]):
        raise DinoError(
            f"no column of {where} holds paths; its columns are {', '.join(parts or [first.strip()])[:300]}",
            "name the column of paths `path` and that of labels `label`: path,label",
        )
    if len(parts) > 1 and any(_is_name(cell) for cell in parts):  # a missing file, which the caller reports
        yield _Row((next(cell for cell in parts if _is_name(cell)), ""), 1)
        return
    yield from _labels_behind(lines, is_file)


def _below_header(lines: list[str], delimiter: str, column: int, label: int | None) -> Iterator[_Row]:
    """Yield path, label and the cells of all other columns that have a name."""
    table = (row for row in _table(lines, delimiter) if any(cell.strip() for cell in row.cells))
    named = [i for i, name in enumerate(next(table).cells) if i not in (column, label) and name.strip()]
    for cells, row in table:
        yield _Row((_cell(cells, column), _cell(cells, label), *(_cell(cells, i).strip() for i in named)), row)


def _table(lines: list[str], delimiter: str) -> Iterator[_Row]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, quoting=csv.QUOTE_MINIMAL)
    try:
        for cells in reader:
            yield _Row(cells or [""], reader.line_num)
    except csv.Error:  # a cell of more than 131,072 characters, such as after an unclosed quote
        for row, line in enumerate(lines, 1):
            if row > reader.line_num:
                yield _Row(line.split(delimiter), row)


def _header(cells: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s-]+", "_", _unquote(cell).lower()) for cell in cells]


def _column(head: Sequence[str], names: Sequence[str]) -> int | None:
    return next((head.index(name) for name in names if name in head), None)


def _cell(cells: Sequence[str], column: int | None) -> str:
    return cells[column] if column is not None and column < len(cells) else ""


def _labels_behind(lines: list[str], is_file: IsFile) -> Iterator[_Row]:
    """Yield the path of each line and, if there are labels, the label after a tab, comma, semicolon or space."""
    filled = [line for line in lines if line.strip()]
    tabbed = next((line for line in filled if "\t" in line.strip()), None)
    tab = tabbed is not None and not _exists(is_file, tabbed)
    # Names may hold spaces and commas: if the first line that looks like path and label is a file, no line has a label.
    sample = next((line for line in filled if _split(line) != (line, "")), None)
    labelled = sample is not None and not _exists(is_file, sample)
    bare = not tab and not labelled and " " in filled[0].strip() and not _exists(is_file, filled[0])
    for row, line in enumerate(lines, 1):
        if tab and "\t" in line.strip():
            yield _Row(line.strip("\n").partition("\t")[::2], row)
        elif labelled:
            yield _Row(_split(line), row)
        elif bare and _exists(is_file, line.rpartition(" ")[0]):  # a name without a suffix
            yield _Row(line.rpartition(" ")[::2], row)
        else:
            yield _Row((line, ""), row)


_DELIMITED = re.compile(_SPACED.pattern.replace(r"[ \t]+", r"[\"']?[ \t]*[,;][ \t]*"), re.IGNORECASE)


def _split(line: str) -> tuple[str, str]:
    if kind_of(_unquote(line)) in _SUFFIXES:
        return line, ""
    found = _DELIMITED.fullmatch(line) or _SPACED.fullmatch(line)
    return (found[1], found[2]) if found else (line, "")


def _unquote(text: str) -> str:
    """Strip spaces, and quotes if they enclose the whole text."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES else text


def _exists(is_file: IsFile, name: str) -> bool:
    return any(form and is_file(form) for form in _forms(name))


def _is_file(folder: Path, name: str) -> bool:
    part = part_of(name)
    try:
        return os.path.isfile(os.path.join(folder, name)) or (part is not None and _is_file(folder, part.file))
    except ValueError:  # a null character
        return False


def _forms(name: str) -> Iterator[str]:
    """Yield a name as written, then without spaces and quotes around it, then with slashes for backslashes."""
    bare = name.strip()
    yield from (name, bare, _unquote(bare))
    if "\\" in bare:
        yield _unquote(bare).replace("\\", "/")


def _convention(rows: Sequence[_Row], is_file: IsFile) -> Callable[[str], str]:
    """Return the function that converts a cell to a path; the first path with a backslash decides for all."""
    first = next((row.cells[0] for row in rows if "\\" in row.cells[0]), None)
    windows = first is not None and not is_file(first) and _exists(is_file, first)

    def convert(name: str) -> str:
        # Checking every name of a long list on disk takes seconds; only odd names are checked.
        if (name != name.strip() or name[:1] in _QUOTES) and not is_file(name):
            name = _unquote(name)
        return name.replace("\\", "/") if windows else name

    return convert


def _is_name(cell: str) -> bool:
    return kind_of(_unquote(cell)) in _SUFFIXES or "/" in cell or "\\" in cell


def _suggest_move(name: str) -> str:
    return f"; {name} exists in the current folder: move the list there" if name and os.path.isfile(name) else ""


def _notes(where: str, named: Sequence[Entry], unnamed: Sequence[Entry]) -> Iterator[str]:
    if unnamed:
        yield f"{len(unnamed)} rows of {where} name no file and are ignored; the first is row {unnamed[0].row}"
    bare = [entry for entry in named if not entry.label]
    if bare and len(bare) < len(named):
        yield (
            f"{len(bare)} of {len(named)} images in {where} have no label; the first is row "
            f"{bare[0].row} ({bare[0].name})"
        )
