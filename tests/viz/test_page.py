from __future__ import annotations

import html
import re
import tomllib
from pathlib import Path

import pytest

from dinocli.viz.page import page_of, text_of


@pytest.mark.parametrize("name", ["plain.jpg", "<b>&amp;", "\"'", "日本語.jpg", "é ñ", "a\xa0b"])
def test_text_is_displayed_unchanged(name: str) -> None:
    assert html.unescape(text_of(name)) == name
    assert not set("<>\"'") & set(text_of(name))


@pytest.mark.parametrize("bad", ["\0", "\n", "\x1b", "\u202e", "\u2066", "\udce9", "\ufeff"], ids=ascii)
def test_control_and_direction_characters_are_escaped(bad: str) -> None:
    assert re.fullmatch(r"a\\[xun][0-9a-f]*b", text_of(f"a{bad}b"))
    text_of(f"a{bad}b").encode()


def test_a_page_holds_its_body_and_forbids_fetching() -> None:
    page = page_of("T &amp; U", "<p>x</p>")
    assert page.startswith("<!DOCTYPE html>") and "<title>T &amp; U" in page
    assert page.endswith("<body><p>x</p></body></html>\n")
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_signs_of_the_template_are_text_in_title_and_body() -> None:
    page = page_of("$body", "<p>$title ${x} $$</p>")
    assert "<title>$body · dino</title>" in page
    assert page.endswith("<body><p>$title ${x} $$</p></body></html>\n")


def test_the_template_ships_with_the_package() -> None:
    tools = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["setuptools"]["package-data"]["dinocli.viz"] == ["page.html"]
