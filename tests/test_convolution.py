"""The explicit double backward of convolutions against PyTorch's own."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from adafm_trainer.methods.gan_step import GanStep
from adafm_trainer.methods.losses import gradient_penalty, real_loss
from adafm_trainer.methods.player import Player
from adafm_trainer.methods.step_config import StepConfig
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.convolution import ExplicitDoubleBackward, conv2d
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.trainer.double_backward import choose_double_backward, measure_forms
from adafm_trainer.trainer.start import start_run
from tiny import digest, image_folder, settings, source_folder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adafm_kernels.nn import AdaFMConv2d

CFG = ModelConfig("resnet", 16, nf=4, nf_max=8, z_dim=3)

# name: (input, weight, stride, padding, dilation, groups)
GEOMETRIES = {
    "3x3": ((2, 2, 4, 4), (3, 2, 3, 3), 1, 1, 1, 1),
    "1x1": ((2, 3, 3, 2), (2, 3, 1, 1), 1, 0, 1, 1),
    "stride with a rest": ((1, 2, 6, 5), (2, 2, 3, 3), 2, 1, 1, 1),
    "stride without padding, dilated": ((1, 2, 6, 6), (2, 2, 2, 2), 2, 0, 2, 1),
    "groups": ((2, 4, 3, 3), (2, 2, 3, 3), 1, 1, 1, 2),
    "unequal": ((1, 2, 4, 5), (2, 2, 3, 2), (1, 2), (2, 1), 1, 1),
}


class Calls(TorchDispatchMode):
    """Counts convolutions by what they compute; convolution_backward once for each gradient of map or filter."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.counts["input gradient" if args[6] else "convolution"] += 1
            self.kernels.append(tuple(args[1].shape[2:]))
        elif func is torch.ops.aten.convolution_backward.default:
            self.counts["input gradient"] += args[-1][0]
            self.counts["weight gradient"] += args[-1][1]
        return func(*args, **(kwargs or {}))


def arguments(name, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w, *settings = GEOMETRIES[name]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in (x, w, w[:1])]
    return [t.requires_grad_() for t in tensors], settings


@pytest.mark.parametrize("name", GEOMETRIES)
def test_derivatives_are_right(name):
    tensors, settings = arguments(name)

    def function(x, w, b):
        return conv2d(x, w, b, *settings)

    assert torch.equal(function(*tensors), F.conv2d(*tensors, *settings))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def r1_gradients(function, x, w, b):
    """Gradients of loss and penalty for the three, by the way that training takes them."""
    y = F.leaky_relu(function(x, w, b), 0.2)
    (inner,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    total = inner.float().square().mean() + y.float().sin().mean()
    return [*torch.autograd.grad(total, (x, w, b)), inner.detach()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_equal_the_native_ones(name, last, dtype):
    tensors, settings = arguments(name, dtype)
    if last:
        tensors = [t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t.detach() for t in tensors]
        tensors = [t.requires_grad_() for t in tensors]
    explicit = r1_gradients(lambda x, w, b: conv2d(x, w, b, *settings), *tensors)
    native = r1_gradients(lambda x, w, b: F.conv2d(x, w, b, *settings), *tensors)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(explicit, native, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_casts_under_autocast_are_pytorchs():
    tensors, settings = arguments("3x3", torch.float32)
    results = []
    for function in (conv2d, F.conv2d):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*tensors, *settings)
            assert y.dtype == torch.bfloat16
        results.append([y, *r1_under_autocast(function, tensors, settings)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    assert all(gradient.dtype == torch.float32 for gradient in results[0][1:])
    with torch.autocast("cpu", torch.bfloat16):
        wide = [t.double() for t in tensors]
        assert conv2d(*wide, *settings).dtype == F.conv2d(*wide, *settings).dtype == torch.float64


def r1_under_autocast(function, tensors, settings):
    def cast(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, w, b, *settings)

    return r1_gradients(cast, *tensors)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_no_gradient_is_computed_that_nobody_asks_for(needed):
    tensors, settings = arguments("3x3")
    y = conv2d(*tensors, *settings)
    with Calls() as calls:
        torch.autograd.grad(y.sum(), [tensors[i] for i in needed])
    assert calls.counts["input gradient"] == (0 in needed) and calls.counts["weight gradient"] == (1 in needed)
    frozen = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    with Calls() as calls:
        conv2d(*frozen, *settings).sum().backward()
    assert [t.grad is not None for t in frozen] == [i in needed for i in range(3)]
    assert calls.counts["input gradient"] == (0 in needed) and calls.counts["weight gradient"] == (1 in needed)


def discriminator(dtype=torch.float64):
    torch.manual_seed(0)
    return build_discriminator(CFG).to(dtype)


def penalised(network, x, explicit=False):
    with ExplicitDoubleBackward() if explicit else nullcontext():
        logits = network(x)
    total = real_loss(logits) + 7 * gradient_penalty(logits, x).mean()
    total.backward(inputs=[p for p in network.parameters() if p.requires_grad])
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_merged_pass_has_the_same_gradients_and_no_more_convolutions(dtype, tolerance):
    native = discriminator(dtype)
    explicit = copy.deepcopy(native)
    x = torch.randn(3, 3, 16, 16, dtype=dtype, requires_grad=True)
    with Calls() as before:
        theirs = penalised(native, x)
    with Calls() as after:
        mine = penalised(explicit, x, explicit=True)
    for name, gradient in theirs.items():
        if gradient is None:
            assert mine[name] is None
            continue
        torch.testing.assert_close(mine[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())
    assert after.counts.total() <= before.counts.total()
    # PyTorch's own convolves with whole maps as kernels; the explicit form with filters only.
    assert max(before.kernels) == (16, 16) and max(after.kernels) == (3, 3)


def test_modulated_layers_compute_by_it_too():
    torch.manual_seed(0)
    layer = AdaFMConv2d(2, 3, 3, padding=1).double()
    with torch.no_grad():
        layer.gamma.normal_()
        layer.beta.normal_()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (ExplicitDoubleBackward(), nullcontext()):
        with Calls() as calls:
            with context:
                y = layer(x)
            (inner,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(inner.square().sum(), [layer.gamma, layer.beta, layer.bias]))
        assert (max(calls.kernels) == (3, 3)) == isinstance(context, ExplicitDoubleBackward)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="'same'"):
        conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), padding="same")
    with pytest.raises(ValueError, match=r"input has shape \(1, 3, 3\)"):
        conv2d(torch.zeros(1, 3, 3), torch.zeros(1, 1, 3, 3))


def test_padding_by_a_word_stays_with_pytorch():
    layer, x = nn.Conv2d(1, 1, 3, padding="same"), torch.zeros(1, 1, 4, 4)
    with ExplicitDoubleBackward():
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding="same"))


