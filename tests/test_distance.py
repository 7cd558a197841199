"""`adafm distance A B`, and the further metrics of `adafm eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adafm_trainer.cli import main
from adafm_trainer.metrics import authors
from adafm_trainer.metrics.domains import set_distances
from adafm_trainer.metrics.extractors import get_extractor
from adafm_trainer.metrics.inception import InceptionFeatures
from adafm_trainer.trainer.start import start_run
from tiny import image_folder, settings, source_folder


def test_distance_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = image_folder(tmp_path / "a", 10), image_folder(tmp_path / "b", 7, seed=1), tmp_path / "found.json"
    command = ["distance", str(a), str(b), "--extractor", "random-v1", "--size", "16", "--json", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    names = [f"{n}[random-v1]10x7" for n in ("fd", "kid", "target_recall", "source_recall")]
    assert list(record["metrics"]) == names and all(name in printed for name in names)
    assert "10 images" in printed and "7 images" in printed and record["source"]["images"] == 10
    assert record["extractor"]["sha256"] == get_extractor("random-v1").hash
    kid = record["metrics"]["kid[random-v1]10x7"]
    assert kid["low"] < kid["value"] < kid["high"] and (kid["n_fake"], kid["n_real"]) == (10, 7)


def test_recalls_say_which_set_covers_which() -> None:
    extractor = get_extractor("random-v1")
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(200, extractor.dims, dtype=torch.float64, generator=generator)
    wide[:, 3:], wide[:, :3] = 0, 20 * wide[:, :3]
    narrow = wide[:60] * 0.1
    found = set_distances(wide, narrow, extractor)
    assert found["target_recall[random-v1]200x60"].value > 0.9, "a wide source reaches a narrow target"
    assert found["source_recall[random-v1]200x60"].value < 0.2
    turned = set_distances(narrow, wide, extractor)
    assert turned["fd[random-v1]60x200"].value == pytest.approx(found["fd[random-v1]200x60"].value)
    assert turned["source_recall[random-v1]60x200"].value == found["target_recall[random-v1]200x60"].value
    few: list[str] = []
    assert list(set_distances(wide[:2], narrow, extractor, few.append)) == ["fd[random-v1]2x60", "kid[random-v1]2x60"]
    assert "they need 3 images on each side, got 2 and 60" in few[0]


def test_shared_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = image_folder(tmp_path / "a", 5)
    assert main(["distance", str(a), str(a), "--extractor", "random-v1", "--size", "16"]) == 0
    assert "5 files are in both sets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "code", "message"), [(0, 3, "holds no images"), (1, 3, "holds 1 image; a distance needs at least 2")]
)
def test_sets_too_small_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, code: int, message: str
) -> None:
    good, bad = image_folder(tmp_path / "good", 4), image_folder(tmp_path / "bad", count)
    for pair in ((good, bad), (bad, good)):
        assert main(["distance", *map(str, pair), "--extractor", "random-v1", "--size", "16"]) == code
        error = capsys.readouterr().err
        assert message in error and str(bad) in error
    assert main(["distance", str(good), "nowhere", "--extractor", "random-v1"]) == 3
    assert "'nowhere'" in capsys.readouterr().err
    assert main(["distance", str(good), str(good), "--size", "0", "--extractor", "random-v1"]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on images of 16 px, beside the images it was trained on and others."""
    folder = tmp_path_factory.mktemp("run")
    image_folder(folder / "images")
    image_folder(folder / "held", 20, seed=1)
    source_folder(folder / "source")
    return start_run("transfergan", settings(folder, steps=2))


def evaluate(run: Path, *flags: str) -> dict:
    out = run.parent / "metrics.json"
    images = run.parent / "held"
    command = ["eval", str(run), "--data", str(images), "--samples", "20", "--json", str(out), "--device", "cpu"]
    assert main([*command, *flags]) == 0
    return json.loads(out.read_text())["metrics"]


def test_eval_says_why_there_is_no_inception_score(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(run, "--extractor", "random-v1")
    assert {"kmmd[random-v1]20_heldout", "kmmd_biased[random-v1]20_heldout", "mv[random-v1]20_heldout"} <= set(found)
    printed = capsys.readouterr().out
    assert "is left out: the Inception score needs class probabilities, and random-v1 gives none" in printed
    assert not any(name.startswith(("is[", "iw_", "IW", "fid_authors")) for name in found)


def test_eval_with_an_independent_critic(run: Path) -> None:
    first, again = (evaluate(run, "--extractor", "random-v1", "--iw", "3") for _ in range(2))
    value = first["iw_distance[critic3]10_heldout"]
    assert value == again["iw_distance[critic3]10_heldout"] and value["low"] < value["value"] < value["high"]
    assert first["IW[critic3]10_heldout"]["value"] == -value["value"]
    assert "3 steps of 10 on 10 real and 10 generated" in value["note"]


def test_eval_by_the_authors_protocol(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authors, "SIZE", 80)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = InceptionFeatures("torchvision").state_dict()
    path = run.parent / "weights.pth"
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    found = evaluate(run, "--extractor", "random-v1", "--fid-authors", str(path))
    assert found["fid_authors[inception-torchvision]16_heldout"]["value"] > 0, "20 images are cut to 16"
    assert found["is_authors[inception-torchvision]16_heldout"]["value"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--fid-authors", "nowhere.pth"], 2, "no Inception weights are at nowhere.pth"),
        (["--iw", "5", "--samples", "3"], 3, "it needs 4 images"),
        (["--iw", "-1"], 2, "--iw -1"),
        (["--samples", "0"], 2, "--samples is 0"),
    ],
)
def test_eval_refuses(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str) -> None:
    assert main(["eval", str(run), "--data", str(run.parent / "held"), "--extractor", "random-v1", *flags]) == code
    assert message in capsys.readouterr().err
