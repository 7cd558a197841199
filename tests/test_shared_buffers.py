"""Buffers that training moves are alike on all processes: at every checkpoint, in the average, and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adafm_trainer.models.architecture import Description
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.catalogue import build_discriminator, build_generator
from adafm_trainer.models.dcgan import DCGANConfig
from adafm_trainer.models.source import load_pair, save_pair
from adafm_trainer.trainer.buffers import SharedBuffers
from adafm_trainer.trainer.checkpoint import load_checkpoint
from adafm_trainer.trainer.parallel import Parallel
from adafm_trainer.trainer.start import resume_run, start_run
from ranks import run_ranks
from tiny import MODEL, digest, image_folder, settings, source_folder
from torch import nn

DCGAN = DCGANConfig(size=16, ngf=4, ndf=4, z_dim=6)
BIGGAN = BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=())
CRITICS = {"critic_steps": 2, "r1_interval": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def move(rank: int) -> dict[str, list[torch.Tensor]]:
    """The buffers of a batch norm after two batches of the rank's own, beside a frozen one, after each ``share``."""
    torch.manual_seed(0)
    network = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    with torch.no_grad():
        for buffer in (network[1].running_mean, network[1].running_var):
            buffer.uniform_()
    start = [b.clone() for b in network[1].buffers()]
    torch.manual_seed(1 + rank)
    batches = [torch.randn(5, 3) for _ in range(2)]
    with Parallel.from_environment("cpu", 20.0) as parallel:
        shared = SharedBuffers(network, parallel)
        for batch in batches:
            network[0](batch)
            shared.share()
    return {"moved": list(network[0].buffers()), "kept": list(network[1].buffers()), "start": start, "seen": batches}


def test_statistics_are_those_of_the_whole_batch_and_what_rests_keeps_its_bits():
    # With three processes a mean of equal numbers is rounded.
    found = [outcome.value for outcome in run_ranks(move, world=3)]
    mean = torch.zeros(3)
    for k in range(2):
        mean = 0.9 * mean + 0.1 * torch.cat([rank["seen"][k] for rank in found]).mean(0)
    for rank in found:
        torch.testing.assert_close(rank["moved"][0], mean)
        assert all(torch.equal(a, b) for a, b in zip(rank["moved"], found[0]["moved"], strict=True))
        assert rank["moved"][2].item() == 2
        assert all(torch.equal(a, b) for a, b in zip(rank["kept"], rank["start"], strict=True))


def train(rank: int, root: Path, name: str, method: str, changes: dict) -> str:
    return str(start_run(method, settings(root, name, dist_timeout=20.0, **changes)))


def resume(rank: int, run: Path, steps: int) -> str:
    return str(resume_run(run, steps=steps))


def states(run: Path) -> tuple[dict, dict]:
    _, model, average, _ = load_checkpoint(run / "checkpoints")
    return model, average


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "changes"),
    [
        (DCGAN, "transfergan", CRITICS),
        (BIGGAN, "minegan", {"miner_buffers": "moving", "order": "discriminator-first", **CRITICS}),
    ],
    ids=["batch-norm", "mining-with-moving-buffers"],
)
def test_a_run_of_two_processes_stores_what_both_hold_and_resumes_exactly(
    tmp_path: Path, model: Description, method: str, changes: dict
):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source", model)
    # A run ends with DivergedError where the two do not hold the same at a checkpoint.
    changes = {"steps": 4, "snap": 2, **changes}
    outcomes = run_ranks(train, tmp_path, "whole", method, changes)
    assert [outcome.kind for outcome in outcomes] == [None, None], outcomes[0].text
    run_ranks(train, tmp_path, "parts", method, {**changes, "steps": 3})
    outcomes = run_ranks(resume, tmp_path / "parts", 4)
    assert [outcome.kind for outcome in outcomes] == [None, None], outcomes[0].text
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_two_processes_estimate_p_as_one_does(tmp_path: Path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    generator, discriminator = build_generator(MODEL), build_discriminator(MODEL)
    pair = load_pair(tmp_path / "source")
    discriminator.load_state_dict(pair.discriminator_state)
    # So little apart that now the one wins, now the other.
    generator.load_state_dict({name: value * 1.001 for name, value in pair.average_state.items()})
    save_pair(tmp_path / "other", MODEL, generator, discriminator)
    sources = (str(tmp_path / "source"), str(tmp_path / "other"))
    changes = {"source": sources, "mining_warmup": 0, "stage2": "none", "steps": 2, "batch": 8}
    start_run("minegan", settings(tmp_path, "alone", **changes))
    outcomes = run_ranks(train, tmp_path, "two", "minegan", changes)
    assert [outcome.kind for outcome in outcomes] == [None, None], outcomes[0].text
    for found, expected in zip(states(tmp_path / "two"), states(tmp_path / "alone"), strict=True):
        name = next(n for n in expected if n.endswith("p") and expected[n].dtype == torch.float64)
        # Not all samples have the same winner.
        assert 0 < (0.5 * (1 - 0.05) ** 2 - expected[name]).abs().min() and expected[name].min() > 0.5 * 0.95**2
        torch.testing.assert_close(found[name], expected[name])
