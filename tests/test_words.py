"""The words: plain technical English in docstrings, comments, messages, docs and presets (CONTRIBUTING.md, "Words")."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "dinocli").rglob("*.py"))
PAGES = [p for p in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if p.name != "README.zh.md"]
PRESETS = sorted((ROOT / "presets").glob("*.toml"))

# Openings that make a reader translate: a function's docstring begins with a verb, anything else with a noun.
_OPENING = re.compile(r"(What|Whether|Of|How|Which|Those|That|Where|Who|It|They|Such)\b")
_ARGUMENT = re.compile(r"^ {4,}(\w+): +(What|Whether|Of|How|Which|Those|That|Where|Who|It|They|Such|By)\b", re.M)
# Phrases that the field does not write, each with what to write.
PHRASES = {
    r"\b(go|goes|going|went|gone) on\b": "resume, continue",
    r"\b(leave|leaves|leaving|left|leav) out\b|\b(left|leaves?|leaving) (it|them|this|that) out\b": "skip, omit, ignore",
    r"\b(pass|passes|passed|passing) over\b": "skip, ignore",
    r"\bwork(s|ed|ing)? (it |them )?out\b": "compute, estimate, recompute",
    r"\bhidden patch|\bpatch(es)? (is|are|be) hidden|\bhid(es|ing) patch": "masked patches",
    r"\bcould not be had\b|\bcan(not)? be had\b|\bis had\b|\bto be had\b": "could not be downloaded, read, found",
    r"\b(was|were|is|are) wanted\b": "expected X; got Y, or: X is not ...",
    r"\b(was|were) asked for\b|\bis asked for\b|\bare asked for\b": "requested, or name the option",
    r"\b(tell|tells|told|telling) (of|what|which|whether|how|where|apart)\b": "report, print, distinguish",
    r"\b(look|looks|looked|looking) (whether|what)\b": "check",
    r"\bwhat is like\b|\balike\b": "similar, nearest neighbours",
    r"\bthat which\b|\bthat of which\b|\bof which\b": "a plain relative clause, or two sentences",
    r"\bno more\b(?! than)|\bnot any more\b": "no longer",
    r"\bsuch (a|an)\b(?! as)": "name it",
    r"\bas (it|they) (was|were|is|are) (left|had|told|asked)\b": "name it",
    r"\bbrings? (it|them) about\b|\bto be known\b|\bto be typed\b": "a verb",
    r"\btakes? the place of\b|\bin (the )?place of\b": "replaces, instead of",
    r"\babsent,|; absent\b|\bif absent\b|\bwhere absent\b": "if None, or: by default",
}


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of a module and of all that it defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield getattr(node, "name", "module"), text.strip()


def comments(source: str) -> Iterator[tuple[str, str]]:
    """Yield the line and the text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield f"line {token.start[0]}", token.string


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    odd = []
    for name, text in docstrings(path.read_text(encoding="utf-8")):
        if _OPENING.match(text):
            odd.append(f"{name}: {text.splitlines()[0]}")
        odd += [f"{name}: {found[0].strip()} ..." for found in _ARGUMENT.finditer(text)]
    assert not odd, "\n".join(odd)


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each comment and string of a source file, or of each line of prose."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from comments(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"line {node.lineno}", node.value
        return
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced:
            yield f"line {number}", line


@pytest.mark.parametrize("path", [*PACKAGE, *PAGES, *PRESETS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_fields_own_words_are_used(path: Path) -> None:
    odd = []
    for where, text in texts(path):
        flat = " ".join(text.split())
        for phrase, instead in PHRASES.items():
            odd += [f"{where}: {m[0]!r}; write: {instead}" for m in re.finditer(phrase, flat, re.IGNORECASE)]
    assert not odd, "\n".join(odd)


def test_the_rules_find_what_they_forbid() -> None:
    source = (
        '"""What a run needs."""\ndef f(x):\n    """Load it.\n\n    Args:\n        x: Whether it goes on.\n    """\n'
    )
    found = dict(docstrings(source))
    assert _OPENING.match(found["module"])
    assert _ARGUMENT.search(found["f"])
    assert any(re.search(phrase, found["f"], re.IGNORECASE) for phrase in PHRASES)
