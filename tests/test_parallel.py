"""Several processes train as one: the same numbers, the same decisions, and an end for all where one ends."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli, keyed
from adafm_trainer.errors import DataError, UsageError
from adafm_trainer.methods import method_by_name
from adafm_trainer.models.source import SourcePair
from adafm_trainer.trainer.assemble import assemble
from adafm_trainer.trainer.parallel import Parallel
from adafm_trainer.trainer.sampling import draw_latents
from adafm_trainer.trainer.start import start_run
from ranks import run_ranks
from tiny import MODEL, image_folder, settings, source_folder

STEPS, BATCH = 6, 4
SOURCE = SourcePair(MODEL, {}, {}, None, {})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def train_in_float64(rank: int, method_name: str, changes: dict, poisoned: tuple[int, ...] = ()) -> dict:
    """``STEPS`` steps on drawn images: everything that training changed, and which steps were taken.

    In the steps of ``poisoned``, sample 3 of the batch (the last of rank 1) is NaN: an even step's image, an odd step's
    latent.
    """
    config = settings(Path("unused"), steps=STEPS, batch=BATCH, **changes)
    method = method_by_name(method_name)
    taken = []
    with Parallel.from_environment(config.device, 20.0) as parallel:
        # Different on each rank until the broadcast.
        torch.manual_seed(rank)
        networks = method.structure(method.target_model([SOURCE] * len(config.source), config), config)
        for network in (networks.generator, networks.discriminator):
            network.double()
            parallel.broadcast([*network.parameters(), *network.buffers()])
        run = assemble(method, networks, config, parallel)
        samples = parallel.samples(BATCH)
        for step in range(STEPS):
            method.before_step(networks, config, step)
            run.set_learning_rates(config, step)
            z = draw_latents(networks.generator, config.seed, "train", step, samples).double()
            x = keyed.normal(config.seed, "images", step, samples, (3, 16, 16)).double()
            if step in poisoned and 3 in samples:
                (z if step % 2 else x)[-1] = math.nan
            g = run.step.generator(z)
            run.average.update()
            d = run.step.discriminator(x, g.images)
            taken.append((bool(g.finite), bool(d.finite)))
        state = {**run.model_state(), **{f"average.{k}": v for k, v in run.average.module.state_dict().items()}}
        gradients = {
            f"{name} of {network}": p.grad
            for network in ("generator", "discriminator")
            for name, p in getattr(networks, network).named_parameters()
            if p.grad is not None
        }
        tensors = {k: v.detach().clone() for k, v in {**state, **gradients}.items()}
        return {"taken": taken, "tensors": tensors}


def assert_same(found: dict, expected: dict) -> None:
    assert found["taken"] == expected["taken"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], tensor, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


COMPETING = {"source": ("a", "b"), "mining_warmup": 2, "stage2_start": 4, "freeze_d": 1, "miner_hidden": 8}
VARIANTS = {
    "all-trained": ("scratch", {}),
    "released-in-mid-run": ("adafm", {"freeze_g": 2, "freeze_d": 1, "adafm_start": 3}),
    "released-in-mid-run-without-plan": ("adafm", {"freeze_g": 2, "adafm_start": 3, "modulation": "autograd"}),
    "penalty-alone-is-lazy": ("transfergan", {"freeze_g": 1, "r1_interval": 4, "reg_type": "real_fake"}),
    "sources-compete-for-samples": ("minegan", {**COMPETING, "select": "sample-max"}),
    "sources-compete-for-batches": ("minegan", {**COMPETING, "select": "batch-max", "batch_gpu": 1}),
    "in-parts": ("adafm", {"freeze_g": 2, "adafm_start": 3, "batch_gpu": 1, "saturation": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_equal_one_with_the_whole_batch(variant):
    method, changes = VARIANTS[variant]
    whole = train_in_float64(0, method, {k: v for k, v in changes.items() if k != "batch_gpu"})
    assert whole["taken"] == [(True, True)] * STEPS
    for outcome in run_ranks(train_in_float64, method, changes):
        assert_same(outcome.value, whole)


def test_a_nan_on_one_rank_skips_the_step_on_all():
    changes, poisoned = {"freeze_g": 2, "adafm_start": 3}, (1, 2)
    whole = train_in_float64(0, "adafm", changes, poisoned)
    # A NaN latent makes NaN images, so D cannot step on them either.
    assert whole["taken"] == [(True, True), (False, False), (True, False), *[(True, True)] * 3]
    for outcome in run_ranks(train_in_float64, "adafm", changes, poisoned):
        assert_same(outcome.value, whole)


def exchange_and_more(rank: int) -> dict:
    with Parallel.from_environment("cpu", 20.0) as parallel:
        wide = torch.full((2, 3, 2, 2), float(rank), dtype=torch.float64).to(memory_format=torch.channels_last)
        narrow = torch.arange(3, dtype=torch.float32) * (rank + 1)
        wide[0, 1, 0, 1] = 10.0
        parallel.exchange([narrow, wide])
        start = [torch.full((2,), rank), torch.full((3,), rank + 0.5)]
        parallel.broadcast(start)
        return {
            "gradients": [narrow, wide],
            "start": start,
            "object": parallel.broadcast_object({"rank": rank, "tensor": torch.full((2,), float(rank))}),
            "mean": parallel.mean({"b": torch.tensor(float(rank)), "a": torch.tensor(4.0 * rank)}),
            "any": [parallel.any(rank == 1), parallel.any(False)],
            "main": parallel.on_main("a sum", lambda: rank + 41),
        }


def test_collectives():
    first, second = (outcome.value for outcome in run_ranks(exchange_and_more))
    wide = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    wide[0, 1, 0, 1] = 10.0
    for found in (first, second):
        torch.testing.assert_close(found["gradients"], [torch.tensor([0.0, 1.5, 3.0]), wide], rtol=0, atol=0)
        torch.testing.assert_close(found["start"], [torch.zeros(2, dtype=torch.int64), torch.full((3,), 0.5)])
        assert found["object"]["rank"] == 0 and found["object"]["tensor"].sum() == 0
        assert found["mean"] == {"a": torch.tensor(2.0), "b": torch.tensor(0.5)}
        assert found["any"] == [True, False]
    assert (first["main"], second["main"]) == (41, None)


def end(rank: int, how: str) -> None:
    with Parallel.from_environment("cpu", 3.0) as parallel:
        gradients = [torch.ones(5)]
        parallel.exchange(gradients)
        if rank == 1:
            if how == "raises":
                raise ZeroDivisionError("only here")
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(6)
        parallel.exchange(gradients)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"rank 0 stops because rank 1 failed: Traceback .*ZeroDivisionError: only here"),
        ("is killed", r"rank 0 stops at the gradients: another process is gone"),
        ("stalls", r"did not answer within --dist-timeout 3 seconds"),
    ],
)
def test_where_one_rank_ends_the_others_end_and_say_why(how, said):
    began = time.monotonic()
    survivor, dead = run_ranks(end, how)
    assert survivor.kind == "PeerError" and survivor.exit_code == 1
    assert re.search(said, survivor.text, re.DOTALL), survivor.text
    assert dead.exit_code == (-signal.SIGKILL if how == "is killed" else 1)
    # Only a rank that still runs takes the timeout to be missed.
    assert survivor.seconds < dead.seconds + 2.5 if how != "stalls" else time.monotonic() - began > 3


def long_work(rank: int, how: str) -> str:
    def work() -> str:
        if how == "fails":
            raise DataError("no such picture")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        return "done"

    with Parallel.from_environment("cpu", 1.0) as parallel:
        result = parallel.on_main("the evaluation", work)
        parallel.any(False)
        return result


def test_waiting_for_rank_0_outlasts_the_timeout():
    assert [outcome.value for outcome in run_ranks(long_work, "takes long")] == ["done", None]


def test_waiting_for_rank_0_ends_with_it():
    main, other = run_ranks(long_work, "is killed")
    assert main.exit_code == -signal.SIGKILL
    assert other.kind == "PeerError" and "rank 0 gave no sign of life" in other.text


def test_an_error_in_the_work_of_rank_0_ends_all_with_its_exit_code():
    main, other = run_ranks(long_work, "fails")
    assert (main.kind, other.kind) == ("DataError", "PeerError")
    assert main.exit_code == other.exit_code == DataError.exit_code
    assert other.text == "rank 1 stops because rank 0 failed: no such picture"


def hold_weights(rank: int, changed: int | None) -> None:
    weights = {"w": torch.arange(6.0), "steps": 3}
    if rank == changed:
        weights["w"][4] = torch.nextafter(weights["w"][4], torch.tensor(9.0))
    with Parallel.from_environment("cpu", 20.0) as parallel:
        parallel.agree([7, weights], "the weights")


def test_a_changed_bit_is_seen_by_all_ranks():
    assert [outcome.kind for outcome in run_ranks(hold_weights, None, world=3)] == [None] * 3
    for outcome in run_ranks(hold_weights, 1, world=3):
        assert outcome.kind == "DivergedError" and outcome.exit_code == 5
        assert "the weights of rank 1 differ from those of rank 0" in outcome.text


def test_samples_are_shared_in_order():
    slices = [Parallel(torch.device("cpu"), rank, 3).samples(12) for rank in range(3)]
    assert [list(s) for s in slices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    alone = Parallel(torch.device("cpu"))
    assert (alone.samples(5), alone.micro_batch(6, 2), alone.micro_batch(6, 6), alone.micro_batch(6, None)) == (
        range(5),
        2,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("processes", "batch", "batch_gpu", "said"),
    [
        (3, 16, None, "--batch 16 cannot be shared equally by 3 processes: use --batch 15 or 18"),
        (4, 2, None, "--batch 2 cannot be shared equally by 4 processes: use --batch 4,"),
        (2, 12, 4, r"--batch-gpu 4 does not divide the 6 images \(--batch 12 over 2 processes\) .* one of 1, 2, 3, 6"),
        (1, 8, 3, "--batch-gpu 3 does not divide the 8 images that a device takes in a step: use one of 1, 2, 4, 8"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(processes, batch, batch_gpu, said):
    with pytest.raises(UsageError, match=said):
        Parallel(torch.device("cpu"), 0, processes).micro_batch(batch, batch_gpu)


def test_refusals_come_before_anything_is_written_or_awaited(world, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT not"):
        start_run("adafm", settings(world, freeze_g=2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="--batch 4 cannot be shared equally by 3"):
        start_run("adafm", settings(world, freeze_g=2))
    assert not (world / "run").exists()
    with pytest.raises(UsageError, match="--batch-gpu is 0"):
        settings(world, batch_gpu=0)
    with pytest.raises(UsageError, match="--dist-timeout is 0"):
        settings(world, dist_timeout=0.0)


@pytest.mark.parametrize(
    ("name", "devices", "found"),
    [
        ("auto", 4, "cuda:2"),
        ("cuda", 4, "cuda:2"),
        ("auto", 0, "cpu"),
        ("cpu", 4, "cpu"),
        ("cuda:1", 4, "--device cuda:1 is one device for all processes"),
        ("cuda", 2, "local rank 2 has no CUDA device of its own, 2 are usable here"),
        ("cuda", 0, "local rank 2 has no CUDA device of its own, 0 are usable here"),
    ],
)
def test_every_process_has_its_own_device(monkeypatch, name, devices, found):
    variables = {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    if found.startswith(("cuda", "cpu")):
        parallel = Parallel.from_environment(name)
        assert (parallel.device, parallel.rank, parallel.world) == (torch.device(found), 6, 8)
    else:
        with pytest.raises(UsageError, match=found):
            Parallel.from_environment(name)


def test_only_training_runs_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cli.main(["demo"]) == 2
    assert "adafm demo: works in one process; torchrun starts `adafm train` or" in capsys.readouterr().err
