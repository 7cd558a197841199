"""What inject adapts and how it says that it cannot; what is trained; an inject that raises changes nothing."""

import copy

import pytest
import torch
from foreign import NETWORKS, DCGenerator, EqualConv, OuterNorm, SamePadConv, SNDiscriminator, UNet
from modulation import normal
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import adafm_kernels
from adafm_kernels import inject, mark_only_adafm_trainable, merge_and_unload, print_trainable
from adafm_kernels.adapt import Modulation, injection, trainable
from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
)

IMAGE = (2, 3, 6, 6)


def adapted(model):
    return list(trainable.adapted_modules(model))


class Head(nn.Module):
    """Convolutions and linear layers under two blocks, a norm, a shared module."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.block = nn.ModuleDict(
            {"conv1": nn.Conv2d(4, 4, 1), "conv2": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}
        )
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 3, 1))
        self.fc = nn.Linear(4, 2)
        self.again = self.block["conv2"]

    def forward(self, x):
        x = self.block["norm"](self.block["conv2"](self.block["conv1"](self.conv1(x))))
        return self.to_rgb(self.again(x)).mean((2, 3)).sum() + self.fc(x.mean((2, 3))).sum()


# target_modules, exclude, and the names that are adapted.
CHOICES = {
    "every convolution": (None, None, ["conv1", "block.conv1", "block.conv2", "to_rgb.0", "to_rgb.1"]),
    "all": ("all", ["to_rgb", "block"], ["conv1", "fc"]),
    "full name or suffix": (["conv1"], None, ["conv1", "block.conv1"]),
    "full name": (["block.conv1"], None, ["block.conv1"]),
    "a tuple": (("fc", "to_rgb.1"), None, ["to_rgb.1", "fc"]),
    "a set": ({"fc"}, None, ["fc"]),
    "regular expression": (r"block\..*", None, ["block.conv1", "block.conv2"]),
    "whole names only": (r"conv\d", None, ["conv1"]),
    "regular expression, exclude one": (r".*", r".*conv\d|fc", ["to_rgb.0", "to_rgb.1"]),
    "exclude a suffix": (None, ["conv1"], ["block.conv2", "to_rgb.0", "to_rgb.1"]),
    "exclude a container": (None, ["to_rgb", "conv2"], ["conv1", "block.conv1"]),
    "one name of a shared module is excluded": (None, ["again"], ["conv1", "block.conv1", "to_rgb.0", "to_rgb.1"]),
    "by its second name": (["again"], None, ["block.conv2"]),
}


@pytest.mark.parametrize(("targets", "exclude", "names"), CHOICES.values(), ids=CHOICES)
def test_targets(targets, exclude, names):
    model = inject(Head(), targets, exclude)
    assert adapted(model) == names


@pytest.mark.parametrize("name", NETWORKS)
def test_none_is_every_convolution(name):
    count, make, _ = NETWORKS[name]
    with_everything = inject(make(), "all")
    assert len(adapted(inject(make()))) == count
    assert len(adapted(with_everything)) == count + sum(isinstance(m, nn.Linear) for m in with_everything.modules())


def test_forms():
    """Exact torch layers become AdaFM layers; everything else is parametrized."""
    unet = inject(UNet(), ".*")
    assert type(unet.up) is AdaFMConvTranspose2d
    for module, plain in ((unet.inner, SamePadConv), (unet.equal, EqualConv), (unet.out, nn.Conv2d)):
        assert isinstance(module, plain) and isinstance(module.parametrizations.weight[0], Modulation)
    # A buffer of its own, and a forward of its own, would be lost in another layer.
    assert parametrize.type_before_parametrizations(unet.down[0]) is nn.Conv2d
    patched = nn.Conv2d(3, 3, 1)
    patched.forward = lambda x: nn.Conv2d.forward(patched, x) + 1
    x = normal(IMAGE)
    expected = patched(x)
    model = inject(nn.Sequential(patched, nn.Linear(6, 2)), "all")
    assert isinstance(patched, nn.Conv2d) and not isinstance(patched, AdaFMConv2d) and torch.equal(patched(x), expected)
    assert type(model[1]) is AdaFMLinear
    bilinear = inject(nn.Bilinear(3, 4, 5), ".*")
    assert bilinear.parametrizations.weight[0].gamma.shape == (5, 3, 1)


def test_modules_keep_their_identity():
    """A shared module is adapted once, and references outside the registered modules go on working."""
    head = Head()
    head.unregistered = [head.conv1]
    before = {name: module for name, module in head.named_modules()}
    inject(head)
    assert {name: module for name, module in head.named_modules()} == before
    assert head.again is head.block["conv2"] and type(head.again) is AdaFMConv2d
    assert type(head.unregistered[0]) is AdaFMConv2d
    head(normal(IMAGE)).backward()
    assert head.again.gamma.grad is not None
    merge_and_unload(head)
    assert head.again is before["block.conv2"] and type(head.again) is nn.Conv2d


def test_a_single_layer_is_a_model():
    x = normal(IMAGE)
    layer = nn.Conv2d(3, 4, 3)
    expected = layer(x)
    assert inject(layer) is layer and torch.equal(layer(x), expected) and adapted(layer) == [""]
    assert merge_and_unload(layer) is layer and type(layer) is nn.Conv2d and torch.equal(layer(x), expected)
    subclass = SamePadConv(3, 4, 3)
    state = copy.deepcopy(subclass.state_dict())
    result = inject(subclass).load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == [f"parametrizations.weight.0.{n}" for n in ("beta", "gamma")]
    assert result.unexpected_keys == []


def test_tied_weights_get_a_modulation_each():
    """One Parameter in three modules: each has its own gamma and beta over it; merging unties them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4))
    model[1].weight = model[2].weight = model[0].weight
    base = model[0].weight
    inject(model, ["0", "2"])
    assert model[0].weight is model[1].weight is model[2].parametrizations.weight.original is base
    with torch.no_grad():
        model[0].gamma.fill_(2.0)
        model[2].parametrizations.weight[0].beta.fill_(1.0)
    expected = base.detach().clone()
    merge_and_unload(model)
    assert torch.equal(model[0].weight, 2 * expected) and torch.equal(model[2].weight, expected + 1)
    assert model[1].weight is base and torch.equal(base, expected)


