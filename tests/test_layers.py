"""Functions and layers: equal to torch's with the modulated weight, identity start, merge, state dicts, refusals."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from modulation import normal, spread
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adafm_kernels import adafm_conv2d, adafm_conv_transpose2d, adafm_linear, use_backend
from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORM = {nn.Conv2d: AdaFMConv2d, nn.ConvTranspose2d: AdaFMConvTranspose2d, nn.Linear: AdaFMLinear}

# Plain layer and shape of its input.
LAYERS = {
    "3x3": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 7, 6)),
    "1x1 no bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "grouped strided dilated": (lambda: nn.Conv2d(4, 6, (3, 2), 2, (2, 1), 2, groups=2), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "7x7 same": (lambda: nn.Conv2d(1, 3, 7, padding="same"), (2, 1, 8, 8)),
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (1, 2, 5, 5)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "circular even kernel": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"), (2, 3, 6, 6)),
    "transposed 4x4": (lambda: nn.ConvTranspose2d(6, 4, 4, 2, 1), (2, 6, 4, 4)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, dilation=2), (2, 6, 4, 5)),
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear three dimensions": (lambda: nn.Linear(5, 2, bias=False), (2, 3, 5)),
    "empty batch": (lambda: nn.Conv2d(3, 5, 3, padding=1), (0, 3, 4, 4)),
    "unbatched": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 4, 4)),
}


@pytest.fixture(params=LAYERS, ids=str)
def plain_layer(request):
    """A torch layer with seeded weights, and an input for it."""
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    return make(), normal(shape, seed=3)


def adapted(layer):
    """The modulated form of a layer, away from identity."""
    layer = FORM[type(layer)].from_module(layer)
    with torch.no_grad():
        layer.gamma.copy_(normal(layer.gamma.shape, seed=1))
        layer.beta.copy_(normal(layer.beta.shape, seed=2))
    return layer


class Weights(TorchDispatchMode):
    """The weights that reach the convolutions, below autograd and autocast."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


def test_identity_start_is_bit_exact(plain_layer):
    plain, x = plain_layer
    expected = plain(x)
    layer = FORM[type(plain)].from_module(plain)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert not layer.weight.requires_grad and layer.gamma.requires_grad and layer.beta.requires_grad


def test_forward_and_gradients_against_the_plain_formula(plain_layer):
    """float64, all gradients, and the derivative of the squared input gradient by gamma and beta."""
    plain, x = plain_layer
    layer = adapted(plain.double()).double()
    layer.weight.requires_grad_(True)
    x = x.double().requires_grad_()
    reference = copy.deepcopy(plain)
    parameters = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.gamma, layer.beta)]

    def formula(inner):
        weight = spread(parameters[1], parameters[0], 1.0) * parameters[0] + spread(parameters[2], parameters[0], 0.0)
        return torch.func.functional_call(reference, {"weight": weight}, inner)

    found, expected = layer(x), formula(x)
    assert torch.allclose(found, expected)
    own = [layer.weight, layer.gamma, layer.beta]
    slopes = [
        torch.autograd.grad(y.square().sum(), (x, *p), create_graph=True)
        for y, p in ((found, own), (expected, parameters))
    ]
    assert all(torch.allclose(a, b) for a, b in zip(*slopes, strict=True))
    if x.numel() == 0:
        # torch's convolution has no second derivative by its weight for an empty batch.
        return
    second = [torch.autograd.grad(s[0].square().sum(), p) for s, p in zip(slopes, (own, parameters), strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*second, strict=True))


