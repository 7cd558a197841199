"""Adapters for networks of others: identity, the formula, gradients, what loads, copies, compiles and merges back."""

import copy
import io
import pickle

import pytest
import torch
from foreign import NETWORKS, DCGenerator, EqualConv, OuterNorm, SamePadConv, SNDiscriminator, UNet
from modulation import normal
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import adafm_kernels
from adafm_kernels import (
    adafm_state_dict,
    inject,
    load_adafm_state_dict,
    merge_and_unload,
)
from adafm_kernels.nn import AdaFMConv2d

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

# Every module that has filters: layers without a form of their own and embeddings too.
EVERYTHING = ".*"
IMAGE = (2, 3, 6, 6)


def made(make):
    """A network of seeded weights; called twice, it gives twins, also where torch cannot copy."""
    torch.manual_seed(0)
    return make()


@pytest.fixture(params=NETWORKS, ids=str)
def network(request):
    """A function that makes the network, an input, and the number of its convolutions."""
    count, make, shape = NETWORKS[request.param]
    return (lambda: made(make)), normal(shape, seed=3), count


def moved(model):
    """The model with gamma and beta away from identity, the same for the same names."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(pairs(model).items()):
            around = 1.0 if name.endswith("gamma") else 0.0
            parameter.copy_(around + 0.3 * normal(parameter.shape, parameter.dtype, seed=place))
    return model


def pairs(model):
    """gamma and beta by name, found without the package's help."""
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("gamma", "beta")}


def by_module(model):
    """(gamma, beta) by the name of the adapted module."""
    found = {}
    for name, parameter in pairs(model).items():
        stem, _, kind = name.rpartition(".")
        found.setdefault(stem.partition(".parametrizations")[0].removeprefix("parametrizations"), {})[kind] = parameter
    return {name: (kinds["gamma"], kinds["beta"]) for name, kinds in found.items()}


def baked(model):
    """The network in evaluation with torch's normalisations and masks made plain, by torch's own functions."""
    model.eval()
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, "weight")
            elif type(hook).__name__ == "SpectralNorm":
                nn.utils.remove_spectral_norm(module)
            elif type(hook).__name__ == "WeightNorm":
                nn.utils.remove_weight_norm(module)
    return model


def by_formula(plain, model, x):
    """The output of the plain network with gamma * weight + beta in the adapted modules, in eager torch."""
    named = dict(plain.named_modules())
    weights = {f"{n}.weight": gamma * named[n].weight.detach() + beta for n, (gamma, beta) in by_module(model).items()}
    return torch.func.functional_call(plain, weights, x)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


# Values


def test_output_stays_bit_for_bit(network):
    """Through several steps of training mode, with equal statistics and power iterations, then in evaluation."""
    make, x, _ = network
    base, model = make(), make()
    assert inject(model, EVERYTHING) is model
    for _ in range(3):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model.eval()(x), base.eval()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), base(x))
    adapted = model.state_dict()
    assert all(torch.equal(adapted[n], t) for n, t in base.state_dict().items() if n in adapted)
    assert [n for n in dict(base.named_buffers()) if n not in adapted] == []


def test_formula_and_gradients(network):
    """gamma * normalised(W) + beta, with its derivatives, against eager torch."""
    make, x, _ = network
    base, model = make(), moved(inject(make(), EVERYTHING))
    for each in (base, model):
        each(x)
    # Statistics behind the first modulated layer differ from the base's.
    base.load_state_dict(model.state_dict(), strict=False)
    plain, model = baked(base), model.eval()
    expected, found = by_formula(plain, model, x), model(x)
    torch.testing.assert_close(found, expected)
    wanted = list(pairs(model).values())
    slopes = [torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected)]
    for left, right in zip(*slopes, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, spectral_norm], ids=["hooks", "parametrized"])
