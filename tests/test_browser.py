"""The pages in a real browser: nothing is fetched, nothing complains, nothing overflows, everything can be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import folder, metrics, png, predictions, scores, write  # noqa: F401 (a fixture)

from breastcli.config import ReportConfig
from breastcli.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
PHONE_PX = 390
CONTRAST = 4.5  # WCAG 2.1, level AA
# How wide the page is, and the text that stands out least from what is behind it.
MEASURE = """<script>
addEventListener("load", () => {
  const light = text => {
    const part = text.match(/[\\d.]+/g).map(Number), shares = part.slice(0, 3).map(v => v / 255);
    const [r, g, b] = shares.map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return [.2126 * r + .7152 * g + .0722 * b, part.length < 4 ? 1 : part[3]];
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const [value, alpha] = light(getComputedStyle(node).backgroundColor);
      if (alpha > .99) return value;
    }
    return 1;
  };
  let worst = [99, ""];
  for (const node of document.body.querySelectorAll("*")) {
    const text = [...node.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim()).join("");
    if (!text || !node.getClientRects().length) continue;
    const [a, b] = [light(getComputedStyle(node).color)[0], behind(node)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst[0]) worst = [ratio, text.slice(0, 60)];
  }
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({width: root.scrollWidth, contrast: worst[0], text: worst[1],
    dark: matchMedia("(prefers-color-scheme: dark)").matches}), "*");
});
</script>"""
FRAME = """<!doctype html><body><pre></pre><script>
addEventListener("message", event => document.querySelector("pre").textContent = event.data)</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: 4000px"></iframe>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@dataclass(frozen=True)
class Seen:
    """What a visit left behind."""

    dom: str
    console: list[str]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Seen]:
    """Open a file in a browser with a profile of its own."""

    def run(page: Path, *flags: str) -> Seen:
        profile = tmp_path / "profile"
        command = [str(CHROMIUM), *FLAGS, OFFLINE, f"--user-data-dir={profile}", *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        shutil.rmtree(profile, ignore_errors=True)
        return Seen(done.stdout, re.findall(r":CONSOLE.*", done.stderr))

    return run


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server's address, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


def hostile(address: str) -> str:
    """Return markup that runs a script and asks the server for two files."""
    return f"<script>console.error('boo')</script><img src='{address}/image'><iframe src=\"{address}/frame\"></iframe>"


@pytest.fixture
def pages(folder: Path, server: tuple[str, list[str]], tmp_path: Path) -> list[Path]:  # noqa: F811
    """A run's page and one that compares two runs; whatever a user could name is hostile, and long."""
    evil = hostile(server[0])
    run = json.loads((folder / "run.json").read_text())
    run["argv"] = ["breastcli", "train", "--data", evil]
    run["dataset"] |= {"title": evil, "classes": [evil, "m"], "notes": [evil], "split_fingerprint": evil}
    run["audit"] = {"verdict": evil, "findings": {evil: evil}}
    write(folder / "run.json", run)
    (folder / "config.yaml").write_text(f"train:\n  arch: {json.dumps(evil)}\n")
    changes = {"classes": (evil, "malignant"), "balanced_accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}}
    document = metrics(image=scores(**changes), by_subtype={evil: scores()}, folds=[{"run": evil, "n": 3}])
    document["dataset"] |= {"notes": [evil], "leaky": "LEAKY: image-level split", "drawn": True, "synthetic": True}
    write(folder / "evaluate/test/metrics.json", document)
    predictions(folder, [evil.replace('"', "'"), "a-name-without-any-space-" * 8], patient=evil.replace('"', "'"))
    for path in folder.rglob("*.png"):
        path.write_bytes(png(900))  # wider than a phone
    other = Path(shutil.copytree(folder, folder.with_name("other <b>run<b>")))
    (other / "config.yaml").write_text("train:\n  arch: resnet50\n  fold: 1\n")
    made = report(ReportConfig(runs=(str(folder), str(other)), out=str(tmp_path / "both")))
    return [made.pages[0], made.out]


def test_the_browser_tells_of_what_a_bad_page_does(browse: Callable, server: tuple, tmp_path: Path) -> None:
    address, asked = server
    bad = tmp_path / "bad.html"
    bad.write_text(f"<title>bad</title>{hostile(address)}")
    assert any("boo" in line for line in browse(bad, "--dump-dom").console)
    assert {"/image", "/frame"} <= set(asked)


def test_nothing_is_fetched_and_nothing_complains(browse: Callable, server: tuple, pages: list[Path]) -> None:
    for page in pages:
        seen = browse(page, "--dump-dom")
        assert "Research software, not a medical device" in seen.dom
        assert "&lt;script&gt;console.error('boo')" in seen.dom
        assert "<script" not in seen.dom
        assert "<iframe" not in seen.dom
        assert seen.console == []
    assert server[1] == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_phone_shows_all_of_it_with_contrast(
    mode: str, browse: Callable, server: tuple, pages: list[Path], tmp_path: Path
) -> None:
    for page in pages:
        text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(encoding="utf-8"), count=1)
        (tmp_path / "measured.html").write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
        (tmp_path / "frame.html").write_text(FRAME.format(page="measured.html", width=PHONE_PX))
        flags = ["--force-dark-mode"] if mode == "dark" else []
        dom = browse(tmp_path / "frame.html", "--dump-dom", "--window-size=800,4100", *flags).dom
        found = json.loads(html.unescape(dom.partition("<pre>")[2].partition("</pre>")[0]))
        assert found["dark"] == (mode == "dark")
        assert found["width"] <= PHONE_PX, page
        assert found["contrast"] >= CONTRAST, found["text"]


def test_screens_and_paper_show_something(browse: Callable, pages: list[Path], tmp_path: Path) -> None:
    brightness = {}
    for mode, flags in {"light": [], "dark": ["--force-dark-mode"]}.items():
        shot = tmp_path / f"{mode}.png"
        browse(pages[0], "--window-size=1200,2400", f"--screenshot={shot}", *flags)
        with Image.open(shot) as image:
            grey = np.asarray(image.convert("L"), dtype=float)
        brightness[mode] = np.median(grey)
        assert grey.std(axis=1).max() > 20, "there is text"
        assert len(np.unique(grey)) > 50
    assert brightness["dark"] < 60
    assert brightness["light"] > 200
    for page in pages:
        browse(page, f"--print-to-pdf={tmp_path / 'paper.pdf'}")
        paper = (tmp_path / "paper.pdf").read_bytes()
        assert paper.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", paper)) >= 2
