"""Sphinx's settings. `python -m tools.site` writes the pages and passes what depends on the build."""

import importlib
import inspect
import os
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from tools import release as releases
from tools.repository import repository_url, source_link
from tools.site import api

ROOT = Path(__file__).parents[2]
URL = repository_url(ROOT)
REF = os.environ.get("LSCE_REPOSITORY_REF") or "HEAD"
SITE = os.environ.get("LSCE_SITE_URL", "").rstrip("/")
KNOWN = {public.full_name: public for public in api.all_public_names()}

project = "lsce"
author = "The lsce authors"
project_copyright = author
release = version = releases.version(ROOT)
exclude_patterns = ["**/README.md"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "tools.site.mathml",
    # A link to the source: in the repository if its address is known, otherwise on a page of the site.
    "sphinx.ext.linkcode" if URL else "sphinx.ext.viewcode",
]

# --- Strictness ---

nitpicky = True
# Types of other projects, whose pages are not looked up: a build needs no network.
nitpick_ignore_regex = [
    (
        "py:(class|obj|exc|data)",
        r"(Any|Array|ArrayLike|AxisName|Bool|Callable|Float|Int|Literal|Mapping|Path|Real|Self|Sequence)",
    ),
    ("py:(class|obj|exc|data)", r"(bool|bytes|dict|float|int|list|object|str|tuple|type|Exception|None|optional)"),
    (
        "py:(class|obj|exc|data)",
        r"(Tensor|ProcessGroup|torch|Unpack|typing|nnx|jax|collections|fractions|pathlib|re)(\..*)?",
    ),
    ("py:exc", r"\w+(Error|Warning)(, \w+Error)*"),
    # Types of the packages that are named in signatures and are not public.
    ("py:class", r"(Batch|CompareOptions|ComputeLoss|Inputs|Kernel|Loss|Number|Pair|Shape|_Pair)"),
]

# --- Markdown ---

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 6
nb_execution_mode = "off"  # tools/notebooks.py has executed and stored them
nb_merge_streams = True
smartquotes_action = "D"  # dashes only: quotes are as they are typed
html_math_renderer = "mathml"
html_last_updated_fmt = None

# --- Docstrings ---

autodoc_typehints = "signature"
autodoc_preserve_defaults = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_display_short_literal_types = True
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# --- Looks ---

html_theme = "pydata_sphinx_theme"
html_title = f"lsce {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_baseurl = f"{SITE}/" if SITE else ""
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "examples": []}
pygments_style = "default"
copybutton_exclude = ".linenos, .gp"
html_theme_options: dict[str, Any] = {
    "logo": {"text": "lsce"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "navigation_with_keys": False,
    "search_as_you_type": True,
    "show_nav_level": 1,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": ["theme-version"],
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if URL:
    html_theme_options["icon_links"] = [{"name": "Source", "url": URL, "icon": "fa-solid fa-code-branch"}]
if SITE:
    # The folders that the workflow publishes, a version each, and the list of them that it keeps.
    html_theme_options |= {
        "switcher": {"json_url": f"{SITE}/versions.json", "version_match": os.environ.get("LSCE_SITE_VERSION", "dev")},
        "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
        "check_switcher": False,  # it may not be published yet
    }


# --- What Sphinx asks of api.py ---


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return the address of the lines that define a Python object."""
    if domain != "py" or URL is None:
        return None
    full_name = f"{info['module']}.{info['fullname']}" if info["module"] else info["fullname"]
    public = KNOWN.get(full_name)
    if public is not None and not api.has_docstring(public.value):
        file, first = api.assignment(public)
        return f"{source_link(URL, api.path_of_source(file), REF)}#L{first}"
    value: Any = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        value = getattr(value, name)
    value = value.fget if isinstance(value, property) else inspect.unwrap(value)
    lines, first = inspect.getsourcelines(value)
    path = api.path_of_source(Path(inspect.getfile(value)))
    return f"{source_link(URL, path, REF)}#L{first}-L{first + len(lines) - 1}"


def _signature(app: Sphinx, kind: str, name: str, value: Any, options: Any, text: str, returns: str) -> Any:
    shown = api.signature(value) if kind in ("function", "class", "method") else None
    if shown is None:
        return None
    if ".metrics." in name:  # both packages have one, and neither is of this module
        shown = shown.replace("LossStats", f"{name.partition('.')[0]}.LossStats")
    arguments, arrow, result = shown.rpartition(" -> ")
    return (arguments, result) if arrow else (shown, "")


def _docstring(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    api.process_docstring(KNOWN, name, lines)


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _docstring, priority=100)  # before Napoleon
