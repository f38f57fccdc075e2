"""Write report.html: one self-contained page that shows a run, or several beside each other.

The page loads nothing: style, script and contents stand in it. The curves are drawn as SVG by two hundred lines,
curves.js. docs/running.md says why there is no plotting library.
Responses are hostile text. They stand in a JSON block in which `<` is escaped, and the script makes them text nodes. A
content security policy names the hashes of style and script, so that the browser would run no other script.
"""

import base64
import hashlib
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from plainrl.report.contents import now, to_json
from plainrl.report.curves import PANELS, lines_of

NAME = "report.html"
FILES = Path(__file__).parent
SCRIPTS = ("base", "curves", "responses", "page")  # .js files, which become one


def write_page(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a page; one that is open in a browser is replaced as a whole. Return its path.

    Args:
        runs: what `contents.read_run` returns, for each run.
        path: the file.
    """
    text = make_page(runs)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def make_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML."""
    names = list(dict.fromkeys(name for run in runs for name in run["curves"]["metrics"]))
    panels = [
        {"title": panel.title, "lines": lines_of(panel, names), "low": panel.low}
        for panel in PANELS
        if lines_of(panel, names)
    ]
    style = (FILES / "page.css").read_text(encoding="utf-8")
    script = "\n".join((FILES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    values = {
        "title": html.escape(" and ".join(str(run["name"]) for run in runs)),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": to_json({"written": now(), "panels": panels, "runs": list(runs)}),
    }
    return Template((FILES / "page.html").read_text(encoding="utf-8")).substitute(values)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
