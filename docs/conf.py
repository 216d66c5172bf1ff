"""Sphinx configuration: furo, MyST, and API pages from the docstrings."""

import collections

project = "jflow"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
# Types appear once, in the signature, by the names that the source uses.
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autodoc_type_aliases = {
    name: name
    for name in ("Array", "Batch", "BatchLike", "Cond", "Device", "Event", "Key", "Params", "PyTree", "Time")
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields are described once, in a list under "Attributes".
napoleon_custom_sections = [("Attributes", "params_style")]


def skip_member(app, what, name, obj, skip, options):
    """Omits the fields of named tuples, whose only docstring is "Alias for field number 0"."""
    return True if isinstance(obj, type(collections.namedtuple("_", "a").a)) else skip


def setup(app):
    app.connect("autodoc-skip-member", skip_member)
