"""What is said and drawn of runs of the newer methods: interpolation, the report, the log, the dry run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.catalogue import build_discriminator, build_generator
from adafm_trainer.models.source import load_pair, save_pair
from adafm_trainer.models.wgan_config import WganResNetConfig
from adafm_trainer.trainer import machine
from adafm_trainer.trainer.checkpoint import load_checkpoint
from adafm_trainer.trainer.dry_run import dry_run
from adafm_trainer.trainer.load import load_run
from adafm_trainer.trainer.sampling import draw_latents, generate
from adafm_trainer.trainer.start import start_run
from PIL import Image
from tiny import MODEL, image_folder, settings, source_folder

WGAN = WganResNetConfig(size=16, dim=2, z_dim=6)
BIGGAN = BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=(16,))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [row for row in found if "event" not in row]


def test_interpolation_has_the_labels_of_its_seeds_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(3):
        image_folder(tmp_path / "classes" / f"c{k}", 4, seed=k)
    source_folder(tmp_path / "source", dataclasses.replace(WGAN, classes=3))
    # Tables that differ from class to class.
    pair = load_pair(tmp_path / "source")
    networks = build_generator(pair.cfg), build_discriminator(pair.cfg)
    with torch.no_grad():
        networks[0].output_norm.bias.copy_(torch.tensor([[-3.0], [0.0], [3.0]]).expand(3, 2))
    save_pair(tmp_path / "source", pair.cfg, *networks)
    data = str(tmp_path / "classes")
    run = start_run("transfergan", settings(tmp_path, data=data, labels="folders", steps=1, lr_g=0.0, lr_d=0.0))
    loaded = load_run(run, "cpu")

    def drawn(name: str, *more: str) -> list[torch.Tensor]:
        """The two rows of images."""
        path = tmp_path / f"{name}.png"
        flags = ["--seeds", "0-2", "--frames", "2", "--out", str(path), "--device", "cpu", *more]
        assert cli.main(["interpolate", str(run), *flags]) == 0
        picture = Image.open(path).convert("RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return list(pixels.view(picture.height, picture.width, 3).float().chunk(2))

    own, of_two = drawn("own"), drawn("two", "--label", "2")
    # A higher class has a higher offset before the last ReLU; rows of the batch share only its statistics.
    assert not torch.equal(own[0], of_two[0]) and not torch.equal(own[1], of_two[1])
    z = draw_latents(loaded.generator, 0, "sample", 0, range(3))
    path = torch.stack([z[0], z[1], z[1], z[2]])
    with torch.no_grad():
        expected = loaded.generator(path, torch.tensor([0, 0, 1, 1])) / loaded.config.data_scale
    shown = torch.cat([row[:16].unflatten(1, (2, 16)).permute(1, 3, 0, 2) for row in own])
    torch.testing.assert_close(shown, ((expected + 1) * 127.5).clamp(0, 255), rtol=0, atol=1)
    assert cli.main(["interpolate", str(run), "--label", "3", "--device", "cpu"]) == 2
    assert "--label 3: the run has the classes 0 to 2" in capsys.readouterr().err


def test_a_label_for_a_run_without_any_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start_run("transfergan", settings(world, steps=1))
    assert cli.main(["interpolate", str(run), "--label", "0", "--device", "cpu"]) == 2
    assert "--label 0: the run was trained without labels" in capsys.readouterr().err


def test_the_probabilities_of_sources_are_told(world: Path) -> None:
    source_folder(world / "other", dataclasses.replace(MODEL, nf=4))
    sources = (str(world / "source"), str(world / "other"))
    run = start_run("minegan", settings(world, source=sources, mining_warmup=1, stage2="none"))
    p = load_checkpoint(run / "checkpoints")[1]["generator.p"]
    assert rows(run)[0]["p"] == [0.5, 0.5] and rows(run)[-1]["p"] == p.tolist()
    assert f"p {p[0]:.2f} {p[1]:.2f}" in (run / "log.txt").read_text()
    report = (run / "report.html").read_text()
    assert "<figcaption>Sources</figcaption>" in report and "source 2" in report


def test_a_sample_is_the_same_picture_whatever_is_drawn_with_it(world: Path) -> None:
    source_folder(world / "wgan", WGAN)
    for number, source in enumerate(((str(world / "wgan"),), (str(world / "wgan"), str(world / "source")))):
        run = start_run("minegan", settings(world, f"run{number}", source=source, steps=1))
        generator = load_run(run, "cpu").generator
        rows = generate(generator, 0, "sample", range(8), batch=4)
        assert torch.equal(generate(generator, 0, "sample", [6, 1], batch=4), rows[[6, 1]])
        # The batch's statistics do count.
        assert not torch.equal(generate(generator, 0, "sample", range(2), batch=2), rows[:2])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_in_parts_moves_the_probabilities_once(world: Path, parts: int) -> None:
    # Of equal sources the first one wins.
    sources = (str(world / "source"), str(world / "source"))
    changes = {"mining_warmup": 0, "stage2": "none", "steps": 3, "batch_gpu": 4 // parts}
    run = start_run("minegan", settings(world, source=sources, **changes))
    p = load_checkpoint(run / "checkpoints")[1]["generator.p"]
    torch.testing.assert_close(p[1], torch.tensor(0.5 * 0.95**3, dtype=torch.float64))


def test_the_report_draws_the_penalty_of_wgan_gp_and_the_augmentation(world: Path) -> None:
    source_folder(world / "wgan", WGAN)
    report = (
        start_run("transfergan", settings(world, "wgan-run", source=str(world / "wgan"))) / "report.html"
    ).read_text()
    assert "WGAN-GP penalty" in report and "R1 penalty" not in report
    run = start_run("transfergan", settings(world, "ada-run", aug="ada"))
    report = (run / "report.html").read_text()
    assert "R1 penalty" in report and "Augmentation" in report and "WGAN-GP penalty" not in report
    assert {"aug_p", "aug_r"} <= rows(run)[-1].keys()


def test_a_source_with_classes_and_without_labels_is_told(world: Path) -> None:
    source_folder(world / "classes", dataclasses.replace(WGAN, classes=3))
    source_folder(world / "biggan", BIGGAN)
    told = "source 1 has 3 classes and is given no labels: it makes its class 0 alone; for all of them add --labels"
    for name, expected in (("classes", True), ("biggan", False)):
        run = start_run("minegan", settings(world, f"{name}-run", source=str(world / name), steps=1))
        assert (told in (run / "log.txt").read_text()) == expected


def test_several_biggans_start_at_their_own_mean_classes(world: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_pair(world / str(seed), BIGGAN, build_generator(BIGGAN), build_discriminator(BIGGAN))
    sources = (str(world / "1"), str(world / "2"))
    run = start_run("minegan", settings(world, source=sources, steps=1, lr_miner=0.0, stage2="none"))
    model = load_checkpoint(run / "checkpoints")[1]
    for k in range(2):
        mean = load_pair(world / str(k + 1)).generator_state["shared.weight"].mean(0)
        torch.testing.assert_close(model[f"generator.miners.{k}.linear8.bias"], mean)


def test_a_dry_run_measures_the_stage_that_trains_most(world: Path) -> None:
    config = settings(world, steps=4, stage2_start=2, modulation="autograd")
    whole = dry_run("minegan", config)
    alone = dry_run("minegan", dataclasses.replace(config, stage2_start=4))
    assert whole.held["optimizer state"] > alone.held["optimizer state"]
    assert whole.held["gradients"] > alone.held["gradients"]


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    """Installed inside another repository, the package has no commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    here = tmp_path / "site" / "machine.py"
    here.parent.mkdir()
    here.write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(machine, "__file__", str(here))
    assert (machine.commit(), machine.dirty()) == ("unknown", None)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert machine.commit() != "unknown" and machine.dirty() is False
    here.write_text("changed")
    assert machine.dirty() is True