def test_a_weight_of_another_shape_than_the_settings_say():
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(torch.ones(2, 3, 3, 3))
    layer.bias = None
    assert inject(nn.Sequential(layer))[0].gamma.shape == (2, 3, 1, 1)


def test_a_weight_that_an_outer_module_sets():
    x = normal(IMAGE)
    torch.manual_seed(0)
    base = OuterNorm(nn.Conv2d(3, 4, 3))
    torch.manual_seed(0)
    # .double() leaves the attribute weight in float32; the parameter it is made from tells.
    model = inject(OuterNorm(nn.Conv2d(3, 4, 3)).double())
    assert model.module.gamma.dtype == torch.float64
    model.float()
    model.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        model.module.gamma.fill_(2.0)
        model.module.beta.fill_(0.5)
    weight = base.module.weight_bar / base.module.weight_bar.flatten(1).norm()
    expected = torch.nn.functional.conv2d(x, 2.0 * weight + 0.5, base.module.bias)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model.module.gamma.grad.any() and model.module.weight_bar.grad is None
    with pytest.raises(AttributeError, match="this weight is modulated; call adafm_kernels.merge_and_unload first"):
        del model.module.weight


def test_removing_a_normalisation_under_the_modulation_is_refused():
    model = inject(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))))
    with pytest.raises(AttributeError, match="merge_and_unload first"):
        nn.utils.remove_spectral_norm(model[0])
    assert torch.isfinite(model(normal(IMAGE))).all()


def test_two_calls_adapt_two_parts():
    model = inject(inject(Head(), ["conv1"]), ["fc"])
    assert adapted(model) == ["conv1", "block.conv1", "fc"]
    assert sum(p.requires_grad for p in model.parameters()) == 6


def test_copies_are_independent():
    """torch gives copies of a parametrized module one class; adapting or merging one leaves the other as it is."""
    x = normal(IMAGE)
    first = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3))).eval()
    second = copy.deepcopy(first)
    expected = first(x)
    merge_and_unload(inject(second))
    assert torch.equal(first(x), expected) and torch.equal(second(x), expected)

    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    first = nn.Sequential(nn.Conv2d(3, 4, 3))
    parametrize.register_parametrization(first[0], "bias", Doubled())
    second = copy.deepcopy(first)
    expected = first(x)
    inject(second)
    assert torch.equal(first(x), expected) and torch.equal(second(x), expected)
    merge_and_unload(second)
    assert torch.equal(second(x), expected) and parametrize.is_parametrized(second[0], "bias")
    assert isinstance(second[0].weight, nn.Parameter)


