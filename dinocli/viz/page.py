"""HTML page that needs only a browser: escaped text, tables, tiles, and `page.html` with head and style around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template

from PIL import Image

from dinocli.core.errors import visible

_SIDE = 192  # maximum side of a tile in pixels; keeps the page to a few megabytes


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


def sections_of(bodies: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Return the navigation and the sections of a page.

    Args:
        bodies: Title and HTML of each section; sections without HTML are omitted.
    """
    filled = [(name, name.lower().replace(" ", "-"), body) for name, body in bodies if body]
    links = "".join(f'<a href="#{key}">{name}</a>' for name, key, _ in filled)
    sections = "".join(f'<section id="{key}"><h2>{name}</h2>{body}</section>' for name, key, body in filled)
    return f"<nav aria-label='Sections of this page'>{links}</nav>", sections


def facts_of(facts: Iterable[tuple[str, object]]) -> str:
    """Return names and values as a list of figures; values that are empty or None are omitted."""
    rows = "".join(f"<div><dt>{name}</dt><dd>{text_of(value)}</dd></div>" for name, value in facts if value)
    return f"<dl>{rows}</dl>"


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]], label: str) -> str:
    """Return a table that scrolls sideways on a phone.

    Args:
        columns: Header of each column.
        rows: Cells of each row, whose first is its name; None gives an empty cell.
        label: Name of the table for screen readers.
    """
    heads = "".join(f'<th scope="col">{text_of(name)}</th>' for name in columns)
    body = ""
    for name, *cells in rows:
        texts = "".join(f"<td>{text_of('' if cell is None else cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{text_of(name)}</th>{texts}</tr>'
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    # A region that scrolls must be reachable by keyboard.
    return f"<div class='wide' role='region' aria-label='{text_of(label)}' tabindex='0'>{table}</div>"


def tile_of(picture: Image.Image) -> str:
    """Return a picture as the `data:` URL of a small JPEG; the picture is reduced in place."""
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure_of(url: str, alt: str, caption: str) -> str:
    """Return a tile with a caption; both texts are already escaped."""
    return f'<figure><img src="{url}" alt="{alt}" loading="lazy"><figcaption>{caption}</figcaption></figure>'
