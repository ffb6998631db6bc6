"""How Sphinx makes the site of these pages: ``sphinx-build -W docs site``."""

from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import edgeml

project = "edgeml"
author = "the edgeml authors"
release = edgeml.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "edgeml"

# The pages are read on GitHub, too: links name files, and headings have GitHub's anchors.
myst_heading_anchors = 3

# The API reference comes from the docstrings: plain text, with `names` of objects.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {
    "members": True,
    "inherited-members": "dict, ndarray, object, tuple",  # but not from these
}
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True


COLON = "\N{RATIO}"  # stands in for one


def hide_colons(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep napoleon from taking what stands before a property's first colon for its type."""
    if what in ("attribute", "data", "property"):
        lines[:1] = [line.replace(":", COLON) for line in lines[:1]]


def show_colons(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Put them back."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> None:
    """Let pages have blocks of hex, and docstrings of properties have colons."""
    app.add_lexer("hex", TextLexer)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", show_colons, priority=600)