# What is trained


def test_freeze():
    model = inject(Head())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"gamma", "beta"}
    model = Head()
    model.conv1.bias.requires_grad_(False)
    inject(model, freeze=False)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"conv1.bias"}


BIASES = {
    "none": [],
    "adafm_only": ["conv.bias", "odd.parametrizations.bias.original"],
    "all": [
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "conv.bias",
        "norm.bias",
        "odd.parametrizations.bias.original",
        "rnn.bias_hh_l0",
        "rnn.bias_ih_l0",
    ],
}


@pytest.mark.parametrize("way", ["inject", "mark"])
@pytest.mark.parametrize("bias", BIASES)
def test_biases(bias, way):
    class Half(nn.Module):
        def forward(self, bias):
            return bias / 2

    parts = {"conv": nn.Conv2d(3, 4, 3), "attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm2d(4)}
    parts |= {"odd": nn.Conv2d(3, 4, 3), "rnn": nn.GRU(3, 4)}
    parametrize.register_parametrization(parts["odd"], "bias", Half())
    model = nn.ModuleDict(parts)
    inject(model, bias=bias if way == "inject" else "none", freeze=way == "inject")
    if way == "mark":
        mark_only_adafm_trainable(model, bias)
    found = [
        n for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[2] not in ("gamma", "beta")
    ]
    assert sorted(found) == sorted(BIASES[bias])
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith(("gamma", "beta"))) == 4


def test_print_trainable(capsys):
    model = nn.Sequential(nn.Conv2d(30, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 3, 1))
    assert print_trainable(model) == (11043, 11043, 0)
    inject(model)
    # Two times 30 * 40 + 40 * 3 pairs above the base's 11,043 parameters.
    assert print_trainable(model) == trainable.TrainableCounts(trainable=2640, total=13683, modules=2)
    print_trainable(nn.ReLU())
    assert capsys.readouterr().out.splitlines() == [
        "trainable params: 11,043 || all params: 11,043 || trainable%: 100.0000 || adapted modules: 0",
        "trainable params: 2,640 || all params: 13,683 || trainable%: 19.2940 || adapted modules: 2",
        "trainable params: 0 || all params: 0 || trainable%: 0.0000 || adapted modules: 0",
    ]


# Bad input

BAD = {
    "no match, near names": (["conv3"], None, ValueError, r"'conv3' matches no module; did you mean .*conv1"),
    "no match, what is there": (["zzz"], None, ValueError, r"there are conv1 \(Conv2d\), .*fc \(Linear\)"),
    "one entry without a match": (["conv1", "upsample"], None, ValueError, "'upsample' matches no module"),
    "part of a name": ("conv", None, ValueError, "'conv' matches no module; did you mean .*regular expression"),
    "no expression": ("conv(", None, ValueError, r"target_modules is 'conv\(', which is no regular expression"),
    "nothing with filters": (r"block\.norm|to_rgb", None, ValueError, r"only modules without a weight of rank 2 to 5"),
    "a container by name": (["to_rgb"], None, TypeError, r"to_rgb is a Sequential without a weight.*inside it: 0, 1"),
    "a norm by name": (["norm"], None, ValueError, r"weight of block.norm \(BatchNorm2d\) has shape \[4\]"),
    "empty list": ([], None, ValueError, "target_modules is empty"),
    "a number": (3, None, TypeError, "target_modules is a int"),
    "a list of numbers": (["conv1", 3], None, TypeError, "target_modules holds 3, a int"),
    "exclude without a match": (
        None,
        ["to_rbg"],
        ValueError,
        "exclude 'to_rbg' matches no module; did you mean to_rgb",
    ),
    "exclude, an expression": (None, "x.*", ValueError, r"exclude 'x\.\*' matches no module"),
    "exclude everything": (["fc"], ["fc"], ValueError, r"exclude \['fc'\] leaves none of the matched modules: fc"),
    "exclude of a wrong type": (None, 1.5, TypeError, "exclude is a float"),
}


