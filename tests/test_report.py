"""The report says what the run directory says, in one file."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.data.grid import save_grid
from adafm_trainer.errors import DataError
from adafm_trainer.report.charts import Series, interval_chart, line_chart, ticks
from adafm_trainer.report.pictures import evolution, nearest_pairs
from adafm_trainer.report.report import write_report
from PIL import Image

KID = "kid[efflite0]500_heldout"


def entry(value, low=None, high=None, note=""):
    return {"value": value, "low": low, "high": high, "note": note}


def comparison_row(label, steps, value, committed=False):
    metrics = {KID: entry(value, value - 0.02, value + 0.02), "coverage[efflite0]500_heldout": entry(0.31)}
    return {"label": label, "steps": steps, "metrics": metrics, "note": "n", "committed": committed, "device": "A<B"}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(0, 600, 50):
        save_grid(tmp_path / "samples" / f"step{step:06d}.png", torch.rand(4, 3, 8, 8))
    save_grid(tmp_path / "reals.png", torch.rand(4, 3, 8, 8))
    save_grid(tmp_path / "nearest.png", torch.rand(4, 3, 8, 8))
    (tmp_path / "config.yaml").write_text('method: "adafm"\ndata: "faces & <co>"\nsteps: 550\nbatch: 16\nseed: 3\n')
    (tmp_path / "environment.json").write_text(json.dumps({"cpu": "Some CPU", "compute": "bfloat16"}))
    manifest = {"training": {"count": 100, "rejects": [1]}, "evaluation": {"count": 500, "rejects": []}}
    (tmp_path / "data_manifest.json").write_text(json.dumps(manifest))
    blocks = [{"network": "G", "number": 1, "group": "conv_img", "state": "frozen", "parameters": 1867, "trainable": 0}]
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    with (tmp_path / "stats.jsonl").open("w") as file:
        for step in range(0, 600, 50):
            row = {"step": step, "g_loss": 1.0, "d_loss": 1.2, "d_real": 0.4, "d_fake": -0.3, "diversity": 0.9}
            file.write(json.dumps({**row, "gamma_distance": step / 1e4, "beta_distance": 0.0}) + "\n")
        file.write(json.dumps({"step": 100, "event": "warning", "message": "may be <collapsing>"}) + "\n")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, value in ((250, 0.8), (550, 0.614)):
            metrics = comparison_row("", step, value)["metrics"]
            metrics["nearest_share[efflite0]500_heldout"] = entry(0.042, note="real set 0.06")
            file.write(json.dumps({"step": step, "metrics": metrics}) + "\n")
    rows = [comparison_row("unadapted source", 0, 1.3), comparison_row("AdaFM", 550, 0.614)]
    rows.append(comparison_row("from scratch", 500, 3.2, committed=True))
    (tmp_path / "comparison.json").write_text(json.dumps(rows))
    return tmp_path


def test_report_holds_every_part(run):
    page = write_report(run).read_text()
    for text in ("adafm on faces &amp; &lt;co&gt;", "<b>KID 0.614</b>", "47% of the unadapted source", "step 550"):
        assert text in page, text
    for text in ("from scratch *", "measured on: A&lt;B, 500 steps", "may be &lt;collapsing&gt;", "Is it copying?"):
        assert text in page, text
    for text in (
        "4.2% of the samples",
        "conv_img",
        "1,867",
        "100 training images, 500 held-out images, 1 files left out",
    ):
        assert text in page, text
    assert page.count("data:image/png;base64,") == 1 + 1 + 8 + 1


def test_report_is_self_contained_and_its_charts_are_xml(run):
    page = write_report(run).read_text()
    outside = [
        url for url in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')>\s]+)", page) if not url.startswith("data:")
    ]
    assert outside == [] and "<script" not in page
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 6
    for chart in charts:
        ET.fromstring(chart)


def test_report_of_an_unfinished_run(run):
    for name in ("comparison.json", "metrics.jsonl", "nearest.png", "blocks.json", "data_manifest.json"):
        (run / name).unlink()
    with (run / "stats.jsonl").open("a") as file:
        file.write('{"step": 600, "g_lo')
    page = write_report(run).read_text()
    assert "Not evaluated." in page and "the run was killed while it wrote it" in page and "Is it copying?" not in page


def test_malformed_row_names_file_and_line(run):
    lines = (run / "stats.jsonl").read_text().splitlines()
    lines[2] = "{broken"
    (run / "stats.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"stats\.jsonl:3"):
        write_report(run)
    (run / "blocks.json").write_text("[")
    (run / "stats.jsonl").unlink()
    with pytest.raises(DataError, match=r"blocks\.json:1"):
        write_report(run)


def test_report_command(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert cli.main(["report", str(run / "samples")]) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (0.55, 0.61), (5, 5), (0, 0), (1e-7, 3e-7), (0, 8400)])
def test_ticks_cover_the_range_with_round_numbers(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 9
    gaps = np.diff(found)
    assert np.allclose(gaps, gaps[0])


def test_charts_leave_out_what_is_not_finite():
    chart = line_chart("t", [Series("a", [(0, 1.0), (1, float("nan")), (2, 2.0)])], "x", "y")
    assert "nan" not in chart and chart.count("<circle") == 2
    assert line_chart("t", [Series("a", [])], "x", "y") == ""
    assert "nan" not in interval_chart("t", [("a", 1.0, None, None), ("b", float("nan"), None, None)], "x")


def test_nearest_pairs_put_the_closest_first(tmp_path):
    fakes = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (10, 20, 30)])
    training = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (100, 200)])
    path = nearest_pairs(fakes, training, torch.tensor([0, 1, 1]), torch.tensor([3.0, 1.0, 2.0]), tmp_path / "n.png", 2)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2 * (8 + 8 + 2), 16, 3)
    assert [pixels[0, 0, 0], pixels[8, 0, 0], pixels[0, 8, 0], pixels[8, 8, 0]] == [20, 200, 30, 200]
    assert [pixels[18, 0, 0], pixels[26, 0, 0], pixels[18, 8, 0]] == [10, 100, 255]


def test_evolution_keeps_first_and_last():
    paths = list(range(30))
    chosen = evolution(paths)
    assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] == 29 and evolution(paths[:5]) == paths[:5]
