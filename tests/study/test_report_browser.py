"""The page in headless Chromium: no error on the console, and a heat map that answers a click."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from report_kit import study

from selectune.study.report import FORMATS, content, gather

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here; Debian's package is chromium")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study(folder, ("id3", "pafi"), ("trec",), 2, 12)
    (folder / "report.html").write_text(FORMATS["html"](content(gather(folder))), "utf-8")
    return folder / "report.html"


def opened(path, profile, hash=""):
    """The page's document after its script ran, and what the console said."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", f"file://{path}{hash}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def test_the_console_is_silent_and_a_click_shows_the_tensor(path, tmp_path):
    plain, said = opened(path, tmp_path / "a")
    assert said == []
    assert 'aria-pressed="true"' not in plain
    clicked, said = opened(path, tmp_path / "a", "#map-1-2-3")
    assert said == []
    button = re.search(r'<button[^>]*id="map-1-2-3"[^>]*>', clicked)[0]
    assert 'aria-pressed="true"' in button
    words = re.search(r'aria-label="([^"]*)"', button)[1]
    shown = re.search(r'<figure class="map" id="map-1".*?class="said"[^>]*>(.*?)</p>', clicked, re.DOTALL)
    assert shown[1] == words
    assert re.search(r'<figure class="map" id="map-0"[^>]* hidden', clicked)
    assert not re.search(r'<figure class="map" id="map-1"[^>]* hidden', clicked)


def test_an_error_on_the_console_is_seen(path, tmp_path):
    """The test above can fail: a script that is not the page's own is refused, and the console says so."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(path.read_text("utf-8").replace("</main>", "<script>alert(1)</script></main>"), "utf-8")
    assert any("Content Security Policy" in line for line in opened(spoilt, tmp_path / "b")[1])


DRIVER = """
// a window has the focus of the desktop or not, as it happens; so the page's own events are made here
const moved = (at, type) => at && at.dispatchEvent(new FocusEvent(type, {bubbles: true}));
for (const type of ["focusin", "focusout"])
  window.addEventListener(type, (event) => event.isTrusted && event.stopImmediatePropagation(), true);
for (const [name, after] of [["focus", "focusin"], ["blur", null]]) {
  const own = HTMLElement.prototype[name];
  HTMLElement.prototype[name] = function () {
    const before = document.activeElement;
    own.call(this);
    if (before !== document.body) moved(before, "focusout");
    if (after) moved(this, after);
  };
}
const button = (r, c) => document.getElementById(`map-1-${r}-${c}`);
const said = () => document.querySelector("#map-1 .said").textContent;
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const point = (at, type) => at.dispatchEvent(new MouseEvent(type, {bubbles: true}));
const choice = document.querySelector("select"), seen = [], see = () => seen.push(said());
const words = [[0, 0], [0, 1], [1, 1]].map(([r, c]) => button(r, c).getAttribute("aria-label"));
choice.value = "map-1"; choice.dispatchEvent(new Event("change", {bubbles: true}));
const hint = said();
point(button(0, 0), "mouseover"); see(); point(button(0, 0), "mouseout"); see();
button(0, 0).focus(); see(); key("ArrowRight"); see(); key("ArrowDown"); see();
document.activeElement.click(); document.activeElement.blur(); see();
point(button(0, 0), "mouseover"); see(); point(button(0, 0), "mouseout"); see();
button(1, 1).click(); see();
const stops = document.querySelectorAll("#map-1 table:first-of-type button[tabindex='0']").length;
const wanted = [words[0], hint, words[0], words[1], words[2], words[2], words[0], words[2], hint];
document.title = JSON.stringify({right: seen.map((text, i) => text === wanted[i]), stops, hash: location.hash});
"""


def test_pointing_walking_and_clicking(path, tmp_path):
    """A copy of the page that lets one more script in: it points, walks by arrow keys, clicks, and reads along."""
    text = path.read_text("utf-8")
    policy = re.search(r"script-src '[^']*'", text)[0]
    driven = text.replace(policy, "script-src 'unsafe-inline'").replace("</body>", f"<script>{DRIVER}</script></body>")
    (tmp_path / "driven.html").write_text(driven, "utf-8")
    found, said = opened(tmp_path / "driven.html", tmp_path / "c")
    assert said == []
    told = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", found)[1]))
    assert told == {"right": [True] * 9, "stops": 2, "hash": ""}
