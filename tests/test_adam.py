"""``FusedAdam``: equal to PyTorch's Adam, in one call, and interchangeable with it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Count

from adafm_kernels import FusedAdam, use_backend

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]
SHAPES = ((16, 8, 3, 3), (5, 3, 3, 3), (64,), (3, 5, 7), (), (0, 4), (70, 129))
OP, PYTORCH = "adafm_compiled.adam_many.default", "aten._fused_adam_.default"


def leaves(device="cpu", dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return [p.requires_grad_() for p in made]


def groups(parameters):
    return [
        {"params": parameters[:2], "lr": 1e-3},
        {"params": parameters[2:5], "lr": 5e-2},
        {"params": parameters[5:], "lr": 7e-3},
    ]


def give_gradients(step, *lists):
    for number, same in enumerate(zip(*lists, strict=True)):
        generator = torch.Generator().manual_seed(100 * step + number)
        noise = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        for p in same:
            p.grad = torch.empty_like(p).copy_(noise)


def calls(optimizer, op=OP):
    with Count() as count:
        optimizer.step()
    return count.names.count(op)


def pair(device="cpu", dtype=torch.float64, **settings):
    mine, theirs = leaves(device, dtype), leaves(device, dtype)
    settings = {"betas": (0.3, 0.99), **settings}
    return mine, theirs, FusedAdam(groups(mine), **settings), torch.optim.Adam(groups(theirs), fused=True, **settings)


def assert_alike(mine, theirs, rtol=1e-12, atol=1e-14):
    for number, (found, want) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(
            found.detach(), want.detach(), rtol=rtol, atol=atol, msg=lambda text, number=number: f"{number}: {text}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_adam_of_pytorch(device, dtype, tolerance):
    """Groups of three step sizes, which a schedule moves; one parameter joins late; a step is skipped."""
    mine, theirs, fused, adam = pair(device, dtype)
    for step in range(8):
        give_gradients(step, mine, theirs)
        if step < 3:
            mine[2].grad = theirs[2].grad = None
        for optimizer in (fused, adam):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.found_inf = torch.tensor(float(step == 5), device=device)
        assert calls(fused) == 1
        adam.step()
    assert_alike(mine, theirs, tolerance, tolerance / 100)
    for found, want in zip(mine, theirs, strict=True):
        a, b = fused.state[found], adam.state[want]
        assert a["step"] == b["step"] == (4 if found is mine[2] else 7)
        assert_alike([a["exp_avg"], a["exp_avg_sq"]], [b["exp_avg"], b["exp_avg_sq"]], tolerance, tolerance / 100)


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(0, 0.5),
    beta1=st.floats(0, 0.999),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-12, 1),
    steps=st.integers(1, 5),
    scale=st.floats(1e-6, 1e6),
)
def test_any_settings(lr, beta1, beta2, eps, steps, scale):
    """Against the written-out rule (Kingma and Ba, 2015, algorithm 1)."""
    p = torch.linspace(-2, 2, 37, dtype=torch.float64).requires_grad_()
    optimizer = FusedAdam([p], lr, (beta1, beta2), eps)
    want, m, v = p.detach().clone(), torch.zeros(37, dtype=torch.float64), torch.zeros(37, dtype=torch.float64)
    for t in range(1, steps + 1):
        p.grad = scale * torch.sin(t * torch.arange(37, dtype=torch.float64) + t)
        m = beta1 * m + (1 - beta1) * p.grad
        v = beta2 * v + (1 - beta2) * p.grad**2
        want = want - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        optimizer.step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-12)


def test_groups_of_other_betas_get_a_call_each():
    mine, theirs = leaves(), leaves()
    listed = [[{"params": p[:3], "betas": (0.0, 0.9)}, {"params": p[3:], "eps": 1e-3}] for p in (mine, theirs)]
    fused, adam = FusedAdam(listed[0], lr=1e-2), torch.optim.Adam(listed[1], lr=1e-2)
    give_gradients(0, mine, theirs)
    assert calls(fused) == 2
    adam.step()
    assert_alike(mine, theirs)


def test_a_state_goes_both_ways():
    mine, theirs, fused, adam = pair()
    for step in range(2):
        give_gradients(step, mine, theirs)
        fused.step()
        adam.step()
    saved = copy.deepcopy((fused.state_dict(), adam.state_dict()))
    assert saved[0].keys() == saved[1].keys()
    fused.load_state_dict(saved[1])
    adam.load_state_dict(saved[0])
    give_gradients(5, mine, theirs)
    assert calls(fused) == 1
    adam.step()
    assert_alike(mine, theirs)
    restored = pickle.loads(pickle.dumps(fused))
    (p,) = restored.param_groups[0]["params"][:1]
    p.grad = torch.ones_like(p)
    assert calls(restored) == 1


def test_resumes_bit_for_bit():
    def steps(parameters, optimizer, numbers):
        for number in numbers:
            give_gradients(number, parameters)
            optimizer.step()

    whole = leaves(dtype=torch.float32)
    steps(whole, FusedAdam(groups(whole)), range(6))
    half = leaves(dtype=torch.float32)
    first = FusedAdam(groups(half))
    steps(half, first, range(3))
    resumed = [p.detach().clone().requires_grad_() for p in half]
    second = FusedAdam(groups(resumed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_threads_do_not_change_the_bits():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = torch.linspace(-1, 1, 2**19 + 77).requires_grad_()
            p.grad = torch.cos(p.detach() * 100)
            FusedAdam([p], lr=0.1).step()
            results.append(p.detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_works_with_what_is_built_for_optimizers():
    """A scheduler, a closure and the gradient scaler, whose scaled gradients are PyTorch's own step's."""
    mine, theirs, fused, adam = pair()
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (fused, adam)]
    for step in range(2):
        give_gradients(step, mine, theirs)
        assert fused.step(lambda: mine[1].sum()) is not None
        adam.step()
        for schedule in schedules:
            schedule.step()
    assert_alike(mine, theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for parameters, optimizer in ((mine, fused), (theirs, adam)):
        optimizer.zero_grad()
        scaler.scale(sum(p.square().sum() for p in parameters)).backward()
        scaler.step(optimizer)
    assert_alike(mine, theirs)


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("half", lambda p: p.detach().bfloat16().requires_grad_()),
        ("gradient in another order", None),
    ],
)
def test_what_the_launch_does_not_cover_is_left_to_pytorch(why, change):
    mine, theirs = ([torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))] for _ in range(2))
    mine, theirs = ([(change(p) if change else p.requires_grad_()) for p in one] for one in (mine, theirs))
    for p in (*mine, *theirs):
        gradient = torch.ones_like(p) if change else torch.ones_like(p).to(memory_format=torch.channels_last)
        p.grad = gradient
    fused, adam = FusedAdam(mine, lr=0.1), torch.optim.Adam(theirs, lr=0.1, fused=True)
    assert calls(fused) == 0
    adam.step()
    assert_alike(mine, theirs)
    assert calls(fused, PYTORCH) == 1


def test_a_group_that_is_not_covered_leaves_the_others_in_the_launch():
    mine, theirs = leaves(), leaves()
    listed = [[{"params": p[:3], "weight_decay": 0.1}, {"params": p[3:]}] for p in (mine, theirs)]
    fused, adam = FusedAdam(listed[0], lr=0.1), torch.optim.Adam(listed[1], lr=0.1, fused=True)
    fired = []
    fused.register_step_post_hook(lambda *_: fired.append(1))
    for step in range(2):
        give_gradients(step, mine, theirs)
        with Count() as count:
            fused.step()
        assert (count.names.count(OP), count.names.count(PYTORCH)) == (1, 1)
        adam.step()
    assert_alike(mine, theirs)
    assert len(fired) == 2


def test_strides_of_single_elements_do_not_matter():
    p = torch.randn(1, 6, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
    p.grad = torch.ones(6).as_strided((1, 6, 1, 1), (6, 1, 1, 1))
    assert p.grad.stride() != p.stride()
    assert calls(FusedAdam([p])) == 1


def test_another_backend_leaves_the_step_to_pytorch():
    mine, theirs, fused, adam = pair()
    give_gradients(0, mine, theirs)
    with use_backend("reference"):
        assert calls(fused) == 0
    adam.step()
    assert_alike(mine, theirs, 0, 0)


def test_autograd_sees_the_step():
    p = torch.ones(8, requires_grad=True)
    version, square = p._version, p.square().sum()
    p.grad = torch.ones(8)
    FusedAdam([p]).step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def arguments(**changed):
    tensors = {name: [torch.ones(4, 6)] for name in ("parameters", "grads", "exp_avgs", "exp_avg_sqs")}
    tensors |= {"steps": [torch.zeros(())], "rates": [torch.tensor(0.1, dtype=torch.float64)]}
    return [*(tensors | changed).values(), 0.9, 0.99, 1e-8, None]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grads": []}, "grads holds 0 tensors; expected 1, one for each parameter"),
        ({"grads": [torch.ones(6, 4)]}, r"grads\[0\] has shape \[6, 4\]; expected its parameter's shape \[4, 6\]"),
        ({"grads": [torch.ones(6, 4).t()]}, r"grads\[0\] of shape \[4, 6\] has other strides"),
        ({"exp_avgs": [torch.ones(4, 6).double()]}, r"exp_avgs\[0\] is Double; expected Float"),
        ({"steps": [torch.zeros(2)]}, r"steps\[0\] has shape \[2\]; expected one number"),
        ({"rates": [torch.tensor(0.1)]}, r"rates\[0\] is Float; expected Double"),
        ({"rates": []}, "steps holds 1 and rates 0 tensors; expected 1"),
    ],
)
def test_the_op_refuses_what_does_not_fit(changed, message):
    FusedAdam([torch.ones(1, requires_grad=True)]).step()
    with use_backend("compiled"), pytest.raises(RuntimeError, match=message):
        torch.ops.adafm_compiled.adam_many.default(*arguments(**changed))


def test_half_types_are_refused_by_the_op():
    changed = {name: [torch.ones(4, 6).half()] for name in ("parameters", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(RuntimeError, match=r"parameters\[0\] is Half; expected float32 or float64"):
        torch.ops.adafm_compiled.adam_many.default(*arguments(**changed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_is_captured_in_a_cuda_graph():
    mine, theirs = (leaves("cuda", torch.float32) for _ in range(2))
    fused, adam = (
        FusedAdam(
            [{"params": mine[:3], "lr": torch.tensor(1e-3, device="cuda")}, {"params": mine[3:]}], capturable=True
        ),
        torch.optim.Adam([{"params": theirs[:3], "lr": 1e-3}, {"params": theirs[3:]}], fused=True),
    )
    fused.param_groups[1]["lr"] = torch.tensor(1e-3, device="cuda")
    give_gradients(0, mine, theirs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused.step()
    torch.cuda.synchronize()
    adam.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.step()
    for step in range(3):
        fused.param_groups[0]["lr"].fill_(0.01 * (step + 1))
        adam.param_groups[0]["lr"] = 0.01 * (step + 1)
        graph.replay()
        adam.step()
    assert_alike(mine, theirs, 1e-5, 1e-6)