def test_gradient_penalty(norm):
    """R1 through a normalised discriminator: the second derivative by gamma and beta, in float64."""
    x = normal((3, 3, 8, 8), torch.float64, seed=3).requires_grad_()

    def make():
        return made(lambda: SNDiscriminator(norm)).double().eval()

    model, plain = moved(inject(make(), EVERYTHING)), baked(make())
    found = []
    for output in (model(x), by_formula(plain, model, x)):
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        wanted = list(pairs(model).values())
        found.append(torch.autograd.grad(slope.square().sum(), wanted, allow_unused=True, materialize_grads=True))
    assert sum(bool(left.any()) for left in found[0]) >= 10
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, spectral_norm], ids=["hooks", "parametrized"])
def test_power_iteration_goes_on_as_without_modulation(norm):
    """Also far from identity, and inject itself does not advance it."""
    base, model = (made(lambda: norm(nn.Conv2d(3, 4, 3))) for _ in range(2))
    before = {name: t.clone() for name, t in model.named_buffers()}
    moved(inject(nn.Sequential(model)))
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    x = normal(IMAGE)
    for _ in range(4):
        base(x), model(x)
    found = dict(model.named_buffers())
    assert len(before) == 2
    for name, buffer in base.named_buffers():
        assert torch.equal(found[name], buffer) and not torch.equal(buffer, before[name])


def test_training_moves_only_gamma_and_beta(network):
    make, x, _ = network
    model = inject(make(), EVERYTHING)
    before = state_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(pairs(model))
    optimizer = torch.optim.Adam(trained, 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    moved_names = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved_names == {n for n, p in model.named_parameters() if p.requires_grad and p.grad.any()}
    assert moved_names <= set(pairs(model)) and len(moved_names) >= 2


# State


def test_the_state_of_the_base_loads(network):
    make, x, _ = network
    model = moved(inject(make(), EVERYTHING))
    model(x)
    base = make()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.5)
    values = {n: p.clone() for n, p in pairs(model).items()}
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert sorted(result.missing_keys) == sorted(pairs(model)) and result.unexpected_keys == []
    assert all(torch.equal(p, values[n]) for n, p in pairs(model).items())
    plain = baked(base)
    torch.testing.assert_close(model.eval()(x), by_formula(plain, model, x))


def test_the_adapted_state_goes_round(network):
    make, x, _ = network
    # Copied before its first forward too, which torch forbids the base with weight normalisation by hooks.
    model = moved(copy.deepcopy(inject(make(), EVERYTHING)))
    model(x)
    fresh = inject(make(), EVERYTHING)
    fresh.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert torch.equal(copied.eval()(x), model(x))
    # A copy is whole: it loads, trains and merges without touching the other.
    before = model(x)
    copied.load_state_dict(make().state_dict(), strict=False)
    merge_and_unload(copied)
    assert torch.equal(model(x), before)


def test_adapter_files(network, tmp_path):
    make, x, _ = network
    model = moved(inject(make(), EVERYTHING))
    adapter = adafm_state_dict(model)
    assert sorted(adapter) == sorted(pairs(model)) and not any(t.requires_grad for t in adapter.values())
    torch.save(adapter, tmp_path / "adapter.pt")
    fresh = inject(make(), EVERYTHING)
    load_adafm_state_dict(fresh, torch.load(tmp_path / "adapter.pt", weights_only=True))
    assert torch.equal(fresh(x), model(x))
    plain = inject(make(), EVERYTHING)
    assert plain.load_state_dict(adapter, strict=False).unexpected_keys == []
    assert same_state(adafm_state_dict(plain), adapter)


def test_adapter_files_with_biases():
    model = inject(UNet(), bias="adafm_only")
    own = adafm_state_dict(model, bias="adafm_only")
    assert set(own) - set(pairs(model)) == {f"{n}.bias" for n in ("down.0", "inner", "up", "out")}
    every = adafm_state_dict(model, bias="all")
    assert set(every) - set(own) == {"equal.bias"}
    every = {name: torch.full_like(t, 0.25) for name, t in every.items()}
    load_adafm_state_dict(model, every)
    assert same_state(adafm_state_dict(model, bias="all"), every)


