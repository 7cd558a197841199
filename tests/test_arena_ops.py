"""The arena ops: values, what they leave alone, fake tensors, bad input."""

import copy

import pytest
import torch
from modulation import normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.adafm


def test_opcheck_of_the_arena_ops(arena):
    a = arena
    check = torch.library.opcheck
    check(OPS.modulate_many_out.default, a.forward, {"out": a.out, "backend": a.backend})
    written = {"grad_weight": a.grad_weight, "grad_gamma": a.grad_gamma, "grad_beta": a.grad_beta}
    check(OPS.modulate_many_backward_out.default, a.backward, {**written, "backend": a.backend})
    check(OPS.step_many.default, a.step, {**a.moments, "out": a.out, "backend": a.backend})


class Arena:
    """Two layers, one with an odd number of channels, with room between them and behind."""

    SHAPES = ((3, 5, 2), (16, 8, 9))

    def __init__(self, target, dtype=torch.float32, out_dtype=torch.bfloat16):
        device, self.backend = target.device, target.backend
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = [(8, 8, *self.SHAPES[0], 0), (48, 24, *self.SHAPES[1], 2)]
        self.layers = torch.tensor(rows)
        self.tiles = None
        if device != "cpu" or self.backend == "triton":
            from adafm_kernels import _C

            self.tiles = torch.frombuffer(bytearray(_C.plan_tiles(rows)), dtype=torch.int32).view(-1, 4).to(device)
        weights, pairs = 48 + 16 * 8 * 9 + 8, 24 + 16 * 8 + 8

        def flat(count, kind, seed):
            return normal((count,), kind, device, seed)

        self.weight, self.grad = flat(weights, dtype, 0), flat(weights, out_dtype, 1)
        self.gamma, self.beta = flat(pairs, wide, 2), flat(pairs, wide, 3)
        self.out = flat(weights, out_dtype, 4)
        self.grad_weight = flat(weights, dtype, 5)
        self.grad_gamma, self.grad_beta = flat(pairs, wide, 6), flat(pairs, wide, 7)
        self.hyper = torch.tensor([0.01, 0.9, 0.99, 1e-8, 10.0, 100.0, 0.9, 0.0], dtype=wide, device=device)
        self.moments = {
            "parameters": normal((2, pairs), wide, device, 8),
            "exp_avg": normal((2, pairs), wide, device, 9),
            "exp_avg_sq": normal((2, pairs), wide, device, 10).abs(),
            "average": normal((2, pairs), wide, device, 11),
        }
        self.forward = (self.weight, self.gamma, self.beta, self.layers, self.tiles)
        self.backward = (self.grad, self.weight, self.gamma, self.layers, self.tiles)
        self.step = (self.grad, self.weight, self.layers, self.tiles, self.hyper)

    def places(self):
        """Slices of the weights and of the pairs of each layer, and its shape [O, taps, I]."""
        for weight, pair, o, i, k, _ in self.layers.tolist():
            yield slice(weight, weight + o * i * k), slice(pair, pair + o * i), (o, k, i)

    def outside(self, arena, pairs):
        """What lies between and behind the layers."""
        keep = torch.ones(arena.shape[-1], dtype=torch.bool, device=arena.device)
        for weights_of, pairs_of, _ in self.places():
            keep[pairs_of if pairs else weights_of] = False
        return arena[..., keep]


@pytest.fixture
def arena(target):
    return Arena(target)


@pytest.mark.parametrize(
    "kinds", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str
)
def test_arena_ops_equal_plain_formulas_and_leave_the_rest(target, kinds):
    a = Arena(target, *kinds)
    before = copy.deepcopy(a.__dict__)
    OPS.modulate_many_out.default(*a.forward, out=a.out, backend=a.backend)
    written = {"grad_weight": a.grad_weight, "grad_gamma": a.grad_gamma, "grad_beta": a.grad_beta}
    OPS.modulate_many_backward_out.default(*a.backward, **written, backend=a.backend)

    def close(found, want):
        eps = torch.finfo(found.dtype).eps * (2.0 if target.truncates and found.dtype == torch.bfloat16 else 1.0)
        torch.testing.assert_close(found.double(), want, rtol=2 * eps, atol=64 * torch.finfo(a.gamma.dtype).eps)

    for weights, pairs, (o, k, i) in a.places():
        w, g = a.weight[weights].view(o, k, i).double(), a.grad[weights].view(o, k, i).double()
        gamma, beta = (p[pairs].view(o, 1, i).double() for p in (a.gamma, a.beta))
        close(a.out[weights].view(o, k, i), gamma * w + beta)
        close(a.grad_weight[weights].view(o, k, i), gamma * g)
        close(a.grad_gamma[pairs].view(o, i), (g * w).sum(1))
        close(a.grad_beta[pairs].view(o, i), g.sum(1))
    for name, in_pairs in (("out", False), ("grad_weight", False), ("grad_gamma", True), ("grad_beta", True)):
        assert torch.equal(a.outside(getattr(a, name), in_pairs), a.outside(before[name], in_pairs)), name

    OPS.step_many.default(*a.step, **a.moments, out=a.out, backend=a.backend)
    lr, beta1, beta2, eps, c1, c2, decay, _ = a.hyper.tolist()
    old = before["moments"]
    for (weights, pairs, (o, k, i)), flags in zip(a.places(), a.layers[:, 5].tolist(), strict=True):
        w, g = a.weight[weights].view(o, k, i).double(), a.grad[weights].view(o, k, i).double()
        new = []
        for row, d in enumerate(((g * w).sum(1).flatten(), g.sum(1).flatten())):
            p, m, v, mean = (old[name][row, pairs].double() for name in a.moments)
            if not flags >> row & 1:
                m, v = beta1 * m + (1 - beta1) * d, beta2 * v + (1 - beta2) * d * d
                p = p - lr * c1 * m / ((c2 * v).sqrt() + eps)
            mean = mean + (1 - decay) * (p - mean)
            for name, want in zip(a.moments, (p, m, v, mean), strict=True):
                tolerance = 1e-5 if a.gamma.dtype == torch.float32 else 1e-12
                found = a.moments[name][row, pairs].double()
                torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
            new.append(a.moments["parameters"][row, pairs].double().view(o, 1, i))
        close(a.out[weights].view(o, k, i), new[0] * w + new[1])
    for name in a.moments:
        assert torch.equal(a.outside(a.moments[name], True), a.outside(old[name], True)), name


