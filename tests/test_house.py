"""The layout of the project: files, folders, docs and dependencies agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dinocli.method import shipped

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dinocli"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def test_the_tree_of_the_architecture_names_every_folder() -> None:
    tree = ARCHITECTURE.split("```")[1]
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        assert re.search(rf"(?<!\w){re.escape(folder.name)}/", tree), f"{folder.relative_to(ROOT)} is not in the tree"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_has_its_test(path: Path) -> None:
    if path.name in ("__init__.py", "__main__.py"):
        return
    inside = path.relative_to(PACKAGE)
    # pytest needs unique names: files with a common name carry their folder's in front.
    names = [f"test_{inside.name}", f"test_{inside.parent.name}_{inside.name}"]
    folder = ROOT / "tests" / inside.parent
    mirrors = [ROOT / "tests/cli/test_cli.py"] if inside.parts[0] == "cli" else [folder / name for name in names]
    assert any(mirror.is_file() for mirror in mirrors), f"{inside} has no {folder.relative_to(ROOT) / names[0]}"


def test_only_entry_points_lie_at_the_top_of_the_package() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_command_and_preset_is_in_the_docs() -> None:
    stems = [path.stem for path in (PACKAGE / "cli").glob("*.py") if f"\ndef {path.stem}(" in path.read_text()]
    stems += [path.stem for path in (PACKAGE / "cli").glob("eval_*.py")]
    commands = {stem.replace("eval_", "eval ").replace("_", "-") for stem in stems} | {"presets"}
    assert len(commands) >= 20
    listed, presets = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("cli.md", "presets.md"))
    for command in commands:
        assert f"## dino {command}\n" in listed, command
    for name in shipped.names():
        assert f"`{name}`" in presets, name


def test_every_dependency_is_imported_and_none_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "".join(p.read_text() for p in FILES) + "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    modules = {"faiss-cpu": "faiss", "pillow": "PIL"}
    for dependency in project["dependencies"]:
        name, _, _ = re.fullmatch(r"([a-z-]+)(>=)([0-9.]+)", dependency).groups()
        assert re.search(rf"^\s*(from|import) {modules.get(name, name)}\b", text, re.MULTILINE), name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dinocli, dinocli.cli; bad = {'torch', 'timm', 'numpy', 'PIL', 'faiss', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_stays_below_ten_megabytes() -> None:
    """The sum of the packed files' sizes, which is more than the wheel that compresses them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = set()
    for package in settings["packages"]:
        folder = ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        for pattern in ("*.py", *settings["package-data"].get(package, [])):
            files |= set(folder.glob(pattern))
    names = {path.name for path in files}
    assert {"__init__.py", "mini.safetensors", "tiny.toml", "page.html", "compiled_bytes.cpp"} <= names
    assert sum(path.stat().st_size for path in files) < 10_000_000
