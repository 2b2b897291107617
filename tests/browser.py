"""A real browser without a screen, and axe-core's rules for pages that everybody can use."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE_S
from preflight import absent

AXE = """
<script>{axe}</script>
<script>setTimeout(async () => {{
  const found = (await axe.run()).violations, said = document.createElement("pre");
  said.id = "axe";
  said.textContent = JSON.stringify(found.map(one => [one.impact, one.id, one.nodes.map(node => node.html)]));
  document.body.append(said);
}}, 4000)</script>
"""


def _browse(*words: str, width: int = 1280) -> str:
    browser = shutil.which("chromium")
    if browser is None:
        absent("Chromium is not installed (Debian's package chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    done = subprocess.run(
        [browser, *options, f"--window-size={width},1400", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dump_dom(url: str, width: int = 1280) -> str:
    """What the browser has made of a page."""
    return _browse("--dump-dom", url, width=width)


def screenshot(url: str, file: Path, width: int = 1280) -> None:
    """A picture of a page."""
    _browse(f"--screenshot={file}", url, width=width)


def with_axe(page: str) -> str:
    """A page that looks for faults of its own."""
    pytest.importorskip("axe_core_python")
    script = (resources.files("axe_core_python") / "axe.min.js").read_text()
    return page.replace("</body>", AXE.format(axe=script.replace("</script", "<\\/script")) + "</body>")


def read_axe(dom: str) -> list[Any]:
    """What axe-core found in a page: impact, rule and elements of each fault."""
    match = re.search(r'<pre id="axe">(.*?)</pre>', dom, re.S)
    assert match is not None, f"axe-core did not run: {dom[-500:]}"
    result: list[Any] = json.loads(html.unescape(match[1]))
    return result