def test_choice_by_name_by_device_and_by_measurement(monkeypatch):
    network, images, config = discriminator(torch.float32), torch.zeros(2, 3, 16, 16), StepConfig(reg_interval=4)
    for form in ("explicit", "native"):
        chosen, line = choose_double_backward(form, network, images, config)
        assert chosen == form and f"{form}, as asked" in line
    chosen, line = choose_double_backward("auto", network, images, config)
    assert chosen == "explicit" and "the rule on cpu" in line

    class OnCuda:
        device = torch.device("cuda")

    for native, winner in ((3e-3, "explicit"), (1e-3, "native")):
        times = {"native": native, "explicit": 2e-3}
        monkeypatch.setattr("adafm_trainer.trainer.double_backward.measure_forms", lambda *_, t=times: t)
        chosen, line = choose_double_backward("auto", network, OnCuda(), config)
        assert chosen == winner and f"convolutions: {winner} (" in line and "explicit 2.00 ms" in line


def test_measurement_leaves_no_trace():
    network, state = discriminator(torch.float32), torch.get_rng_state()
    weights = copy.deepcopy(network.state_dict())
    times = measure_forms(network, torch.zeros(2, 3, 16, 16), StepConfig(reg_interval=4))
    assert set(times) == {"native", "explicit"} and all(seconds > 0 for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_training_step_with_it_equals_the_native_one():
    torch.manual_seed(0)
    start = build_generator(CFG).double(), build_discriminator(CFG).double()
    z, x = torch.randn(3, 3).double(), torch.randn(3, 3, 16, 16).double()
    ends = []
    for explicit in (False, True):
        pair = copy.deepcopy(start)
        players = [Player(n, torch.optim.Adam(n.parameters(), lr=1e-2, betas=(0.0, 0.99), fused=True)) for n in pair]
        step = GanStep(*players, StepConfig(explicit=explicit))
        for _ in range(2):
            step.discriminator(x, step.generator(z).images)
        ends.append([p for network in pair for p in network.parameters()])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_a_run_takes_the_setting_and_logs_it(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    runs = {}
    for form in ("auto", "native", "explicit"):
        runs[form] = start_run("transfergan", settings(tmp_path, form, steps=2, conv_double_backward=form))
    assert digest(runs["auto"]) == digest(runs["explicit"]) != digest(runs["native"])
    assert "convolutions: native, as asked" in (runs["native"] / "log.txt").read_text()
    assert "convolutions: explicit, the rule on cpu" in (runs["auto"] / "log.txt").read_text()
    assert 'conv_double_backward: "explicit"' in (runs["auto"] / "config.yaml").read_text()
