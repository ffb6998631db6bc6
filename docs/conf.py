"""How Sphinx makes the site of these pages: ``sphinx-build -W docs site``."""

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
    "show-inheritance": True,
}
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Let pages have blocks of hex."""
    app.add_lexer("hex", TextLexer)
