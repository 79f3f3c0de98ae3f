"""HTML page that needs only a browser: escaped text, and `page.html` with head and style around it."""

from __future__ import annotations

import html
from importlib.resources import files
from string import Template

from dinocli.core.errors import visible


def text_of(value: object) -> str:
    """Escape text for the page: no tags, no control or direction marks, no invalid characters from file names."""
    return html.escape(visible(str(value)))


def page_of(title: str, body: str) -> str:
    """Return a complete page, in the reader's light or dark mode, for desktop and phone.

    Args:
        title: Title, escaped by `text_of`.
        body: HTML whose pictures are `data:` URLs; the page forbids the browser to fetch anything.
    """
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=title, body=body)