def test_merge_gives_a_plain_layer_with_equal_output(plain_layer):
    plain, x = plain_layer
    layer = adapted(plain).eval()
    merged = layer.merge()
    assert type(merged) is type(plain) and not merged.training
    assert torch.equal(merged(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merged(x), layer(x))
    before = merged(x)
    with torch.no_grad():
        layer.gamma.zero_()
        if layer.bias is not None:
            layer.bias.add_(1.0)
    assert torch.equal(merged(x), before)
    assert repr(merged) == repr(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_merge_keeps_type(dtype):
    layer = adapted(nn.Conv2d(3, 4, 3, dtype=dtype))
    assert layer.gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = normal((2, 3, 5, 5), dtype)
    merged = layer.merge()
    assert merged.weight.dtype == dtype and torch.equal(merged(x), layer(x))


def test_from_module_shares_parameters_and_freezes_the_weight():
    plain = nn.Conv2d(3, 4, 3).eval()
    plain.bias.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = AdaFMConv2d.from_module(plain)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert not layer.weight.requires_grad and not layer.bias.requires_grad and not layer.training
    assert AdaFMConv2d.from_module(nn.Conv2d(3, 4, 3), freeze=False).weight.requires_grad


def test_new_layers_start_at_identity_with_a_frozen_weight():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, groups=2)
    torch.manual_seed(0)
    layer = AdaFMConv2d(4, 6, 3, groups=2)
    x = normal((1, 4, 5, 5))
    assert torch.equal(layer(x), plain(x))
    assert layer.gamma.shape == layer.beta.shape == (6, 2, 1, 1)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias", "gamma", "beta"]
    assert AdaFMLinear(5, 7).gamma.shape == (7, 5)
    assert AdaFMConvTranspose2d(6, 4, 4, groups=2).gamma.shape == (6, 2, 1, 1)
    with torch.no_grad():
        layer.gamma.fill_(3.0)
    layer.reset_parameters()
    assert (layer.gamma == 1).all() and (layer.beta == 0).all()


def test_training_moves_gamma_and_beta_only():
    layer = AdaFMConv2d.from_module(nn.Conv2d(3, 4, 3, bias=False))
    before = layer.weight.clone()
    layer(normal((2, 3, 6, 6))).square().mean().backward()
    assert layer.weight.grad is None and layer.gamma.grad.abs().max() > 0 and layer.beta.grad.abs().max() > 0
    assert torch.equal(layer.weight, before)


def test_state_dict_of_the_base_loads():
    """strict=False reports exactly gamma and beta and leaves them; strict refuses, naming them."""
    plain = nn.Conv2d(3, 4, 3)
    layer = adapted(nn.Conv2d(3, 4, 3))
    gamma = layer.gamma.clone()
    with pytest.raises(RuntimeError, match=r'Missing key.*"gamma", "beta"'):
        layer.load_state_dict(plain.state_dict())
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert found.missing_keys == ["gamma", "beta"] and found.unexpected_keys == []
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.gamma, gamma)


def test_state_dict_round_trip_copies_and_pickles(plain_layer):
    plain, x = plain_layer
    layer = adapted(plain)
    fresh = FORM[type(plain)].from_module(copy.deepcopy(plain))
    fresh.load_state_dict(layer.state_dict(), strict=True)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for other in (
        fresh,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
    assert [name for name in layer.state_dict()][: len(plain.state_dict())] == list(plain.state_dict())


REFUSED = {
    "parametrised": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        ValueError,
        "parametrisations of weight.*remove_parametrizations",
    ),
    "spectral norm by hook": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), ValueError, "SpectralNorm"),
    "pruned": (lambda: _pruned(), ValueError, "hooks"),
    "forward hook": (lambda: _hooked(), ValueError, "hooks .*would be lost"),
    "extra buffer": (lambda: _buffered(), ValueError, "holds scale beside weight and bias"),
    "other layer": (lambda: nn.Linear(3, 4), TypeError, "module is a Linear; AdaFMConv2d.from_module takes a Conv2d"),
    "adapted already": (lambda: AdaFMConv2d(3, 4, 3), TypeError, "module is a AdaFMConv2d"),
}


def _pruned():
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)


def _hooked():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def _buffered():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_buffer("scale", torch.ones(1))
    return layer


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_from_module_refuses_what_it_would_lose(make, kind, message):
    with pytest.raises(kind, match=message):
        AdaFMConv2d.from_module(make())