@pytest.mark.parametrize(("targets", "exclude", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_targets(targets, exclude, kind, message):
    model = Head()
    before = _picture(model)
    with pytest.raises(kind, match=message):
        inject(model, targets, exclude)
    assert _picture(model) == before


class Vectors(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def _named_gamma():
    layer = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    layer.gamma = 0.5
    return layer


UNFIT = {
    "integers": (lambda: Vectors(nn.Parameter(torch.ones(2, 2, dtype=torch.int8), False)), TypeError, "is torch.int8"),
    "complex": (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), TypeError, r"\(Conv2d\) is torch.complex64"),
    "rank 1": (lambda: Vectors(nn.Parameter(torch.ones(3))), ValueError, r"has shape \[3\]; expected \[O, I\]"),
    "rank 6": (lambda: Vectors(nn.Parameter(torch.ones(1, 1, 1, 1, 1, 1))), ValueError, "one to three kernel"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), ValueError, r"weight of 1 \(LazyConv2d\) has no shape yet; run one forward"),
    "a buffer": (lambda: _with_buffer(), TypeError, "is a buffer; expected a floating-point parameter"),
    "quantized": (lambda: torch.ao.nn.quantized.Conv2d(3, 4, 3), TypeError, "is a function; expected a floating"),
    "no weight": (lambda: nn.ReLU(), TypeError, "1 is a ReLU without a weight"),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), TypeError, "which cannot be changed"),
    "adapted": (lambda: AdaFMConv2d(3, 4, 3), ValueError, r"1 \(AdaFMConv2d\) is adapted already; exclude it, or call"),
    "parametrized": (lambda: inject(SamePadConv(3, 4, 3)), ValueError, "is adapted already"),
    "a gamma of its own": (_named_gamma, ValueError, r"1 \(Conv2d\) has an attribute gamma of its own"),
}


def _with_buffer():
    layer = nn.Module()
    layer.register_buffer("weight", torch.ones(2, 2))
    return layer


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize(("make", "kind", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_modules(make, kind, message):
    """The message names the module, and the fit module before it is not adapted either."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make())
    before = type(model[0]), [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=message):
        inject(model, ["0", "1"])
    assert (type(model[0]), [p.requires_grad for p in model.parameters()]) == before
    with pytest.raises(kind):
        inject(model[1], [""])


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="model is a list; expected a torch.nn.Module"):
        inject([nn.Conv2d(3, 4, 3)])
    with pytest.raises(TypeError, match="model is a RecursiveScriptModule, which cannot be changed"):
        inject(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))))
    with pytest.raises(ValueError, match="bias is 'lora_only'; expected one of 'none', 'all', 'adafm_only'"):
        inject(nn.Conv2d(3, 4, 3), bias="lora_only")
    with pytest.raises(ValueError, match="target_modules is None, but the model has no convolution; there are 0"):
        inject(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="no convolution or linear layer; no module here has a weight"):
        inject(nn.ReLU(), "all")
    model = Head()
    for function in (mark_only_adafm_trainable, adafm_kernels.adafm_state_dict):
        with pytest.raises(ValueError, match="no module of the Head is adapted; call adafm_kernels.inject"):
            function(model)
        with pytest.raises(TypeError, match="model is a int"):
            function(3)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="model is a int"):
        print_trainable(3)
    with pytest.raises(ValueError, match="bias is 'some'"):
        mark_only_adafm_trainable(inject(model), "some")


def _picture(model):
    """Everything that inject could leave behind."""
    modules = [
        (n, type(m), sorted(vars(m)), [len(d) for d in vars(m).values() if isinstance(d, dict)])
        for n, m in model.named_modules()
    ]
    return modules, [(n, id(p), p.requires_grad) for n, p in model.named_parameters()], list(model.state_dict())


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, spectral_norm, lambda m: m], ids=["hooks", "new", "plain"])
def test_a_failure_halfway_is_undone(norm, monkeypatch):
    """The last change fails, after every other module is adapted."""
    model = nn.ModuleDict({"net": SNDiscriminator(norm), "unet": UNet(), "generator": DCGenerator()})
    x = normal((3, 3, 8, 8))
    before, output = _picture(model), copy.deepcopy(model["unet"])(x)
    real, calls = injection.mark_only_adafm_trainable, []

    def fails(model, bias):
        real(model, bias)
        calls.append(len(adapted(model)))
        raise MemoryError("no more")

    monkeypatch.setattr(injection, "mark_only_adafm_trainable", fails)
    with pytest.raises(MemoryError, match="no more"):
        inject(model, ".*")
    assert calls == [16] and _picture(model) == before
    assert torch.equal(model["unet"](x), output)
    monkeypatch.undo()
    assert len(adapted(inject(model, ".*"))) == 16
