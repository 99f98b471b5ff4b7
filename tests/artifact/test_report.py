"""The report says everything there is: every system, every claim, what is missing; and needs no network."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from fabricated import fabricated

from djinn.artifact.claims import load_claims
from djinn.artifact.provenance import write_provenance
from djinn.artifact.report import FIGURES, systems_frame, write_report
from djinn.errors import ConfigError
from djinn.figures import draw_all
from djinn.figures.style import LOOKS
from djinn.profiles import load_profile


def test_report(fabricated_run: Path):
    draw_all(fabricated_run)
    profile = load_profile(fabricated_run / "profile.yaml")
    write_provenance(fabricated_run, profile)
    page = write_report(fabricated_run)
    html, text = page.read_text(), (fabricated_run / "report.md").read_text()
    assert "claims that apply here pass" in html
    for claim in load_claims():
        assert f"<td>{claim.id}</td>" in html
        assert re.search(rf"\| {claim.id} \| (PASS|FAIL|NOT RUN) \| {re.escape(claim.text)} \|", text)
    for name in profile.systems:
        assert f">{LOOKS[name].label}</th>" in html
        assert LOOKS[name].label in text
    for words in (
        "OOM",
        "timed out in 1 of 2",
        "not run",
        "out of memory: 26 GB of weights, 12 GB of RAM",
        "synthetic",
        "90.8% (89 to 92.6)",
    ):
        assert words in html
        assert words in text
    missing = [name for name in FIGURES if not (fabricated_run / "figures" / f"{name}.png").is_file()]
    assert html.count("data:image/png;base64,") == len(FIGURES) - len(missing) + 1  # the headline also for a phone
    assert re.search(r'<picture><source media="[^"]*" srcset="data:image[^"]*"><img [^>]*></picture>', html)
    without = {"token_parts", "budgets", "predictions", "ring_sweep", "batch_sweep", "prompt_sweep", "pcie"}
    assert set(missing) == without
    assert all(FIGURES[name] in unescape(html) for name in missing)
    assert (fabricated_run / "figures" / "ttft.caption.txt").read_text().strip() in unescape(html)
    assert not re.search(r"(src|href)=.?(https?:)?//", html)
    assert html.count("<img") == html.count("alt=")


def test_a_mixture_has_a_row_for_its_hit_rate_and_no_other_model_has():
    profile = load_profile("smoke_moe")
    records = [fabricated(profile, "djinn", run, expert_hits=3 + run, expert_misses=7 - run) for run in range(2)]
    records.append(fabricated(profile, "djinn:whole", 0))
    row = systems_frame(records, []).loc["picked experts found in the pool"]
    assert row.tolist() == ["35% (30 to 40)", ""]
    assert row.name not in systems_frame(records[2:], []).index


def test_timelines_of_other_gpus_follow_the_first_ones(fabricated_run: Path):
    figures = fabricated_run / "figures"
    figures.mkdir()
    for name in ("timeline", "timeline_1", "timeline_2", "timeline_coded"):
        (figures / f"{name}.png").write_bytes(b"drawn elsewhere")
    text = write_report(fabricated_run).with_name("report.md").read_text()
    drawn = re.findall(r"\(figures/(timeline\w*)\.png\)", text)
    assert drawn == ["timeline", "timeline_1", "timeline_2", "timeline_coded"]
    assert f"[![{FIGURES['timeline']}, on GPU 2]" in text


@pytest.mark.slow
def test_links_lead_to_files(fabricated_run: Path):
    draw_all(fabricated_run)
    html = write_report(fabricated_run).read_text()
    links = re.findall(r'href="([^"]+)"', html)
    assert links
    assert all((fabricated_run / link).exists() for link in links)


def test_a_run_without_results_reports_that_nothing_was_run(fabricated_run: Path):
    for path in (fabricated_run / "results").iterdir():
        path.unlink()
    html = write_report(fabricated_run).read_text()
    assert "no claim applies here" in html
    assert html.count("NOT RUN</span>") == len(load_claims())
    assert "djinn has not run here yet" in html


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(tmp_path)
