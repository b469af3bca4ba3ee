"""Settings of the documentation site: `make docs` builds docs/ into build/docs."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(DOCS)]

from generate import expand  # noqa: E402  (docs/ must be on the path first)

project = "MNCLGLF"
copyright = "the MNCLGLF authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["inventories"]
html_theme = "pydata_sphinx_theme"
html_title = "MNCLGLF"
html_theme_options = {"use_edit_page_button": False, "show_toc_level": 2, "navigation_with_keys": False}
html_show_sourcelink = False

myst_heading_anchors = 3  # links to a heading within a page are checked as well
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["nvidia"]  # DALI is an extra
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # a shape such as [N, D] opens many a "Returns", and is no name of a class

# Nothing is fetched: the inventories stand in the tree, and the addresses are only written into links.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.inv"),
    "numpy": ("https://numpy.org/doc/stable/", "inventories/numpy.inv"),
}
nitpicky = True


def setup(app):
    """Replaces the generated parts of a page before it is read."""
    app.connect("source-read", lambda _, page, source: source.__setitem__(0, expand(source[0])))
