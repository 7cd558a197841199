"""CUDA graphs of the training step: when they are taken, what is captured when, and that nothing of the run changes.

Without a GPU a graph is played by ``Recorded``, which keeps the rules of a real one: recording runs nothing, a replay
reads the tensors that were recorded with and writes those that were returned, and no version counter moves.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from adafm_trainer.errors import UsageError
from adafm_trainer.methods.adafm import AdaFM, hold, release
from adafm_trainer.methods.gan_step import GanStep
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.source import SourcePair
from adafm_trainer.trainer.assemble import assemble
from adafm_trainer.trainer.graphs import (
    EAGER_STEPS,
    GENERATOR,
    PENALISED,
    PLAIN,
    CudaRuntime,
    GraphedStep,
    make_capturable,
    resolve_graphs,
)
from adafm_trainer.trainer.start import start_run
from tiny import MODEL, image_folder, settings, source_folder
from torch import Tensor

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Recorded:
    """A captured step: ``replay`` computes it again into the tensors that the recording returned."""

    def __init__(self, runtime, step, result, d_steps):
        self.runtime, self.step, self.result, self.d_steps = runtime, step, result, d_steps

    def replay(self):
        self.runtime.events.append("replay")
        # The kernels of the recorded phase run whatever Python would choose now, and Python counts nothing.
        gan, now = self.runtime.gan, self.runtime.gan.d_steps
        gan.d_steps = self.d_steps
        plans = [player.plan for player in (gan.G, gan.D) if player.plan is not None]
        known = [(plan._stale, plan._arenas.versions) for plan in plans]
        for plan in plans:
            # That modulation runs was recorded, whatever the plan holds for fresh by now.
            plan._stale = True
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.runtime.parameters())):
            made = self.step()
        gan.d_steps = now
        for plan, (stale, versions) in zip(plans, known, strict=True):
            plan._stale, plan._arenas.versions = stale, versions
        for field in dataclasses.fields(self.result):
            mine = getattr(self.result, field.name)
            if isinstance(mine, Tensor):
                mine.copy_(getattr(made, field.name))


class Recorder:
    """The runtime without a GPU. ``capture`` leaves every tensor of the step as it found it, as recording does."""

    def __init__(self, step: GanStep):
        self.gan, self.events = step, []

    def parameters(self):
        return [p for player in (self.gan.G, self.gan.D) for p in player.network.parameters()]

    @contextmanager
    def eager(self):
        self.events.append("eager")
        yield

    def capture(self, step):
        self.events.append("capture")
        players = (self.gan.G, self.gan.D)
        state = [t for player in players for entry in player.optimizer.state.values() for t in entry.values()]
        tensors = [p.data for p in self.parameters()] + state
        before = [t.clone() for t in tensors]
        d_steps, result = self.gan.d_steps, step()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        return Recorded(self, step, result, d_steps), result


def assembly(tmp_path, **changes):
    torch.manual_seed(0)
    values = {"freeze_g": 2, "r1_interval": 3, **changes}
    config, method = settings(tmp_path, data_scale=1.0, **values), AdaFM()
    networks = method.structure(MODEL, config)
    pair = (build_generator(MODEL), build_discriminator(MODEL))
    source = SourcePair(MODEL, pair[0].state_dict(), pair[1].state_dict(), None, {})
    method.initialise(networks, [source], config, lambda _: None)
    return assemble(method, networks, config), config


def train(built, config, steps, device=CPU, before=lambda number: None):
    """Losses of some steps of training on random inputs, and the parameters at the end."""
    losses = []
    for number in range(steps):
        before(number)
        built.set_learning_rates(config, number)
        generator = torch.Generator().manual_seed(number)
        z = torch.randn(4, MODEL.z_dim, generator=generator).to(device)
        real = torch.randn(4, 3, 16, 16, generator=generator).to(device, memory_format=built.layout)
        g = built.step.generator(z)
        built.average.update()
        d = built.step.discriminator(real, g.images)
        losses += [g.loss.clone(), d.loss_real.clone(), d.loss_fake.clone(), (g.finite & d.finite).clone()]
        losses += [] if d.r1_real is None else [d.r1_real.clone()]
    return losses, [*built.model_state().values(), *built.average.module.state_dict().values()]


def graphed(built):
    runtime = Recorder(built.step)
    built.step = GraphedStep(built.step, runtime)
    return runtime


@pytest.mark.parametrize("modulation", ["plan", "autograd"])
def test_replayed_training_is_eager_training_bit_for_bit(tmp_path, modulation):
    plain, config = assembly(tmp_path, modulation=modulation)
    replayed, _ = assembly(tmp_path, modulation=modulation)
    runtime = graphed(replayed)
    (losses, ends), (losses_again, ends_again) = train(plain, config, 14), train(replayed, config, 14)
    assert runtime.events.count("capture") == 3 and runtime.events.count("replay") > 14
    assert len(losses) == len(losses_again) and all(map(torch.equal, losses, losses_again))
    assert all(map(torch.equal, ends, ends_again))
    assert replayed.step.d_steps == plain.step.d_steps == 14
    assert replayed.step.state_dict() == plain.step.state_dict()


def test_images_for_the_discriminator_are_those_of_the_replayed_generator(tmp_path):
    plain, config = assembly(tmp_path)
    replayed, _ = assembly(tmp_path)
    runtime = graphed(replayed)
    z = torch.randn(4, MODEL.z_dim, generator=torch.Generator().manual_seed(1))
    for number in range(EAGER_STEPS + 4):
        for built in (plain, replayed):
            built.set_learning_rates(config, number)
        assert torch.equal(replayed.step.fakes(z), plain.step.fakes(z)), number
        for built in (plain, replayed):
            built.step.generator(z)
    assert runtime.events.count("replay") > 2


def test_every_phase_is_eager_then_captured_then_replayed(tmp_path):
    built, config = assembly(tmp_path)
    runtime = graphed(built)
    seen = {GENERATOR: [], PLAIN: [], PENALISED: []}

    def note(number):
        runtime.events.clear()

    for number in range(13):
        train(built, config, 1, before=note)
        kinds = runtime.events
        own = kinds[: len(kinds) - (2 if kinds[-2:] == ["capture", "replay"] else 1)]
        seen[GENERATOR].append(tuple(own))
        seen[PLAIN if number % 3 else PENALISED].append(tuple(kinds[len(own) :]))
    for phase, events in seen.items():
        assert events[:EAGER_STEPS] == [("eager",)] * EAGER_STEPS, phase
        assert events[EAGER_STEPS] == ("capture", "replay"), phase
        assert set(events[EAGER_STEPS + 1 :]) <= {("replay",)}, phase
    assert len(seen[PENALISED]) == 5 and len(seen[GENERATOR]) == 13


def test_results_are_overwritten_and_inputs_are_not_kept(tmp_path):
    built, config = assembly(tmp_path)
    graphed(built)
    train(built, config, EAGER_STEPS + 1)
    z = torch.randn(4, MODEL.z_dim)
    kept, first = z.clone(), built.step.generator(z)
    value = first.loss.clone()
    second = built.step.generator(torch.randn(4, MODEL.z_dim))
    assert second is first and not torch.equal(first.loss, value)
    assert torch.equal(z, kept)


@pytest.mark.parametrize("change", ["parameters", "shapes", "checkpoint"])
def test_a_change_starts_anew(tmp_path, change):
    built, config = assembly(tmp_path)
    runtime = graphed(built)
    hold(built.networks.generator)
    train(built, config, EAGER_STEPS + 2)
    assert runtime.events[-2:] == ["replay", "eager"] or "capture" in runtime.events
    runtime.events.clear()
    size = 4
    if change == "parameters":
        release(built.networks.generator)
    elif change == "shapes":
        size = 2
    else:
        state = copy.deepcopy((built.model_state(), built.average.module.state_dict(), built.trainer_state()))
        built.load(*state)
    for _ in range(EAGER_STEPS + 1):
        built.step.generator(torch.randn(size, MODEL.z_dim))
    assert runtime.events == ["eager"] * EAGER_STEPS + ["capture", "replay"]


def test_failed_capture_says_what_to_do(tmp_path):
    built, _ = assembly(tmp_path)
    runtime = graphed(built)

    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    runtime.capture = fail
    with pytest.raises(
        UsageError, match=r"generator's step cannot .* not permitted .* capturing; run with --graphs off"
    ):
        for _ in range(EAGER_STEPS + 1):
            built.step.generator(torch.randn(4, MODEL.z_dim))


@pytest.mark.parametrize(
    ("device", "kind", "why"),
    [
        (CPU, {}, "cpu has no CUDA graphs.*--device cuda"),
        (CUDA, {"scaled": True}, "gradient scalers of fp16.*--precision bf16"),
        (CUDA, {"grouped": True}, "exchange of gradients.*one process"),
        (CUDA, {"choosing": True}, "how many samples each source makes.*one --source"),
        (CUDA, {"moving_epsilon": True}, "Adam's epsilon.*--adam-epsilon torch"),
    ],
)
def test_what_cannot_be_captured_is_refused(device, kind, why):
    with pytest.raises(UsageError, match=f"--graphs on: .*{why}"):
        resolve_graphs("on", device, **kind)
    on, line = resolve_graphs("auto", device, **kind)
    assert not on and "off, " in line and "as asked" not in line


def test_choice():
    assert resolve_graphs("auto", CUDA)[0] and resolve_graphs("on", CUDA)[0]
    assert resolve_graphs("off", CUDA) == (False, "CUDA graphs: off, as asked")


def test_optimizers_change_form_and_back(tmp_path):
    built, config = assembly(tmp_path)
    optimizer = built.step.G.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    make_capturable(optimizer, CPU, True)
    read = [group["lr"] for group in optimizer.param_groups]
    assert all(
        isinstance(lr, Tensor) and group["capturable"] for lr, group in zip(read, optimizer.param_groups, strict=True)
    )
    built.set_learning_rates(config, 0)
    # A graph reads the same memory in every replay.
    assert all(group["lr"] is lr for lr, group in zip(read, optimizer.param_groups, strict=True))
    assert [lr.item() for lr in read] == pytest.approx([g["base_lr"] / config.warmup for g in optimizer.param_groups])
    make_capturable(optimizer, CPU, False)
    assert all(isinstance(g["lr"], float) and not g["capturable"] for g in optimizer.param_groups)
    built.set_learning_rates(config, config.warmup)
    assert [g["lr"] for g in optimizer.param_groups] == rates


def test_runs_take_the_setting(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    with pytest.raises(UsageError, match="--graphs on: cpu has no CUDA graphs"):
        start_run("adafm", settings(tmp_path, "on", freeze_g=2, graphs="on"))
    run = start_run("adafm", settings(tmp_path, "auto", freeze_g=2, steps=1, graphs="auto"))
    assert "CUDA graphs: off, cpu has no CUDA graphs" in (run / "log.txt").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_on_cuda_train_as_eager_steps_do(tmp_path, precision):
    common = {"device": "cuda", "precision": precision, "conv_double_backward": "native"}
    plain, config = assembly(tmp_path, graphs="off", **common)
    replayed, _ = assembly(tmp_path, graphs="on", **common)
    assert isinstance(replayed.step, GraphedStep) and isinstance(replayed.step._runtime, CudaRuntime)
    (losses, ends), (losses_again, ends_again) = train(plain, config, 14, CUDA), train(replayed, config, 14, CUDA)
    assert replayed.step.d_steps == 14 and all(p.captured for p in replayed.step._phases.values())
    for one, other in zip([*losses, *ends], [*losses_again, *ends_again], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
