"""The page in a real browser: nothing wider than a phone, one language at a time, and the search."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from koat.workflows.comparing.report import write_report
from tests.workflows.scored_folders import make_answers, write_scores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--no-first-run", "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom",
)  # fmt: skip
LOOK = """
<body><iframe src="page.html" width="390" height="900"></iframe><pre id="said"></pre><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const shown = (kind) => [...page.querySelectorAll("h2 " + kind)].filter((entry) => entry.offsetWidth > 0).length;
  const said = { width: page.documentElement.scrollWidth, before: [shown("[lang=en]"), shown("[lang=ko]")] };
  page.querySelector("[data-to=ko]").click();
  said.after = [shown("[lang=en]"), shown("[lang=ko]")];
  const input = page.querySelector("input[type=search]");
  input.value = "NUMBER 7";
  input.dispatchEvent(new Event("input"));
  said.items = [...page.querySelectorAll(".item")].filter((entry) => !entry.hidden).length;
  const charts = [...page.querySelectorAll("svg.chart")].filter((chart) => !chart.closest("details:not([open])"));
  said.narrowest = Math.min(...charts.map((chart) => chart.getBoundingClientRect().width));
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script></body>
"""


def look_at(folder: Path) -> dict[str, Any]:
    """Open `page.html` of a folder on a phone's width and return what was seen."""
    (folder / "look.html").write_text(LOOK, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "look.html").as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    said = re.search(r'<pre id="said">(.*?)</pre>', seen, re.DOTALL)
    assert said and said[1], "the browser did not run the page"
    return dict(json.loads(html.unescape(said[1])))


def test_a_phone_shows_one_language_and_finds_items(tmp_path: Path) -> None:
    places = []
    for name, wrong in (("a-rather-long-name-of-a-run-with-many-words", range(10)), ("other", range(30, 45))):
        folder = write_scores(tmp_path / name, make_answers(60, wrong))
        for path in folder.glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            lines = [json.dumps({**row, "text": {"text": f"number {row['id']}. " + "긴글" * 80}}) for row in rows]
            path.write_text("\n".join(lines), encoding="utf-8")
        places.append(str(folder))
    write_report(places, tmp_path / "page.html")
    seen = look_at(tmp_path)
    assert seen["width"] <= 390, "the page scrolls sideways"
    assert seen["before"][0] > 5 and seen["before"][1] == 0
    assert seen["after"] == [0, seen["before"][0]]
    assert seen["items"] == 1
    assert seen["narrowest"] > 240
