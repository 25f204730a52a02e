"""How the documentation is built: `sphinx-build -W -n docs docs/_build/html`."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import granite_storage
from granite_storage._documentation import DOCUMENTATION, Page
from granite_storage._jobs import Run

project = "Granite Storage"
copyright = "Granite Storage contributors"
version = release = granite_storage.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_baseurl = DOCUMENTATION
html_title = "Granite Storage"
html_static_path = ["_static"]
html_css_files = ["doors.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: f"granite_storage.streams.{name}" for name in ("ByteSource", "BytesLike")
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_use_rtype = False

# Names of other projects are not linked, so that the build needs no network; every
# name of this one must resolve.
nitpick_ignore_regex = [(r"py:.*", r"(?!granite_storage\.).*")]
nitpick_ignore = [
    ("py:class", "granite_storage.streams.SupportsAsyncRead"),
    ("py:class", "granite_storage.streams.SupportsRead"),
    ("py:class", "granite_storage.orm.attachment.UploadFile"),
    ("py:class", "granite_storage.orm.attachment.F"),
    ("py:class", "granite_storage.web.uploads.T"),
]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)$")


def fences_to_directives(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Let docstrings have fenced code blocks, as the other documents do."""
    result: list[str] = []
    inside = False
    for line in lines:
        opening = FENCE.match(line)
        if opening:
            inside = True
            result += [f"{opening['indent']}.. code-block:: {opening['language']}", ""]
        elif inside and line.strip() == "```":
            inside = False
            result.append("")
        else:
            result.append(f"    {line}" if inside and line.strip() else line)
    lines[:] = result


def hide_arguments(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    given: str,
    result: str,
) -> tuple[str, str] | None:
    """Show no arguments of errors that take a message, and of jobs."""
    if isinstance(obj, type) and issubclass(obj, Run):
        return "", ""
    return ("()", "") if what == "exception" and given.startswith("(*args") else None


def require_pages_of_errors(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a build in which a page or a heading is missing that an error leads to."""
    if exception is not None or app.builder.name != "html":
        return
    for page in Page:
        name, _, anchor = page.value.partition("#")
        path = Path(app.outdir, name)
        if not path.is_file() or (anchor and f'id="{anchor}"' not in path.read_text()):
            raise ExtensionError(f"an error leads to {page.value}, which is not there")


def setup(app: Sphinx) -> None:
    """Register the hooks; that of docstrings before the one of Google style."""
    app.connect("autodoc-process-docstring", fences_to_directives, priority=400)
    app.connect("autodoc-process-signature", hide_arguments)
    app.connect("build-finished", require_pages_of_errors)