def test_arena_ops_refuse_to_be_differentiated(arena):
    a = arena
    gamma = a.gamma.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modulate_many_out has no derivative.*call modulate_many"):
        OPS.modulate_many_out.default(a.weight, gamma, a.beta, a.layers, a.tiles, out=a.out, backend=a.backend)
    with torch.no_grad():
        OPS.modulate_many_out.default(a.weight, gamma, a.beta, a.layers, a.tiles, out=a.out, backend=a.backend)


def arena_call(**changes):
    """modulate_many_out on one layer [2, 3] with 4 taps, with some arguments exchanged."""
    arguments = {
        "weight": torch.zeros(24),
        "gamma": torch.zeros(8),
        "beta": torch.zeros(8),
        "layers": torch.tensor([[0, 0, 2, 3, 4, 0]]),
        "tiles": None,
        "out": torch.zeros(24),
    } | changes
    OPS.modulate_many_out.default(**arguments)


SHARED = torch.zeros(48)
BAD_ARENAS = {
    "layers behind the end": (
        {"layers": torch.tensor([[0, 0, 3, 3, 4, 0]])},
        ValueError,
        r"layers\[0\] ends at weight 36",
    ),
    "crooked offsets": (
        {"layers": torch.tensor([[4, 0, 1, 3, 4, 0]])},
        ValueError,
        r"begins at weight 4 .* multiples of 8",
    ),
    "layers over each other": (
        {
            "layers": torch.tensor([[0, 0, 2, 3, 2, 0], [8, 8, 1, 1, 1, 0]]),
            "gamma": torch.zeros(16),
            "beta": torch.zeros(16),
        },
        ValueError,
        r"layers\[1\] begins at weight 8",
    ),
    "negative sizes": ({"layers": torch.tensor([[0, 0, -2, 3, 4, 0]])}, ValueError, "O -2"),
    "a table of floats": ({"layers": torch.zeros(1, 6)}, TypeError, "layers is torch.float32"),
    "a table of another width": (
        {"layers": torch.zeros(1, 5, dtype=torch.int64)},
        ValueError,
        r"layers has shape \[1, 5\]",
    ),
    "half gamma": ({"gamma": torch.zeros(8).half()}, TypeError, "gamma is torch.float16; expected torch.float32"),
    "integer out": ({"out": torch.zeros(24).int()}, TypeError, "out is torch.int32"),
    "strided out": ({"out": torch.zeros(48)[::2]}, ValueError, r"out has shape \[24\] and strides \[2\]"),
    "a weight of two dimensions": ({"weight": torch.zeros(4, 6)}, ValueError, r"weight has shape \[4, 6\]"),
    "out over weight": ({"weight": SHARED[:24], "out": SHARED[16:40]}, ValueError, "out shares memory with weight"),
}


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARENAS.values(), ids=BAD_ARENAS)
def test_bad_arenas(changes, error, message, backend):
    with pytest.raises(error, match=message):
        arena_call(**changes, backend=backend)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARENAS.values(), ids=BAD_ARENAS)
def test_the_library_alone_refuses_bad_arenas(changes, error, message):
    """Called without the Python checks it raises as well, and writes nothing."""
    from adafm_kernels._library import load_library

    load_library()
    arguments = {
        "weight": torch.zeros(24),
        "gamma": torch.zeros(8),
        "beta": torch.zeros(8),
        "layers": torch.tensor([[0, 0, 2, 3, 4, 0]]),
        "tiles": None,
        "out": torch.zeros(24),
    } | changes
    with pytest.raises(RuntimeError, match="adafm_compiled::modulate_many_out: "):
        torch.ops.adafm_compiled.modulate_many_out.default(*arguments.values())
