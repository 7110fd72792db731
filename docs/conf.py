"""Sphinx settings of torchbatch's documentation. Nothing here, and nothing in the pages, is fetched from the net."""

from __future__ import annotations

import torchbatch

project = "torchbatch"
author = "the torchbatch authors"
project_copyright = author
release = version = torchbatch.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "speed_tables.md"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(jax|optree|torch|numpy|hypothesis)\..*")]  # documented elsewhere

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "torchbatch"
html_static_path: list[str] = []
html_show_sphinx = False
html_copy_source = False