def test_a_foreign_adapter_is_refused_and_changes_nothing():
    model = inject(DCGenerator(), ["main.0", "main.3"])
    before, right = state_of(model), adafm_state_dict(model)
    short = {name: t for name, t in right.items() if name != "main.3.beta"}
    wrong = [
        (short, ValueError, r"misses main\.3\.beta \(1 in all\)"),
        (right | {"main.6.gamma": torch.ones(1)}, ValueError, r"holds, .* main\.6\.gamma"),
        (right | {"main.3.beta": torch.ones(2, 2)}, ValueError, r"main\.3\.beta .* \[2, 2\]; expected \[8, 4, 1, 1\]"),
        (right | {"main.3.beta": 1.0}, TypeError, "main.3.beta in state_dict is a float"),
        ([right], TypeError, "state_dict is a list"),
    ]
    right["main.0.gamma"] = torch.zeros_like(right["main.0.gamma"])
    for state, kind, message in wrong:
        with pytest.raises(kind, match=message):
            load_adafm_state_dict(model, state)
    assert same_state(model.state_dict(), before)


def test_pickle():
    """Whole modules, where torch pickles them: those it has parametrized it does not."""
    x = normal(IMAGE)
    model = moved(inject(nn.Sequential(nn.Conv2d(3, 4, 3), nn.utils.spectral_norm(nn.Conv2d(4, 2, 3)))))
    model(x).sum().backward()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
        assert [type(m) for m in other] == [type(m) for m in model]
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert type(merge_and_unload(other)[1]) is nn.Conv2d
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(inject(nn.Sequential(nn.Conv1d(2, 3, 1))))


# The machinery around a network


def test_types_and_devices(network):
    make, x, _ = network
    wide = moved(inject(make().double(), EVERYTHING))
    assert {p.dtype for p in pairs(wide).values()} == {torch.float64}
    model = moved(inject(make(), EVERYTHING)).double()
    assert torch.allclose(model.eval()(x.double()), wide.eval()(x.double()), atol=1e-4)
    half = inject(make().bfloat16(), EVERYTHING)
    assert {p.dtype for p in pairs(half).values()} == {torch.float32}
    moved_to = model.to("meta")
    assert {p.device.type for p in pairs(moved_to).values()} == {"meta"}
    assert moved_to(x.double().to("meta")).device.type == "meta"


def test_autocast_follows_the_formula(network):
    make, x, _ = network
    model, plain = moved(inject(make(), EVERYTHING)).eval(), baked(make())
    exact = by_formula(plain, model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, eager = model(x), by_formula(plain, model, x)
    error = (found.float() - exact).abs().max()
    assert error <= 2 * (eager.float() - exact).abs().max() + 1e-6


def test_channels_last():
    x = normal((2, 3, 8, 8), seed=3).contiguous(memory_format=torch.channels_last)
    base = made(UNet).to(memory_format=torch.channels_last)
    model = inject(made(UNet), EVERYTHING).to(memory_format=torch.channels_last)
    assert torch.equal(model(x), base(x))
    assert model.inner.weight.is_contiguous(memory_format=torch.channels_last)
    merged = merge_and_unload(model)
    assert merged.inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(merged(x), base(x))


def test_modes_reach_everything(network):
    model = inject(network[0]().eval(), EVERYTHING)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("name", ["DCGAN", "SNGAN, hooks", "SNGAN, parametrized", "U-Net"])
def test_compiles(name):
    _, make, shape = NETWORKS[name]
    model, x = moved(inject(made(make), EVERYTHING)).eval(), normal(shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=name != "U-Net", backend="aot_eager")
    expected, found = model(x), compiled(x)
    assert torch.equal(found, expected)
    wanted = list(pairs(model).values())
    slopes = [torch.autograd.grad(y.sum(), wanted) for y in (expected, found)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*slopes, strict=True))


