"""The demo on the bundled source and images, shortened."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.bench.measure import OURS
from adafm_trainer.bench.step_cases import cases, make_start
from adafm_trainer.bench.step_ways import build
from adafm_trainer.errors import UsageError
from adafm_trainer.locate import source_path
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.demo import COMMITTED, STEPS, VARIANTS, committed_rows, demo_config, run_variant


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert cli.main(["demo", "--outdir", str(folder), "--steps", "4", "--eval-samples", "16"]) == 0
    return folder


def test_demo_leaves_everything_a_user_looks_at(demo):
    rows = json.loads((demo / "comparison.json").read_text())
    labels = [row["label"] for row in rows]
    assert labels[:2] == ["unadapted source", "AdaFM"]
    assert set(labels) == {"unadapted source", *(variant.label for variant in VARIANTS)}
    assert [row["committed"] for row in rows] == [False, False, True, True, True]
    html = (demo / "report.html").read_text()
    assert all(label in html for label in labels)
    assert (demo / "samples" / "step000004.png").is_file() and (demo / "nearest.png").is_file()


def test_every_row_of_the_comparison_has_the_same_length(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("adafm_trainer.trainer.demo.start_run", lambda method, config: taken.append((method, config)))
    config = demo_config(tmp_path, 7, 16)
    for variant in VARIANTS:
        run_variant(variant, config, tmp_path)
    assert {method for method, _ in taken} == {"adafm", "transfergan", "scratch"}
    assert {(run.steps, run.batch) for _, run in taken} == {(7, config.batch)}


def test_demo_evaluates_on_images_it_did_not_train_on(demo):
    manifest = json.loads((demo / "data_manifest.json").read_text())
    training = {entry["sha256"] for entry in manifest["training"]["images"]}
    held_out = {entry["sha256"] for entry in manifest["evaluation"]["images"]}
    assert (len(training), len(held_out)) == (100, 500) and not training & held_out


def test_demo_refuses_a_folder_in_use(demo):
    with pytest.raises(UsageError, match="is not empty"):
        cli.demo.run_demo(demo, steps=1, eval_samples=2)


def test_demo_can_be_run_again(tmp_path):
    assert cli.demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert cli.demo.free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_modulation_trains_from_the_first_step(demo):
    assert demo_config("x", 500, 500).adafm_start == 0
    rows = [json.loads(line) for line in (demo / "stats.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "event" not in row]
    assert rows[0]["gamma_distance"] == 0 and rows[-1]["gamma_distance"] > 0 and rows[-1]["beta_distance"] > 0


def test_a_demo_step_runs_the_compiled_op():
    case = next(case for case in cases("cpu", quick=False) if case.name == "demo")
    case = dataclasses.replace(case, batch=2)
    run = build(case, OURS, "cpu", make_start(case))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.generator()
    counts = {event.key: event.count for event in profile.key_averages()}
    layers = sum(name.endswith(".gamma") for name, _ in run.networks.generator.named_parameters())
    assert layers == 6
    ours = {name: count for name, count in counts.items() if name.startswith("adafm_compiled::")}
    once = ("modulate_many_out", "modulate_many_backward_out", "adam_many")
    assert ours == {f"adafm_compiled::{name}": 1 for name in once}


def test_committed_comparison_meets_its_claims():
    rows = {row["label"]: row for row in committed_rows()}
    assert set(rows) == {variant.label for variant in VARIANTS[1:]}
    measured = json.loads(files("adafm_trainer").joinpath("assets", COMMITTED).read_text(encoding="utf-8"))
    kid = {row["label"]: row["metrics"]["kid[efflite0]500_heldout"] for row in measured}
    assert kid["AdaFM"]["high"] < min(kid["gamma, beta at identity"]["low"], kid["from scratch"]["low"])
    assert all(row["committed"] and row["device"] and row["steps"] == STEPS for row in rows.values())


def test_bundled_source_says_how_it_was_made():
    pair = load_pair(source_path("bundled"))
    assert {"command", "data", "seed", "steps", "seconds", "device"} <= pair.meta.keys()
    folder = source_path("bundled")
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 24 * 2**20
    assert (folder / "curve.json").is_file() and (folder / "README.md").is_file()
