"""ModulationPlan: equal to the layers' own autograd, whatever happens to the layers."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from modulation import normal
from planned import Count, Net, gradients_of, images, modulation, network, same, twice
from torch import nn
from torch.profiler import ProfilerActivity, profile

from adafm_kernels import ModulationPlan, PlanAdam
from adafm_kernels.nn import AdaFMConv2d, AdaFMLinear

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_equals_autograd_to_rounding(target):
    net, plain, x = network(target.device), network(target.device), images(target.device)
    with ModulationPlan(net, backend=target.backend) as plan:
        plan.zero_grad()
        twice(net, x)
        plan.reduce()
        torch.testing.assert_close(net(x), plain(x), rtol=1e-12, atol=1e-12)
    twice(plain, x)
    same(gradients_of(net), gradients_of(plain), rtol=1e-12, atol=1e-12)


def test_gradient_penalty_equals_autograd(target):
    """R1: the penalty differentiates with respect to the images and then the weights."""
    results = []
    for planned in (True, False):
        net, x = network(target.device), images(target.device).requires_grad_()
        plan = ModulationPlan(net, backend=target.backend)
        if planned:
            plan.attach().modulate()
            plan.zero_grad()
        (inner,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
        (inner.square().sum() + net(x).square().sum()).backward()
        if planned:
            plan.reduce()
        results.append(gradients_of(net))
    same(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_equal_the_single_op(target, dtype):
    net = network(target.device, torch.float32)
    plan = ModulationPlan(net, dtype=dtype, backend=target.backend)
    weights = plan.modulate()
    assert list(weights) == plan.names == ["image", "body.1", "body.2", "up", "head"]
    for name, weight in weights.items():
        layer = net.get_submodule(name)
        wide = layer.gamma.double() * layer.weight.double() + layer.beta.double()
        assert weight.dtype == dtype and weight.is_leaf and weight.requires_grad
        bound = (1.0 if target.truncates and dtype == torch.bfloat16 else 0.51) * torch.finfo(dtype).eps
        assert ((weight.double() - wide).abs() <= bound * wide.abs() * 1.01 + 1e-7).all()


def test_weights_are_read_without_a_copy():
    """Convolutions take the views as they lie: nothing is made contiguous, cast or copied."""
    net = network(dtype=torch.float32)
    with ModulationPlan(net) as plan:
        for weight in plan.weights.values():
            if weight.dim() == 4:
                assert weight.is_contiguous(memory_format=torch.channels_last)
            assert weight.data_ptr() % 16 == 0
        x = images(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as trace:
            F.conv2d(x, plan.weights["image"], net.image.bias, padding=1)
    names = {event.key for event in trace.key_averages()}
    assert not names & {"aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy"}, names


def test_one_call_modulates_and_one_reduces():
    net = network(dtype=torch.float32)
    plan = ModulationPlan(net).attach()
    plan.modulate()
    plan.zero_grad()
    net(images(dtype=torch.float32)).sum().backward()
    with Count() as count:
        plan.modulate(force=True)
        plan.reduce()
    ours = [name for name in count.names if name.startswith("adafm")]
    assert ours == ["adafm_compiled.modulate_many_out.default", "adafm_compiled.modulate_many_backward_out.default"]
    assert not [name for name in count.names if "copy" in name or "empty" in name or "zeros" in name], count.names


def test_modulate_runs_only_after_a_change():
    net = network(dtype=torch.float32)
    plan = ModulationPlan(net)

    def calls():
        with Count() as count:
            plan.modulate()
        return sum("modulate_many_out" in name for name in count.names)

    assert calls() == 1 and calls() == 0
    with torch.no_grad():
        net.up.beta.add_(1.0)
    assert calls() == 1 and calls() == 0
    with torch.no_grad():
        net.image.weight.mul_(2.0)
    assert calls() == 1
    net.image.weight.data.mul_(2.0)
    assert calls() == 0
    before = plan.weights["image"].detach().clone()
    plan.modulate(force=True)
    assert not torch.equal(before, plan.weights["image"])


@pytest.mark.parametrize("fused", [False, True])
def test_modulate_follows_any_optimizer(fused):
    """Fused optimizers move no version counter."""
    net = network()
    plan = ModulationPlan(net).attach()
    optimizer = torch.optim.Adam(modulation(net), lr=0.1, fused=fused)
    for _ in range(2):
        plan.modulate()
        plan.zero_grad()
        net(images()).square().sum().backward()
        plan.reduce()
        before = [w.detach().clone() for w in plan.weights.values()]
        optimizer.step()
        for old, (name, now) in zip(before, plan.modulate().items(), strict=True):
            layer = net.get_submodule(name)
            torch.testing.assert_close(now, layer.gamma.detach() * layer.weight + layer.beta.detach())
            assert not torch.equal(now, old)


def test_only_trained_layers_require_gradients():
    net = network()
    plan = ModulationPlan(net).attach()
    net.image.gamma.requires_grad_(False)
    net.body[1].requires_grad_(False)
    flags = {name: leaf.requires_grad for name, leaf in plan.modulate().items()}
    assert flags == {"image": True, "body.1": False, "body.2": True, "up": True, "head": True}
    plan.zero_grad()
    net(images()).square().sum().backward()
    plan.reduce()
    assert net.image.gamma.grad is None and net.image.beta.grad is not None and net.body[1].beta.grad is None
    net.body[1].beta.requires_grad_()
    assert plan.modulate()["body.1"].requires_grad


def test_rewriting_weights_between_forward_and_backward_is_an_error():
    net = network(dtype=torch.float32)
    with ModulationPlan(net) as plan:
        x = images(dtype=torch.float32).requires_grad_()
        loss = net(x).sum()
        plan.modulate(force=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64], ids=str)
def test_gradients_add_up_in_another_type(accumulate):
    """1 + 2^-9 is 1 in bfloat16: ten small gradients after a large one are lost there and kept here."""
    layer = AdaFMConv2d(8, 8, 1, bias=False)
    with ModulationPlan(layer, dtype=torch.bfloat16, accumulate=accumulate) as plan:
        plan.zero_grad()
        (weight,) = plan.weights.values()
        weight.sum().backward()
        for _ in range(10):
            (weight * 2.0**-9).sum().backward()
        plan.reduce()
    assert torch.equal(layer.beta.grad, torch.full_like(layer.beta, 1.0 + 10 * 2.0**-9))


@pytest.mark.parametrize("accumulate", [None, torch.float32], ids=str)
def test_the_first_backward_writes_and_the_others_add(accumulate):
    """No zeros are written to be added to, and what arrives is what autograd adds up in plain leaves, to the bit."""
    layers = [AdaFMConv2d(3, 8, 3, padding=1), AdaFMConv2d(8, 5, 1)]
    plan = ModulationPlan(layers, dtype=torch.bfloat16, accumulate=accumulate).attach()
    x = images(dtype=torch.bfloat16)
    biases = [layer.bias.detach().bfloat16() for layer in layers]

    def loss(weights, scale):
        inner = F.conv2d(scale * x, weights[0], biases[0], padding=1)
        return F.conv2d(inner, weights[1], biases[1]).float().square().sum()

    for _ in range(2):
        leaves = list(plan.modulate().values())
        plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        sums = None
        with Count() as count:
            plan.zero_grad()
        assert not count.names
        for scale in (1, 2):
            with Count() as count:
                loss(leaves, scale).backward()
            assert not [name for name in count.names if "zero" in name]
            assert sum("copy_" in name for name in count.names) == (len(leaves) if scale == 1 else 0)
            grads = torch.autograd.grad(loss(plain, scale), plain)
            wide = [g.to(accumulate or g.dtype) for g in grads]
            sums = wide if sums is None else [a + b for a, b in zip(sums, wide, strict=True)]
        plan.reduce()
        for layer, want in zip(layers, sums, strict=True):
            assert torch.equal(layer.beta.grad.flatten(), want.float().sum((2, 3)).flatten())


@pytest.mark.parametrize("accumulate", [None, torch.float64], ids=str)
def test_a_layer_that_no_backward_reached_has_a_gradient_of_zero(accumulate):
    first, second = (AdaFMConv2d(4, 4, 1, bias=False) for _ in range(2))
    plan = ModulationPlan([first, second], accumulate=accumulate).attach()
    for reached in ((first, second), (first,), (second,)):
        plan.modulate()
        plan.zero_grad()
        sum(layer(torch.ones(1, 4, 2, 2)).sum() for layer in reached).backward()
        plan.reduce()
        for layer in (first, second):
            assert torch.equal(layer.beta.grad, torch.full_like(layer.beta, 4.0 * (layer in reached)))


def test_a_gradient_put_there_by_hand_is_taken():
    layer = AdaFMConv2d(2, 3, 1, bias=False)
    plan = ModulationPlan(layer)
    (weight,) = plan.modulate().values()
    plan.zero_grad()
    weight.grad = torch.full_like(weight, 3.0)
    plan.reduce()
    assert torch.equal(layer.beta.grad, torch.full_like(layer.beta, 3.0))


def test_broadcast_half_and_fixed_parameters(target):
    """FiLM shapes, half-precision parameters, and a bias shift, beside a full layer."""
    device = target.device
    weight, bias = normal((6, 4, 3, 3), device=device), normal((6,), device=device, seed=1)
    film = (normal((6, 1, 1, 1), device=device, seed=2), normal((1, 4, 1, 1), device=device, seed=3))
    half = (normal((6, 4), torch.bfloat16, device, 4), normal((6, 4), torch.bfloat16, device, 5))
    shift = normal((6,), device=device, seed=6)
    parameters = [p.requires_grad_() for p in (*film, *half, shift)]
    plan = ModulationPlan(
        {"film": (weight, *film), "half": (weight, *half), "bias": (bias, None, shift)}, backend=target.backend
    )
    assert plan.copied_parameters == ["film.gamma", "film.beta", "half.gamma", "half.beta"]
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(scale)
        weights = plan.modulate()
        expected = [
            film[0] * weight + film[1],
            half[0][:, :, None, None].float() * weight + half[1][:, :, None, None].float(),
            bias + shift,
        ]
        for found, want in zip(weights.values(), expected, strict=True):
            torch.testing.assert_close(found, want)
        plan.zero_grad()
        for number, found in enumerate(weights.values()):
            (found * normal(found.shape, device=device, seed=number)).sum().backward()
        for parameter in parameters:
            parameter.grad = None
        plan.reduce()
        loss = sum((e * normal(e.shape, device=device, seed=n)).sum() for n, e in enumerate(expected))
        for parameter, want in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype
            torch.testing.assert_close(
                parameter.grad, want, rtol=1e-2 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-4
            )


def test_a_shared_weight_serves_both_layers():
    first, second = AdaFMConv2d(4, 4, 3), AdaFMConv2d(4, 4, 3)
    second.weight = first.weight
    with torch.no_grad():
        second.gamma.fill_(3.0)
    plan = ModulationPlan([first, second])
    with torch.no_grad():
        first.weight.normal_()
    weights = plan.modulate()
    torch.testing.assert_close(weights["0"].detach(), first.weight.detach())
    torch.testing.assert_close(weights["1"].detach(), 3.0 * first.weight.detach())


def test_trained_weights_get_their_gradient():
    net, plain = network(), network()
    for n in (net, plain):
        n.up.weight.requires_grad_(True)
    x = images()
    with ModulationPlan(net) as plan:
        plan.zero_grad()
        twice(net, x)
        plan.reduce()
    twice(plain, x)
    same(gradients_of(net), gradients_of(plain), rtol=1e-12, atol=1e-12)


def test_reduce_overwrites_its_own_gradient_and_adds_to_others():
    layer = AdaFMLinear(3, 2)
    plan = ModulationPlan(layer)
    (weight,) = plan.modulate().values()
    for _ in range(2):
        plan.zero_grad()
        weight.sum().backward()
        plan.reduce()
    assert torch.equal(layer.beta.grad, torch.ones(2, 3))
    layer.beta.grad = torch.full((2, 3), 5.0)
    plan.reduce()
    assert torch.equal(layer.beta.grad, torch.full((2, 3), 6.0))


def test_state_dict_goes_in_and_out():
    net, other = network(dtype=torch.float32), network(dtype=torch.float32, seed=50)
    x = images(dtype=torch.float32)
    with ModulationPlan(net) as plan:
        keys = list(net.state_dict())
        assert keys == list(Net().state_dict())
        net.load_state_dict(other.state_dict())
        plan.modulate()
        torch.testing.assert_close(net(x), other(x))
        stream = io.BytesIO()
        torch.save(net.state_dict(), stream)
    stream.seek(0)
    fresh = Net()
    fresh.load_state_dict(torch.load(stream))
    torch.testing.assert_close(fresh(x), other(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_plan_of_its_own_layers(how):
    net, x = network(), images()
    plan = ModulationPlan(net).attach()
    plan.modulate()
    pair = (net, plan)
    copied, copied_plan = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    with torch.no_grad():
        net.head.gamma.zero_()
    plan.modulate()
    want = network()(x)
    torch.testing.assert_close(copied(x), want)
    with copied_plan:
        torch.testing.assert_close(copied(x), want)
        assert not torch.allclose(net(x), want)
        copied_plan.zero_grad()
        copied(x).sum().backward()
        copied_plan.reduce()
    assert net.up.gamma.grad is None and copied.up.gamma.grad is not None


def test_a_copy_of_the_network_alone_is_free_of_the_plan():
    net, x = network(), images()
    plan = ModulationPlan(net).attach()
    plan.modulate()
    alone = copy.deepcopy(net)
    with torch.no_grad():
        net.head.gamma.zero_()
    plan.modulate()
    torch.testing.assert_close(alone(x), network()(x))


def test_follows_to_another_type():
    net = network()
    plan = ModulationPlan(net).attach()
    plan.modulate()
    net.float()
    plan.modulate()
    assert plan.weights["up"].dtype == torch.float32
    x = images(dtype=torch.float32)
    torch.testing.assert_close(net(x), network(dtype=torch.float32)(x), rtol=1e-4, atol=1e-4)
    plan.zero_grad()
    net(x).sum().backward()
    plan.reduce()
    assert net.up.gamma.grad.dtype == torch.float32


def test_a_new_parameter_is_taken_in():
    net, x = network(), images()
    plan = ModulationPlan(net).attach()
    plan.modulate()
    net.up.gamma = nn.Parameter(torch.zeros_like(net.up.gamma))
    net.up.beta = nn.Parameter(torch.zeros_like(net.up.beta))
    plan.modulate()
    assert not plan.weights["up"].any()
    assert torch.equal(net(x)[0], net(x)[1])


class TestBadInput:
    def test_no_layers(self):
        with pytest.raises(ValueError, match="no AdaFM layer"):
            ModulationPlan(nn.Conv2d(3, 3, 3))

    def test_something_else_among_the_layers(self):
        with pytest.raises(TypeError, match=r"layers\['1'\] is a Conv2d"):
            ModulationPlan([AdaFMConv2d(3, 3, 3), nn.Conv2d(3, 3, 3)])

    def test_contiguous_arenas(self):
        with pytest.raises(ValueError, match="memory_format is torch.contiguous_format"):
            ModulationPlan(AdaFMConv2d(3, 3, 3), memory_format=torch.contiguous_format)

    def test_integer_result(self):
        with pytest.raises(TypeError, match=r"dtype is torch.int32"):
            ModulationPlan(AdaFMConv2d(3, 3, 3), dtype=torch.int32)

    def test_different_types(self):
        with pytest.raises(ValueError, match="float64.*float32.*one type"):
            ModulationPlan([AdaFMConv2d(3, 3, 3), AdaFMConv2d(3, 3, 3).double()])

    def test_a_weight_that_changed_its_shape(self):
        layer = AdaFMConv2d(3, 4, 3)
        plan = ModulationPlan({"image": layer})
        layer.weight = nn.Parameter(torch.zeros(4, 3, 5, 5))
        with pytest.raises(RuntimeError, match=r"weight of 'image' has shape \[4, 3, 5, 5\], but had \[4, 3, 3, 3\]"):
            plan.modulate()

    def test_a_parameter_that_does_not_spread(self):
        with pytest.raises(ValueError, match="gamma has shape"):
            ModulationPlan([(torch.zeros(4, 3, 3, 3), torch.ones(3, 4), None)])

    def test_a_backend_that_is_not_there(self):
        with pytest.raises(ValueError, match="backend is 'cudnn'"):
            ModulationPlan(AdaFMConv2d(3, 4, 3), backend="cudnn")

    @pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"average_decay": 1.5}], ids=str)
    def test_settings_of_adam(self, settings):
        with pytest.raises(ValueError, match="expected"):
            PlanAdam(ModulationPlan(AdaFMConv2d(3, 4, 3)), **settings)

    def test_adam_on_broadcast_parameters(self):
        gamma = torch.ones(4, 1, requires_grad=True)
        with pytest.raises(ValueError, match=r"film.gamma: PlanAdam needs"):
            PlanAdam(ModulationPlan({"film": (torch.zeros(4, 3, 3, 3), gamma, None)}))

    def test_adam_state_of_other_layers(self):
        first, second = (PlanAdam(ModulationPlan(AdaFMConv2d(3, 4, side))) for side in (1, 3))
        with pytest.raises(ValueError, match="the state is of the layers"):
            second.load_state_dict(first.state_dict())

    def test_adam_without_its_average(self):
        layer = AdaFMConv2d(3, 4, 1)
        state = PlanAdam(ModulationPlan(layer)).state_dict()
        with pytest.raises(ValueError, match="no average"):
            PlanAdam(ModulationPlan(layer), average_decay=0.9).load_state_dict(state)
