"""The study: its plan, its judgements, and a tiny run of it that is stopped and continued."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from adafm_trainer.data.images import load_image_set
from adafm_trainer.errors import Interrupted, UsageError
from adafm_trainer.methods.config import TrainConfig
from adafm_trainer.methods.config_file import read_config
from adafm_trainer.models.catalogue import describe
from adafm_trainer.models.source import load_pair, save_pair
from adafm_trainer.study import findings, parts, present
from adafm_trainer.study.__main__ import main
from adafm_trainer.study.classifier import digit_classifier
from adafm_trainer.study.measure import changed, class_shares, probabilities, summary
from adafm_trainer.study.plan import FULL, QUICK, Digits, Part, Run
from adafm_trainer.study.runner import Runner
from adafm_trainer.trainer.signals import StopRequest
from PIL import Image

SMALL = {"device": "cpu", "precision": "fp32", "batch": 4, "tick": 10, "loss": "nonsat", "extractor": "random-v1"}
MODEL = {"arch": "mnist", "dim": 2, "z_dim": 3}


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_every_run_of_the_plan_is_a_run_of_its_own_with_valid_settings(scale):
    everything = [run for part in parts.parts(scale) for run in part.runs]
    assert len({run.name for run in everything}) == len(everything)
    for run in everything:
        config = TrainConfig(data="x", outdir="y", seed=run.seed, **run.settings)
        assert config.device == "cpu" and (run.heldout is not None or config.eval_every < 0)
        assert (run.model is not None) == (not run.sources)
        assert run.model is None or describe(dict(run.model)).to_json()


def test_the_plan_has_what_the_issue_asks_for():
    assert len(FULL.seeds) >= 3 and FULL.targets == (25, 100, 1000)
    by_name = {part.name: part for part in parts.parts(FULL)}
    counts = {name: len(part.runs) for name, part in by_name.items()}
    assert counts["methods"] == 5 * 3 * len(FULL.seeds) and counts["transfer"] == 4 * len(FULL.seeds)
    assert counts["off-manifold"] == 2 * len(FULL.seeds) and counts["outside"] == 3 * len(FULL.seeds)
    relevant = by_name["two-sources"].runs[0]
    assert [7 in source.images.digits for source in relevant.sources] == [False, True]
    assert 7 not in by_name["off-manifold"].runs[0].sources[0].images.digits
    both = by_name["two-sources"].runs[-1]
    for source in both.sources:
        assert len(set(source.images.digits) & set(both.images.digits)) == 1


def test_intervals_are_students():
    found = summary([1.0, 2.0, 6.0])
    assert found["mean"] == 3.0 and found["median"] == 2.0
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    assert found["high"] - 3.0 == pytest.approx(half, rel=1e-4) and 3.0 - found["low"] == pytest.approx(half, rel=1e-4)
    low, high = (summary([0.1, 0.9, 0.9], share=True)[end] for end in ("low", "high"))
    assert (low, high) == (0.0, 1.0) and summary([0.5, 0.6], share=True)["high"] == 1.0
    assert summary([0.5, 0.52], share=True)["high"] == summary([0.5, 0.52])["high"]
    assert summary([1.0, None])["missing"] == 1 and summary([1.0, None])["low"] is None
    assert summary([1.0, 2.0, None])["mean"] == 1.5 and summary([1.0, 2.0, None])["high"] is None
    assert summary([None])["mean"] is None
    with pytest.raises(ValueError, match="11 seeds"):
        summary([0.0] * 11)


class Digitised(Runner):
    """A runner whose digits are noise of this test instead of those of a wheel."""

    def images(self, images):
        path = self.root / "data" / images.name
        for digit in images.digits:
            for k in range(images.count):
                file = path / str(digit) / f"{k}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                noise = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(31 * digit + k))
                Image.fromarray(noise.to(torch.uint8).numpy()).save(file)
        return path


def two_runs(steps=2):
    source = Run("from", "scratch", Digits("some", (1, 2), 4), {**SMALL, "steps": steps, "eval_every": -1}, model=MODEL)
    mined = {**SMALL, "steps": steps, "stage2": "none", "eval_samples": 6}
    apart = Digits("apart", (1, 2), 4, 4)
    return source, Run("mined-seed0", "minegan", Digits("one", (1,), 5), mined, 0, apart, (source,))


def test_a_study_is_stopped_between_runs_and_continued(tmp_path, monkeypatch):
    source, mined = two_runs()
    now = [0.0]
    monkeypatch.setattr("adafm_trainer.study.runner.time.monotonic", lambda: now[0])
    runner = Digitised(tmp_path, QUICK, lambda text: now.__setitem__(0, 20.0), deadline=10.0)
    with pytest.raises(Interrupted, match="before mined-seed0"):
        runner.do(mined)
    assert runner.done(source) and not runner.done(mined)
    lines = []
    again = Digitised(tmp_path, QUICK, lines.append, deadline=math.inf)
    again.do(mined)
    assert again.done(mined) and lines == ["mined-seed0: minegan, 2 steps"]
    again.do(mined)
    assert len(lines) == 1
    assert again.seconds(source) == 20.0


def test_a_run_that_was_cut_off_is_continued_or_begun_again(tmp_path):
    _, mined = two_runs()
    runner = Digitised(tmp_path, QUICK, lambda text: None, math.inf)
    runner.do(mined)
    folder = runner.folder(mined)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").unlink()
    assert not runner.done(mined)
    runner.do(mined)
    assert (folder / "metrics.jsonl").read_text() == metrics
    shutil.rmtree(folder / "checkpoints")
    assert not runner.done(mined)
    runner.do(mined)
    assert runner.done(mined) and (folder / "metrics.jsonl").read_text() == metrics


def test_runs_of_other_settings_or_sizes_are_refused(tmp_path):
    source, _ = two_runs()
    runner = Digitised(tmp_path, QUICK, lambda text: None, math.inf)
    runner.do(source)
    other = dataclasses.replace(source, settings={**source.settings, "lr_g": 0.25})
    with pytest.raises(UsageError, match=r"lr_g 0\.0005, and the study now has 0\.25"):
        runner.do(other)
    assert read_config(runner.folder(source) / "config.yaml")[1].lr_g == 5e-4
    with pytest.raises(UsageError, match="study of other sizes"):
        Digitised(tmp_path, FULL, lambda text: None, math.inf)


def test_one_bit_that_changed_in_stage_1_is_found(tmp_path):
    source, mined = two_runs()
    runner = Digitised(tmp_path, QUICK, lambda text: None, math.inf)
    runner.do(mined)
    folder, pair = runner.source(source), load_pair(runner.source(source))
    assert changed(runner.folder(mined), [folder])["differing"] == []
    assert changed(runner.folder(mined), [folder])["tensors"] == len(pair.generator_state)
    average = {name: value.clone() for name, value in pair.average_state.items()}
    average["deconv1.bias"].view(torch.int32)[0] ^= 1
    other = save_pair(tmp_path / "other", pair.cfg, pair.generator_state, None, average)
    assert set(changed(runner.folder(mined), [other])["differing"]) == {
        "generator.generator.deconv1.bias",
        "generator.deconv1.bias",
    }


def bars(folder, digits, count):
    """A digit is a bar whose height says which; its column varies."""
    for digit in digits:
        for k in range(count):
            image = torch.zeros(28, 28, dtype=torch.uint8)
            image[6 : 9 + 2 * digit, 8 + k % 10 : 12 + k % 10] = 255
            file = folder / str(digit) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(file)
    return folder


def test_the_classifier_names_what_it_has_not_seen_and_is_read_back(tmp_path):
    training, apart = bars(tmp_path / "training", (1, 4, 7), 6), bars(tmp_path / "apart", (1, 4, 7), 10)
    made = digit_classifier(training, apart, 60, tmp_path / "classifier")
    assert made.tested == 30 and made.accuracy > 0.8
    images = load_image_set(apart, size=28, channels=1).pixels
    right = torch.tensor([1, 4, 7]).repeat_interleave(10)
    assert (made(images) == right).double().mean().item() == pytest.approx(made.accuracy)
    again = digit_classifier(training, apart, 0, tmp_path / "classifier")
    assert again.accuracy == made.accuracy and torch.equal(again(images), made(images))


def test_shares_and_probabilities_are_read_off_a_run_of_two_sources(tmp_path):
    source, mined = two_runs()
    other = dataclasses.replace(source, name="from-too", seed=1)
    settings = {**mined.settings, "mining_warmup": 1, "eval_every": -1, "keep": 3}
    both = dataclasses.replace(mined, sources=(source, other), settings=settings, heldout=None)
    runner = Digitised(tmp_path, QUICK, lambda text: None, math.inf)
    runner.do(both)
    course = probabilities(runner.folder(both))
    p = course[2]
    assert course[0] == [0.5, 0.5] and sorted(course) == [0, 2]
    assert len(p) == 2 and sum(p) == pytest.approx(1) and p[0] != 0.5
    assert changed(runner.folder(both), [runner.source(source), runner.source(other)])["differing"] == []
    assert changed(runner.folder(both), [runner.source(other), runner.source(source)])["differing"] != []

    def by_brightness(images):
        assert images.dtype == torch.uint8 and images.shape == (20, 1, 28, 28)
        return (images.double().mean((1, 2, 3)) > 128).long() * 3

    shares = class_shares(runner.folder(both), by_brightness, 20)
    assert len(shares) == 10 and sum(shares) == pytest.approx(1) and shares[0] + shares[3] == pytest.approx(1)


class Finished:
    """What the judgement of ``transfer`` reads of a runner, with given courses of KID."""

    def __init__(self, courses):
        self.courses = courses

    def metrics(self, run):
        which = run.name.split("-")[1]
        kids = self.courses[which]
        return [{"step": 10 * (k + 1), "metrics": {"kid[x]9_heldout": {"value": v}}} for k, v in enumerate(kids)]

    def diverged(self, run):
        return run.name in ("transfer-generator-seed2",)


def transfer_part():
    (part,) = [part for part in parts.parts(QUICK) if part.name == "transfer"]
    return part


def test_transfer_is_judged_by_every_seed_and_says_when_scratch_was_reached():
    courses = {"none": [3.0, 2.0], "both": [2.0, 1.0], "generator": [4.0, 5.0], "discriminator": [3.0, 1.5]}
    first, second = findings.find(transfer_part(), Finished(courses))
    assert first.asserted and first.holds
    assert first.notes == ["by mean KID, best first: both, discriminator, none, generator"]
    steps = {row.label: row.numbers["values"] for row in second.rows}
    assert steps["both"] == [10, 10, 10] and steps["discriminator"] == [20, 20, 20] and steps["none"] == [20, 20, 20]
    assert steps["generator"] == [None, None, None]
    generator = next(row for row in first.rows if row.label == "generator")
    assert generator.quantity == "kid[x]9_heldout" and generator.numbers["missing"] == 1
    lost, _ = findings.find(transfer_part(), Finished({**courses, "both": [2.0, 2.0]}))
    assert lost.holds is False


def test_findings_become_a_table_and_charts_that_are_xml():
    courses = {"none": [3.0, 2.0], "both": [2.0, 1.0], "generator": [4.0, 5.0], "discriminator": [3.0, 1.5]}
    found = [f.to_json() for f in findings.find(transfer_part(), Finished(courses))]
    result = {"conditions": "a & b", "findings": json.loads(json.dumps(found)), "skipped": ["outside, no wheel"]}
    text = present.markdown(result)
    assert "(asserted, holds)" in text and "| both | kid[x]9_heldout | 1.000 [1.000, 1.000] | 1.000 |" in text
    assert "| both | steps | 10 [10, 10] | 10 | 10, 10, 10 |" in text and "Not done: outside, no wheel." in text
    drawn = present.charts(result)
    assert sorted(drawn) == ["transfer-00-course.svg", "transfer-00-kid.svg", "transfer-01-steps.svg"]
    for svg in drawn.values():
        root = ET.fromstring(svg)
        _, top, width, height = map(float, root.get("viewBox").split())
        for node in root.iter():
            y = float(node.get("y", 0))
            assert top <= y <= top + height and float(node.get("x", 0)) <= width
    assert len(re.findall("<polyline", drawn["transfer-00-course.svg"])) == 4
    for row in result["findings"][0]["rows"]:
        row["numbers"] = summary([2.0, 2.0])
    assert "transfer-00-kid.svg" not in present.charts(result)


def test_unknown_parts_are_refused_and_nothing_is_begun(tmp_path, capsys):
    code = main(["--parts", "source,sorcery", "--outdir", str(tmp_path / "s"), "--quick"])
    assert (
        code == UsageError.exit_code and "there is no part sorcery; there are source, frozen" in capsys.readouterr().err
    )
    assert not (tmp_path / "s").exists()


def test_time_that_is_up_gives_75_and_the_results_so_far(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adafm_trainer.study.__main__.require_packages", lambda images: None)
    code = main(["--parts", "on-manifold", "--outdir", str(tmp_path / "s"), "--quick", "--hours", "0"])
    assert code == Interrupted.exit_code and "the same command continues" in capsys.readouterr().err
    result = json.loads((tmp_path / "s" / "results" / "results.json").read_text())
    assert result["findings"] == [] and "on-manifold, not (all) run" in result["skipped"]


def test_a_signal_in_the_last_step_of_a_run_stops_the_study(tmp_path, capsys, monkeypatch):
    begun = []

    def finish(self, run):
        begun.append(run.name)
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("adafm_trainer.study.__main__.require_packages", lambda images: None)
    monkeypatch.setattr(Runner, "do", finish)
    code = main(["--parts", "on-manifold", "--outdir", str(tmp_path / "s"), "--quick"])
    assert code == Interrupted.exit_code and len(begun) == 1
    assert f"asked to stop after {begun[0]}" in capsys.readouterr().err


def test_two_processes_do_not_share_a_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adafm_trainer.study.__main__.require_packages", lambda images: None)
    other = {"pid": os.getppid(), "host": socket.gethostname()}
    (tmp_path / "lock").write_text(json.dumps(other))
    code = main(["--parts", "on-manifold", "--outdir", str(tmp_path), "--quick"])
    assert code == UsageError.exit_code and f"in use by process {os.getppid()}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_package_that_is_missing_is_named_before_the_first_run(tmp_path, capsys, monkeypatch):
    def absent(distribution, *_, **__):
        raise UsageError(f"{distribution} is not installed")

    monkeypatch.setattr("adafm_trainer.study.images.packaged_file", absent)
    code = main(["--parts", "on-manifold", "--outdir", str(tmp_path / "s"), "--quick"])
    assert code == UsageError.exit_code and "study: mlxtend is not installed" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_every_part_has_a_judgement():
    for part in parts.parts(QUICK):
        with pytest.raises(AttributeError):
            findings.find(Part(part.name, "", part.runs), Path("no runner"))
