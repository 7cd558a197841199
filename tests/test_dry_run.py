"""`adafm train --dry-run`: what it predicts, what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.errors import UsageError
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.trainer.dry_run import FAKES, GENERATOR, PENALISED, PLAIN, dry_run
from adafm_trainer.trainer.memory import LiveMeter, SavedMeter
from adafm_trainer.trainer.start import start_run
from tiny import MODEL, image_folder, settings, source_folder
from torch import nn

# The prediction counts tensors; the measurement also has what convolutions use while they run.
FACTOR = 2.0


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def flags(world, *more):
    common = ["--data", str(world / "images"), "--source", str(world / "source"), "--outdir", str(world / "run")]
    return ["train", "adafm", *common, "--freeze-g", "2", "--batch", "4", "--device", "cpu", *more]


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_command_prints_everything_and_writes_nothing(world, capsys):
    before = contents(world)
    assert cli.main(flags(world, "--dry-run", "--extractor", "random-v1")) == 0
    assert contents(world) == before
    printed = capsys.readouterr().out
    for line in ("conv_img     frozen", "parameters ", "gradients ", "optimizer state", "weight average"):
        assert line in printed, line
    for line in ("modulation arenas", "saved for backward", "predicted peak", "measured peak", "images/s"):
        assert line in printed, line
    for phase in (GENERATOR, PLAIN, PENALISED):
        assert re.search(rf"^  {phase} +\d+\.\d ms", printed, re.M), phase


def test_config_file_can_be_tried_too(world, capsys):
    start_run("adafm", settings(world, "first", freeze_g=2, steps=1))
    before = contents(world)
    arguments = ["train", "--config", str(world / "first" / "config.yaml"), "--outdir", str(world / "next")]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert contents(world) == before and "dry run: nothing was written" in capsys.readouterr().out


def test_mistakes_are_those_of_a_run(world, capsys):
    start_run("transfergan", settings(world, steps=1))
    with pytest.raises(UsageError, match="already holds a run"):
        dry_run("transfergan", settings(world, steps=1))
    arguments = flags(world, "--dry-run", "--outdir", str(world / "other"))
    arguments[arguments.index("--data") + 1] = str(world / "none")
    assert cli.main(arguments) == 3
    assert "no images at" in capsys.readouterr().err


def test_parts_are_counted_exactly(world):
    result = dry_run("transfergan", settings(world))
    # All of G and D is trained by Adam, whose state is two moments and a count for each tensor.
    networks = [build_generator(MODEL), build_discriminator(MODEL)]
    sizes = [4 * sum(p.numel() for p in network.parameters()) for network in networks]
    tensors = sum(len(list(network.parameters())) for network in networks)
    assert result.held["parameters"] == result.held["gradients"] == sum(sizes)
    assert result.held["optimizer state"] == 2 * sum(sizes) + 4 * tensors
    assert result.held["weight average"] == sizes[0]
    assert result.held["modulation arenas"] == 0
    # Four pictures of 3 x 16 x 16, real and made, and four latents.
    assert result.held["inputs and images"] == 4 * (4 * 2 * 3 * 16 * 16 + 4 * MODEL.z_dim)
    moving = {phase: result.saved[phase] + result.passing[phase] for phase in (GENERATOR, PLAIN, PENALISED)}
    assert result.predicted == sum(result.held.values()) + max(moving.values())
    assert set(result.saved) == set(moving) and result.saved[PENALISED] > result.saved[PLAIN]


def test_checkpointing_and_smaller_batches_lower_the_prediction(world):
    whole = dry_run("transfergan", settings(world))
    again = dry_run("transfergan", settings(world, checkpoint_activations=True))
    half = dry_run("transfergan", settings(world, batch=2))
    assert again.saved[GENERATOR] < 0.7 * whole.saved[GENERATOR]
    assert half.saved[GENERATOR] < 0.6 * whole.saved[GENERATOR]
    parts = [{k: v for k, v in result.held.items() if k != "inputs and images"} for result in (whole, again, half)]
    assert parts[0] == parts[1] == parts[2]


def test_a_penalty_in_every_step_leaves_no_plain_step(world):
    result = dry_run("adafm", settings(world, freeze_g=2, r1_interval=1))
    assert set(result.saved) == set(result.seconds) == {GENERATOR, PENALISED}
    assert result.held["modulation arenas"] > 0
    assert result.images_per_second == pytest.approx(4 / sum(result.seconds.values()))


def test_images_made_for_the_discriminator_count(world):
    result = dry_run("transfergan", settings(world, order="discriminator-first", critic_steps=3, r1_interval=1))
    assert set(result.seconds) == {GENERATOR, FAKES, PENALISED} and result.saved[FAKES] == 0
    seconds = result.seconds
    iteration = seconds[GENERATOR] + 3 * (seconds[FAKES] + seconds[PENALISED])
    assert result.images_per_second == pytest.approx(3 * 4 / iteration)


def test_memory_that_does_not_suffice_names_the_remedy(world, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("adafm_trainer.trainer.dry_run.measure", full)
    with pytest.raises(UsageError, match=r"4 images does not fit .* lower --batch.*Tried to allocate 2 GiB"):
        dry_run("transfergan", settings(world))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set is read from /proc")
def test_prediction_is_within_a_factor_of_the_measured_peak(world):
    # A process of its own: memory that earlier tests gave back would be taken again without growth.
    source_folder(world / "large", ModelConfig("resnet", 32, nf=32, z_dim=32))
    arguments = flags(world, "--dry-run", "--batch", "64", "--precision", "fp32", "--eval-every", "-1")
    arguments[arguments.index("--source") + 1] = str(world / "large")
    code = f"import sys\nfrom adafm_trainer import cli\nsys.exit(cli.main({arguments!r}))"
    # With this the C library gives freed maps back to the system instead of keeping them for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    predicted, measured = (
        float(re.search(rf"{word} peak +([\d,.]+) MiB", done.stdout)[1].replace(",", ""))
        for word in ("predicted", "measured")
    )
    assert predicted > 100, done.stdout
    assert 0.9 < measured / predicted < FACTOR, done.stdout


def test_meter_counts_distinct_storages_while_they_are_held():
    weight, x = nn.Parameter(torch.ones(10)), torch.ones(1000, 10, requires_grad=True)
    with SavedMeter([weight]) as meter:
        for _ in range(3):
            # The product keeps x (40000 bytes, in two nodes) and the parameter; exp keeps its result, 40000 more.
            y = (x * weight).exp() + (x[:10] * weight).sum()
            assert meter._live == 80_000
            y.sum().backward()
            del y
            assert meter._live == 0
    assert meter.peak == 80_000


def test_live_meter_follows_storages_to_their_end():
    x = torch.ones(1000, 10, requires_grad=True)
    with LiveMeter() as meter:
        y = x.exp()
        view = y[:10]
        assert meter._live == 40_000
        z = y.sin()
        del y
        # exp's result lives on: in its own node, in sin's, and as the storage of the view.
        assert meter._live == 80_000
        total = z.sum()
        total.backward()
        del total, z
        assert meter.bytes_of([x.grad, x, view]) == 80_000
        del view
        assert meter._live == 40_000
    assert 120_000 < meter.peak <= 160_016
