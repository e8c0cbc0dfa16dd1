"""The templates of all pages: reports of runs, sweeps and comparisons, and model cards."""

import html
import re

import jinja2
from markupsafe import Markup


def markdown(value: object) -> Markup:
    """Escape a text so that Markdown shows it as it is, in one line."""
    if isinstance(value, Markup):
        return value
    text = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text))


def _code(value: object) -> Markup:
    """A Markdown code span of any text."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return Markup(f"`{text}`")


def pages() -> jinja2.Environment:
    """The templates of pages. They escape every value that is put into them."""
    loader = jinja2.PackageLoader("ray_dfml", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def cards() -> jinja2.Environment:
    """The templates of texts in Markdown. What is put into them is escaped for Markdown."""
    card = pages().overlay(autoescape=False, finalize=markdown)
    card.filters["code"] = _code
    return card