# Merging


def test_merge_gives_the_network_back(network):
    """The base's classes, names and shapes, and the adapted network's output bit for bit."""
    make, x, _ = network
    plain, model = baked(make()), moved(inject(make(), EVERYTHING))
    model(x)
    # In training mode, so that a power iteration during the merge would show.
    expected = copy.deepcopy(model).eval()(x)
    assert merge_and_unload(model) is model
    assert torch.equal(model.eval()(x), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    names = {n: (t.shape, t.dtype) for n, t in plain.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in model.state_dict().items()} == names
    assert all(type(p) is nn.Parameter for p in model.parameters())
    # torch leaves some of its own load hooks behind; we leave none of ours.
    for ours, torchs in zip(model.modules(), plain.modules(), strict=True):
        assert len(ours._load_state_dict_pre_hooks) <= len(torchs._load_state_dict_pre_hooks)
    assert not [p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and p.requires_grad]
    model.load_state_dict(plain.state_dict(), strict=True)
    with pytest.raises(ValueError, match="no module of the .* is adapted; call adafm_kernels.inject"):
        merge_and_unload(model)
    assert torch.equal(inject(model, EVERYTHING)(x), plain(x))


def test_merged_weights_are_the_modulated_ones():
    model = moved(inject(made(UNet).half(), EVERYTHING))
    modules = {name: model.get_submodule(name) for name in by_module(model)}
    expected = {name: module.weight for name, module in modules.items() if isinstance(module, (SamePadConv, EqualConv))}
    assert len(expected) == 2
    for name, layer in modules.items():
        if name not in expected:
            weight = layer.parametrizations.weight.original if name in ("out", "down.0") else layer.weight
            gamma, beta = by_module(model)[name]
            expected[name] = adafm_kernels.modulate(weight, gamma, beta)
    merge_and_unload(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight) and weight.dtype == torch.float16


def test_merge_keeps_requires_grad_and_hooks():
    x = normal(IMAGE)
    model = inject(nn.Sequential(nn.Conv2d(3, 4, 3), weight_norm(nn.Conv2d(4, 4, 1))), freeze=False)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    assert all(p.requires_grad for p in model.parameters())
    merge_and_unload(model)(x)
    assert seen == [nn.Conv2d] and all(p.requires_grad for p in model.parameters())
    frozen = inject(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1))))
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    merge_and_unload(frozen)
    assert isinstance(frozen[0].weight, nn.Parameter) and not frozen[0].weight.requires_grad


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, spectral_norm], ids=["hooks", "parametrized"])
def test_a_normalisation_put_on_afterwards_is_merged_too(norm):
    """On an AdaFM layer it comes before the modulation as well: the layer modulates what it finds as its weight."""
    x = normal(IMAGE)
    model = moved(inject(nn.Sequential(made(lambda: nn.Conv2d(3, 4, 3)))))
    norm(model[0])
    model(x)
    expected = model.eval()(x)
    merge_and_unload(model.train())
    assert type(model[0]) is nn.Conv2d and torch.equal(model(x), expected)


def test_merge_of_what_cannot_be_merged():
    class Derived(AdaFMConv2d):
        pass

    outer = inject(OuterNorm(nn.Conv2d(3, 4, 3)))
    for model, message in (
        (nn.Sequential(inject(nn.Sequential(nn.Conv2d(3, 4, 3))), outer), "module .* set before each forward by code"),
        (nn.Sequential(AdaFMConv2d(3, 4, 3), Derived(4, 4, 3)), "1 is a Derived, a class derived from an AdaFM layer"),
    ):
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            merge_and_unload(model)
        assert same_state(model.state_dict(), before)
    with pytest.raises(TypeError, match="model is a list"):
        merge_and_unload([outer])
