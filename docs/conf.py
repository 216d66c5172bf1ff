"""Sphinx configuration: furo, MyST, and API pages from the docstrings."""

import collections
import re

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
    for name in ("Array", "BatchLike", "Cond", "Device", "Estimate", "Event", "Key", "Params", "PyTree", "Time")
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields are described once, in a list under "Attributes".
napoleon_custom_sections = [("Attributes", "params_style")]


def skip_member(app, what, name, obj, skip, options):
    """Omits the fields of named tuples, whose only docstring is "Alias for field number 0"."""
    return True if isinstance(obj, type(vars(collections.namedtuple("_", "a"))["a"])) else skip


def plain_aliases(app, what, name, obj, options, signature, returns):
    """Writes an alias within a union as its name, instead of the repr of Sphinx's stand-in for it."""
    if signature:
        # Two classes are named Row as well; this one is the row of a metrics file.
        signature = signature.replace("Iterable[Row]", "Iterable[Mapping[str, Any]]")
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def setup(app):
    app.connect("autodoc-process-signature", plain_aliases)
    app.connect("autodoc-skip-member", skip_member)
