"""Sphinx configuration: furo, MyST, and API pages from the docstrings."""

project = "jflow"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
# Fields are described under "Attributes" alone, and not once more as members.
napoleon_use_ivar = True
# The formulas in docstrings are plain text, laid out by indentation; types are named without their modules.
suppress_warnings = ["docutils", "ref.python"]
