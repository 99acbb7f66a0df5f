"""The page in a real browser: nothing overflows, no script fails, axe finds nothing, and it opens at once.

A copy of the page gets a small script that looks at it and writes what it saw into the document, which chromium prints. Narrow
widths are those of a frame, since chromium's own window is never narrower than 500 pixels.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

import pytest

from reports.html import render_html
from tests.reports.big_run import big_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLACES = [
    Path(os.environ.get("RBX_AXE") or "/nonexistent"),
    *(folder / "node_modules/axe-core/axe.min.js" for folder in (Path(__file__).parent, Path(__file__).parents[2])),
]
AXE = next((place for place in PLACES if place.is_file()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
needs_axe = pytest.mark.skipif(AXE is None, reason="no axe-core: npm install axe-core, or set RBX_AXE to axe.min.js")

ERRORS = "<script>window.seen={errors:[]};addEventListener('error',(e)=>seen.errors.push(e.message))</script>"
# Written into the parent's document where the page is in a frame.
REPORT = """<script>
addEventListener("load", async () => {
  const root = document.documentElement;
  const seen = window.seen;
  seen.load = performance.timing.domContentLoadedEventEnd - performance.timing.responseStart;
  seen.width = innerWidth;
  seen.overflow = root.scrollWidth - innerWidth;
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  try { seen.found = await (ACTION)(); } catch (e) { seen.errors.push(String(e)); }
  const out = parent.document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  parent.document.body.append(out);
});
</script>"""
NOTHING = "async () => null"
OPEN = "document.querySelectorAll('details').forEach((d) => { d.open = true; });"
RUN_AXE = (
    "async () => { " + OPEN + " const r = await axe.run(document, { resultTypes: ['violations'] });"
    " return r.violations.map((v) => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]); }"
)


def look(folder, html, width=1280, dark=False, action=NOTHING, scripts=True):
    """What a page of that width looks like to a script in it."""
    page = html.replace("script-src 'unsafe-inline'", "script-src 'unsafe-inline' 'unsafe-eval'", 1)
    axe = f"<script>{AXE.read_text(encoding='utf-8')}</script>" if "axe." in action else ""
    page = page.replace("<style>", ERRORS + axe + "<style>", 1)
    if not scripts:
        head, _, tail = page.rpartition("<script>")
        page = head + "<script type='text/plain'>" + tail
    page = page.replace("</body>", REPORT.replace("ACTION", action) + "</body>", 1)
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = (
        f'<!doctype html><body><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe></body>'
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--allow-file-access-from-files", "--hide-scrollbars", f"--user-data-dir={profile}"),
            *("--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            (folder / "frame.html").as_uri(),
        ]
        out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', out, re.S)
    assert found, "the page's script did not report"
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def small():
    """Four models with hostile names: one failed its checks; a failed cell, notes, comparisons, seeds."""
    return render_html(
        big_run(models=2, severities=(5,), classes=2, corruptions=5, budgets=3, seeds=2, hostile=True), None, []
    )


@needs_axe
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_axe_finds_no_violation_and_nothing_overflows(tmp_path, small, width, dark):
    seen = look(tmp_path, small, width, dark, RUN_AXE)
    assert (seen["width"], seen["dark"], seen["errors"]) == (width, dark, [])
    assert seen["overflow"] <= 0
    assert seen["found"] == []


@needs_axe
def test_axe_would_find_one(tmp_path, small):
    """The check itself can fail: a figure without its text, and a field without a label."""
    broken = re.sub(r'role="img" aria-label="[^"]*"', 'role="img"', small, count=1)
    broken = broken.replace("<main>", "<main><input>", 1)
    action = RUN_AXE.replace("{ resultTypes", "{ runOnly: ['label', 'role-img-alt'], resultTypes")
    assert {rule for rule, *_ in look(tmp_path, broken, action=action)["found"]} == {"label", "role-img-alt"}


USE = """async () => {
  const wait = () => new Promise((done) => setTimeout(done, 0));
  const said = () => document.getElementById("said").textContent;
  const table = [...document.querySelectorAll("#detection table")].sort((a, b) => b.rows.length - a.rows.length)[0];
  const names = () => [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[0].textContent.trim());
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const out = { all: names().length };
  const button = table.tHead.rows[0].cells[1].querySelector("button");
  button.focus();
  out.focused = document.activeElement === button;
  button.click();
  const value = (k) => Number(table.tBodies[0].rows[k].cells[1].dataset.v);
  out.descending = value(0) >= value(1) && value(1) >= value(2);
  out.sorted = [table.tHead.rows[0].cells[1].getAttribute("aria-sort"), said()];
  button.click();
  out.again = [table.tHead.rows[0].cells[1].getAttribute("aria-sort"), value(0) <= value(1)];
  const input = table.closest(".scroll").previousElementSibling.querySelector("input");
  input.value = "knn 8/255";
  input.dispatchEvent(new Event("input"));
  await wait();
  out.filtered = names();
  out.filterSaid = said();
  input.value = "";
  input.dispatchEvent(new Event("input"));
  const boxes = [...document.querySelectorAll(".models input")];
  boxes[2].click();
  out.picked = names().some((name) => name.startsWith("model 01 seed 0 "));
  out.pickSaid = said();
  out.column = [...document.querySelectorAll("#robustness th[data-m='2']")].every((c) => c.hidden);
  out.figures = [...document.querySelectorAll("figure[data-m='2']")].every((f) => f.hidden);
  return out;
}"""


def test_sorting_filtering_and_picking_models(tmp_path, small):
    seen = look(tmp_path, small, action=USE)
    assert seen["errors"] == []
    found = seen["found"]
    assert found["focused"] and found["descending"]
    assert found["sorted"][0] == "descending" and "descending" in found["sorted"][1]
    assert found["again"] == ["ascending", True]
    assert found["filtered"] and all("knn" in name and "8/255" in name for name in found["filtered"])
    assert found["filterSaid"] == f"{len(found['filtered'])} of {found['all']} rows"
    assert not found["picked"] and found["column"] and found["figures"]
    assert found["pickSaid"] == "Models: 3 of 4 shown"


READ = """async () => ({
  controls: document.querySelectorAll("main input, th button").length,
  rows: [...document.querySelectorAll("tbody tr")].every((row) => !row.hidden),
  links: [...document.querySelectorAll("nav a")].every((a) => document.querySelector(a.getAttribute("href"))),
  starred: document.querySelectorAll("#headline td .best").length,
})"""


def test_without_javascript_everything_is_there(tmp_path, small):
    found = look(tmp_path, small, action=READ, scripts=False)["found"]
    assert found["controls"] == 0  # nothing that would not work
    assert found["rows"] and found["links"] and found["starred"]


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_names_run_nothing_and_stay_inside(tmp_path, small, width):
    wild = f"async () => {{ window.alert = () => seen.errors.push('alert'); {OPEN} await 0; " + (
        "return [document.documentElement.scrollWidth - innerWidth, document.scripts.length, document.images.length]; }"
    )
    seen = look(tmp_path, small, width, action=wild)
    assert seen["errors"] == []
    assert seen["found"][0] <= 0
    assert seen["found"][1:] == [3, 0]  # the page's own script and the two of this test


@pytest.mark.slow
def test_twenty_models_open_in_two_seconds(tmp_path):
    html = render_html(big_run(), None, [])
    assert len(html.encode()) < 5e6
    for width in (390, 1280):
        seen = look(tmp_path, html, width)
        assert seen["errors"] == []
        assert seen["overflow"] <= 0
        assert seen["load"] < 2000
