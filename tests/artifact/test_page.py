"""The page of a run in a real browser: no errors, every claim, pictures and timelines that are not blank."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import fabricate
from fabricated import failed
from PIL import Image

from djinn.artifact.claims import load_claims
from djinn.artifact.report import write_report
from djinn.bench.records import append_record
from djinn.figures import draw_all
from djinn.figures.style import LANES
from djinn.profiles import load_profile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run, written once; not to be changed."""
    fabricated_run = fabricate(tmp_path_factory.mktemp("page") / "run")
    profile = load_profile(fabricated_run / "profile.yaml")
    odd = failed(profile, "resident", 0, "error", "<script>console.error('not escaped')</script>")
    append_record(fabricated_run / "results" / "baselines.jsonl", odd)
    draw_all(fabricated_run)
    return write_report(fabricated_run)


def test_it_opens_without_errors_and_shows_everything(page: Path) -> None:
    opened = browse(page, "--dump-dom")
    assert "CONSOLE" not in opened.stderr, opened.stderr
    dom = opened.stdout
    claims = "".join(re.findall(r'<table class="claims cards">.*?</table>', dom, flags=re.S))
    assert len(re.findall(r"<tr>\s*<td>C\d+[ab]?</td>", claims)) == len(load_claims())
    assert [int(count) for count in re.findall(r'data-drawn="(\d+)"', dom)] == [120, 120]
    assert "&lt;script&gt;console.error" in dom


UNFOLD = "document.querySelectorAll('details').forEach(each => { each.open = true; });"
PROBE = Path(__file__).with_name("page_probe.js").read_text()
COPY = "onload = () => document.body.append(frames[0].document.getElementById('found').cloneNode(true))"


@pytest.mark.parametrize("width", [390, 1300], ids=["phone", "desktop"])
def test_it_is_accessible(page: Path, tmp_path: Path, width: int) -> None:
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", f"<script>{UNFOLD}{PROBE}</script></body>"))
    # A window is at least 500 wide; a frame is as wide as it is told.
    frame = tmp_path / "frame.html"
    source = f'<iframe src="{probed.as_uri()}" width="{width}" height="800"></iframe><script>{COPY}</script>'
    frame.write_text(source)
    flags = ("--allow-file-access-from-files", "--disable-web-security", "--disable-site-isolation-trials")
    opened = browse(frame, "--dump-dom", *flags)
    match = re.search(r'<pre id="found">(.*?)</pre>', opened.stdout)
    assert match is not None, opened.stderr
    found = json.loads(html.unescape(match[1]))
    assert found["width"] == pytest.approx(width, abs=20)
    assert found["across"] <= 0  # nothing but a table's own box scrolls sideways
    assert found["worst"] >= 4.5
    assert found["pictures"]
    assert all(alt and pixels for alt, pixels in found["pictures"])
    assert found["nameless"] == 0
    assert found["focused"]
    (begin, end), (near, far), (later, _) = found["whole"], found["zoomed"], found["moved"]
    assert far - near == pytest.approx((end - begin) * 0.64)
    assert later > near
    assert found["back"] == found["whole"]
    assert found["clicked"][1] - found["clicked"][0] == pytest.approx((end - begin) * 0.8)


def test_it_prints(page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    browse(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert 2 <= pdf.read_bytes().count(b"/Type /Page\n") <= 6


@pytest.mark.parametrize("width", [390, 1300], ids=["phone", "desktop"])
def test_nothing_is_blank(page: Path, tmp_path: Path, width: int) -> None:
    shot, unfolded = tmp_path / "page.png", page.with_name("unfolded.html")
    unfolded.write_text(page.read_text().replace("</body>", f"<script>{UNFOLD}</script></body>"))
    browse(unfolded, f"--screenshot={shot}", f"--window-size={width},16000", "--hide-scrollbars")
    with Image.open(shot) as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert colours is not None
    seen = {colour for _, colour in colours}
    # The lanes' own colours, copies and compute, which are wide enough to be seen pure on a phone.
    lanes = [LANES[lane] for lane in ("copy", "compute")]
    assert {tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in lanes} <= seen
