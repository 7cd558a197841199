"""Adam on a plan: equal to PyTorch's, resumed bit for bit, captured in a CUDA graph."""

import copy

import pytest
import torch
from planned import Count, images, modulation, network, twice

from adafm_kernels import ModulationPlan, PlanAdam

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def adam_pair(target, steps=5):
    """The network after some steps of PlanAdam, and after the same of reduce, Adam and an average kept by hand."""
    device, decay = target.device, 0.9
    net, plain, x = network(device), network(device), images(device)
    for n in (net, plain):
        n.body[1].gamma.requires_grad_(False)
        n.head.beta.requires_grad_(False)
    plan = ModulationPlan(net, backend=target.backend).attach()
    plan.modulate()
    optimizer = PlanAdam(plan, lr=1e-2, betas=(0.5, 0.9), average_decay=decay)
    trained = [p for p in modulation(plain) if p.requires_grad]
    reference = torch.optim.Adam(trained, lr=1e-2, betas=(0.5, 0.9))
    averages = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(steps):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (1 + step)
        plan.zero_grad()
        twice(net, x)
        optimizer.step()
        reference.zero_grad()
        twice(plain, x)
        reference.step()
        for name, p in plain.named_parameters():
            averages[name].lerp_(p.detach(), 1 - decay)
    return net, plain, optimizer, averages, x


def test_plan_adam_equals_adam(target):
    net, plain, optimizer, averages, x = adam_pair(target)
    for (name, found), want in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)
    for name, (gamma, beta) in optimizer.averages().items():
        torch.testing.assert_close(gamma.flatten(), averages[f"{name}.gamma"].flatten(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(beta.flatten(), averages[f"{name}.beta"].flatten(), rtol=1e-10, atol=1e-12)


def test_plan_adam_leaves_w_prime_up_to_date():
    net = network(dtype=torch.float32)
    plan = ModulationPlan(net).attach()
    plan.modulate()
    optimizer = PlanAdam(plan, lr=0.1)
    plan.zero_grad()
    net(images(dtype=torch.float32)).sum().backward()
    optimizer.step()
    with Count() as count:
        weights = plan.modulate()
    assert not [name for name in count.names if name.startswith("adafm")]
    layer = net.up
    torch.testing.assert_close(weights["up"].detach(), (layer.gamma * layer.weight + layer.beta).detach())


def test_plan_adam_resumes_bit_for_bit():
    def run(net, plan, optimizer, steps):
        for _ in range(steps):
            plan.zero_grad()
            net(images(dtype=torch.float32)).square().sum().backward()
            optimizer.step()

    def start():
        net = network(dtype=torch.float32)
        plan = ModulationPlan(net).attach()
        plan.modulate()
        return net, plan, PlanAdam(plan, lr=0.01, average_decay=0.99)

    whole = start()
    run(*whole, 6)
    half = start()
    run(*half, 3)
    saved = copy.deepcopy((half[0].state_dict(), half[2].state_dict()))
    resumed = start()
    resumed[0].load_state_dict(saved[0])
    resumed[1].modulate()
    resumed[2].load_state_dict(saved[1])
    run(*resumed, 3)
    for found, want in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(found, want)
    assert torch.equal(resumed[2].average, whole[2].average)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_is_captured_in_a_cuda_graph():
    net, plain = network("cuda", torch.float32), network("cuda", torch.float32)
    x = images("cuda", torch.float32)
    plan, expected = ModulationPlan(net).attach(), ModulationPlan(plain).attach()
    for p in (plan, expected):
        p.modulate()
        p.zero_grad()
    optimizer, reference = PlanAdam(plan, lr=0.01), PlanAdam(expected, lr=0.01)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x).sum().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.zero_grad()
        net(x).square().sum().backward()
        optimizer.launch()
    for _ in range(4):
        optimizer.prepare()
        graph.replay()
        expected.zero_grad()
        plain(x).square().sum().backward()
        reference.step()
    for found, want in zip(modulation(net), modulation(plain), strict=True):
        torch.testing.assert_close(found, want)
