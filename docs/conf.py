"""Sphinx configuration: furo, MyST, and API pages from the docstrings."""

project = "jflow"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
# The formulas in docstrings are plain text, laid out by indentation.
suppress_warnings = ["docutils"]