def test_the_convolution_gets_its_own_type_and_layout():
    """Under autocast and for a channels-last input the op writes what the convolution reads; nothing is converted."""
    layer = AdaFMConv2d.from_module(nn.Conv2d(8, 6, 3))
    image = normal((2, 8, 6, 6))
    with Weights() as weights:
        layer(image)
        layer(image.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(image.contiguous(memory_format=torch.channels_last))
    first, second, third = weights.seen
    assert first.dtype == torch.float32 and first.is_contiguous()
    assert second.dtype == torch.float32 and second.is_contiguous(memory_format=torch.channels_last)
    assert third.dtype == torch.bfloat16 and third.is_contiguous(memory_format=torch.channels_last)


def test_a_channels_last_model_stays_channels_last():
    layer = AdaFMConv2d.from_module(nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    with Weights() as weights:
        layer(normal((2, 8, 6, 6)))
    assert weights.seen[0].is_contiguous(memory_format=torch.channels_last)


def test_output_size_of_the_transposed_layer():
    plain = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    x = normal((1, 3, 5, 5))
    layer = AdaFMConvTranspose2d.from_module(plain)
    assert torch.equal(layer(x, output_size=[10, 10]), plain(x, output_size=[10, 10]))


def test_functions(target):
    """Arguments as in torch.nn.functional, then gamma and beta."""
    wide = {"dtype": torch.float64, "device": target.device}
    x = normal((2, 4, 6, 6), seed=3, **wide)
    weight, bias = normal((6, 2, 3, 3), **wide), normal((6,), seed=4, **wide)
    gamma, beta = normal((6, 2), seed=1, **wide), normal((6, 1), seed=2, **wide)
    modulated = gamma[:, :, None, None] * weight + beta[:, :, None, None]
    pairs = [
        (
            adafm_conv2d(x, weight, bias, 2, 1, 1, 2, gamma, beta, backend=target.backend),
            F.conv2d(x, modulated, bias, 2, 1, 1, 2),
        )
    ]
    turned, turned_gamma = weight.transpose(0, 1).reshape(4, 3, 3, 3), normal((4, 3), seed=5, **wide)
    arguments = (bias, 2, 1, 1, 2, 1)
    pairs.append(
        (
            adafm_conv_transpose2d(x, turned, *arguments, turned_gamma, backend=target.backend),
            F.conv_transpose2d(x, turned_gamma[:, :, None, None] * turned, *arguments),
        )
    )
    flat, rows = normal((5, 6), seed=6, **wide), normal((5, 1), seed=7, **wide)
    pairs.append(
        (
            adafm_linear(x, flat, None, rows, rows, backend=target.backend),
            F.linear(x, rows * flat + rows),
        )
    )
    for found, expected in pairs:
        assert torch.allclose(found, expected)


def test_errors_of_functions():
    weight = torch.ones(4, 3, 3, 3)
    with pytest.raises(TypeError, match="input is a list"):
        adafm_conv2d([1.0], weight)
    with pytest.raises(ValueError, match="input is on meta and weight on cpu"):
        adafm_conv2d(torch.ones(1, 3, 5, 5, device="meta"), weight)
    with pytest.raises(ValueError, match="input is on meta and weight on cpu"):
        adafm_linear(torch.ones(2, 3, device="meta"), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"gamma has shape \[3, 4, 1, 1\]"):
        adafm_conv2d(torch.ones(1, 3, 5, 5), weight, gamma=torch.ones(3, 4, 1, 1))


def test_layer_compiles_without_graph_breaks():
    layer = adapted(nn.Conv2d(3, 4, 3, padding=1))
    x = normal((2, 3, 6, 6))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_layer_follows_the_forced_backend():
    layer = adapted(nn.Conv2d(3, 4, 3, padding=1))
    x = normal((2, 3, 6, 6))
    with use_backend("reference"):
        expected = layer(x)
    assert torch.allclose(layer(x), expected, atol=1e-5)
