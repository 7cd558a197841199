"""Random shapes, types, strides and settings for every op, against the formulas in float64 with rounding bounds.

``ADAFM_RANDOM_EXAMPLES`` is the number of examples for each op and backend; the examples are the same in every run.
"""

import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from modulation import normal
from random_tensors import (
    assert_close,
    computing,
    formats,
    masks,
    parameters,
    read,
    shapes,
    sides,
    tensors,
    types,
)

from adafm_kernels import modulate, modulate_lowrank, modulate_many, modulate_normalized, modulate_per_sample
from adafm_kernels.backends import interpreting

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = torch.ops.adafm
EXAMPLES = int(os.environ.get("ADAFM_RANDOM_EXAMPLES", "5" if interpreting() else "15"))

randomly = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def eps(weight):
    return torch.finfo(computing(weight)).eps


def over_taps(values, leading=2):
    return values.sum(tuple(range(leading, values.dim()))) if values.dim() > leading else values


def lies_as_asked(found, weight, layout):
    if found.numel() == 0:
        return True  # no memory, no order
    if layout is None:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
        dense = last is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=last)
        layout = last if dense else torch.contiguous_format
    return found.is_contiguous(memory_format=layout)


def assert_modulated(found, weight, gamma, beta, target):
    wide = weight.double()
    gamma, beta = read(gamma, weight, 1.0), read(beta, weight, 0.0)
    error = eps(weight) * ((gamma * wide).abs() + beta.abs())
    assert_close(found, gamma * wide + beta, error.expand(weight.shape), target.truncates)


def assert_gradients(found, grad, weight, gamma, mask, target):
    """dW, dgamma, dbeta of one weight; those not in ``mask`` have shape [0]."""
    wide, source, gamma = weight.double(), grad.double(), read(gamma, weight, 1.0)
    unit, taps = eps(weight), weight.shape[2:].numel() + 2
    expected = ((gamma * source), over_taps(source * wide), over_taps(source))
    errors = (
        2 * unit * expected[0].abs(),
        unit * taps * over_taps((source * wide).abs()),
        unit * taps * over_taps(source.abs()),
    )
    kinds = (weight.dtype, computing(weight), computing(weight))
    for part in range(3):
        if not mask[part]:
            assert found[part].shape == (0,)
            continue
        assert found[part].dtype == kinds[part]
        assert_close(found[part], expected[part], errors[part], target.truncates)
    assert not mask[0] or lies_as_asked(found[0], weight, None)


@randomly
@given(st.data())
def test_modulate(target, data):
    draw = data.draw
    weight = draw(tensors(draw(shapes()), draw(types()), target.device))
    gamma, beta = (draw(parameters(weight.shape[:2], target.device)) for _ in range(2))
    result, layout = draw(types()), draw(formats(weight.dim()))
    found = modulate(weight, gamma, beta, dtype=result, memory_format=layout, backend=target.backend)
    assert found.dtype == result and lies_as_asked(found, weight, layout)
    assert_modulated(found, weight, gamma, beta, target)
    grad, mask = draw(tensors(weight.shape, draw(types()), target.device)), draw(masks())
    sums = OPS.modulate_backward(grad, weight, gamma, mask, target.backend)
    assert_gradients(sums, grad, weight, gamma, mask, target)


@randomly
@given(st.data())
def test_modulate_many(target, data):
    draw = data.draw
    kind, result, grad_kind = draw(types()), draw(types()), draw(types())
    weights = [draw(tensors(shape, kind, target.device)) for shape in draw(st.lists(shapes(), max_size=4))]
    gammas, betas = ([draw(parameters(w.shape[:2], target.device)) for w in weights] for _ in range(2))
    layout = draw(st.sampled_from((None, torch.contiguous_format, torch.channels_last)))
    found = modulate_many(weights, gammas, betas, dtype=result, memory_format=layout, backend=target.backend)
    assert len(found) == len(weights)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    for value, weight, gamma, beta in zip(found, weights, gammas, betas, strict=True):
        wanted = last.get(weight.dim(), torch.contiguous_format) if layout == torch.channels_last else layout
        assert value.dtype == result and lies_as_asked(value, weight, wanted)
        assert_modulated(value, weight, gamma, beta, target)
    grads, mask = [draw(tensors(w.shape, grad_kind, target.device)) for w in weights], draw(masks())
    # The op's own lists hold no None.
    gammas = [torch.ones(1, 1, device=target.device) if gamma is None else gamma for gamma in gammas]
    groups = iter(OPS.modulate_many_backward(grads, weights, gammas, mask, target.backend))
    none = torch.empty(0)
    parts = [[next(groups) if asked else none for _ in weights] for asked in mask]
    assert next(groups, None) is None
    for number, (grad, weight, gamma) in enumerate(zip(grads, weights, gammas, strict=True)):
        assert_gradients([group[number] for group in parts], grad, weight, gamma, mask, target)


@randomly
@given(st.data())
def test_modulate_per_sample(target, data):
    draw = data.draw
    weight = draw(tensors(draw(shapes()), draw(types()), target.device))
    samples = draw(st.integers(0, 4))
    leading = (samples, *weight.shape[:2])
    gamma = draw(parameters(leading, target.device))
    beta = draw(parameters(leading, target.device, optional=gamma is not None))
    given_sets = [p.shape[0] for p in (gamma, beta) if p is not None]
    samples = next((n for n in given_sets if n != 1), 1)
    result, layout = draw(types()), draw(formats(weight.dim()))
    found = modulate_per_sample(weight, gamma, beta, dtype=result, memory_format=layout, backend=target.backend)
    assert found.dtype == result and found.shape == (samples, *weight.shape)

    def of(parameter, n):
        return None if parameter is None else parameter[0 if parameter.shape[0] == 1 else n]

    for n in range(samples):
        assert lies_as_asked(found[n], weight, layout)
        assert_modulated(found[n], weight, of(gamma, n), of(beta, n), target)
    grad, mask = draw(tensors(tuple(found.shape), draw(types()), target.device)), draw(masks())
    d_weight, d_gamma, d_beta = OPS.modulate_per_sample_backward(grad, weight, gamma, mask, target.backend)
    none = torch.empty(0)
    for n in range(samples):
        sums = (none, d_gamma[n] if mask[1] else none, d_beta[n] if mask[2] else none)
        assert_gradients(sums, grad[n], weight, of(gamma, n), [False, *mask[1:]], target)
    if mask[0]:
        terms = read(gamma, weight, 1.0, 3) * grad.double()
        error = (samples + 2) * eps(weight) * terms.abs().sum(0)
        assert d_weight.dtype == weight.dtype and lies_as_asked(d_weight, weight, None)
        assert_close(d_weight, terms.sum(0), error, target.truncates)


@randomly
@given(st.data())
def test_modulate_lowrank(target, data):
    draw = data.draw
    weight = draw(tensors(draw(shapes()), draw(types()), target.device))
    (outer, inner), rank = weight.shape[:2], draw(sides(8))
    gamma, beta = (draw(parameters((outer, inner), target.device)) for _ in range(2))
    u, s, v = (draw(tensors(shape, draw(types()), target.device)) for shape in ((outer, rank), (rank,), (inner, rank)))
    result, layout, unit = draw(types()), draw(formats(weight.dim())), eps(weight)
    found = modulate_lowrank(weight, gamma, u, s, v, beta, dtype=result, memory_format=layout, backend=target.backend)
    assert found.dtype == result and lies_as_asked(found, weight, layout)
    factors = [t.to(computing(weight)).double() for t in (u, s, v)]
    taps = (1,) * (weight.dim() - 2)

    def spread(pairs):
        return pairs.reshape(*pairs.shape, *taps)

    first = read(gamma, weight, 1.0)
    product = (factors[0] * factors[1]) @ factors[2].t()
    size = (factors[0] * factors[1]).abs() @ factors[2].abs().t()
    total, total_error = first + spread(product), (rank + 3) * unit * (first.abs() + spread(size))
    wide, shift = weight.double(), read(beta, weight, 0.0)
    error = total_error * wide.abs() + unit * ((total * wide).abs() + shift.abs())
    assert_close(found, total * wide + shift, error.expand(weight.shape), target.truncates)

    grad, mask = draw(tensors(weight.shape, draw(types()), target.device)), draw(masks(6))
    parts = OPS.modulate_lowrank_backward(grad, weight, gamma, u, s, v, mask, target.backend)
    source = grad.double()
    if mask[0]:
        assert parts[0].dtype == weight.dtype and lies_as_asked(parts[0], weight, None)
        error = total_error * source.abs() + 2 * unit * (total * source).abs()
        assert_close(parts[0], (total * source).expand(weight.shape), error.expand(weight.shape), target.truncates)
    assert_gradients((torch.empty(0), parts[1], parts[5]), grad, weight, None, [False, mask[1], mask[5]], target)
    pairs, terms = over_taps(source * wide), over_taps((source * wide).abs())
    left, right, scale = factors[0], factors[2], factors[1]
    count = weight.shape[2:].numel() + outer + inner + rank + 6
    products = (
        (lambda d, u, s, v: (d @ v) * s, u),
        (lambda d, u, s, v: (u * (d @ v)).sum(0), s),
        (lambda d, u, s, v: d.t() @ (u * s), v),
    )
    for part, asked, (formula, factor) in zip(parts[2:5], mask[2:5], products, strict=True):
        if not asked:
            assert part.shape == (0,)
            continue
        assert part.shape == factor.shape and part.dtype == computing(weight)
        bound = count * unit * formula(terms, left.abs(), scale.abs(), right.abs())
        assert_close(part, formula(pairs, left, scale, right), bound)


class Normalised:
    """What ``modulate_normalized`` works out of a weight, in float64, and how far its rounding may take it."""

    def __init__(self, weight, over, guard):
        self.unit, wide = eps(weight), weight.double()
        self.dims = tuple(range(2 if over == "filter" else 1, weight.dim()))
        self.members = weight.shape[self.dims[0] :].numel()
        centred = wide - self.mean(wide)
        self.deviation = (self.sum(centred.square()) / (self.members - 1)).sqrt()
        # Rounding of W - mean. Groups near the guard, or whose deviation is little more than that, say nothing.
        slack = 2 * (self.members + 2) * self.unit * wide.abs().amax(self.dims, keepdim=True)
        self.guarded = self.deviation < guard
        self.clear = (self.deviation - guard).abs() > 2 * slack + 4 * self.members * self.unit * self.deviation
        self.clear = (self.clear & (self.guarded | (self.deviation > 100 * slack))).expand(weight.shape)
        self.scale = self.deviation.clamp(min=guard)
        self.n = centred / self.scale
        self.scale_error = 2 * slack / self.scale + 2 * self.members * self.unit
        self.error = slack / self.scale + self.n.abs() * self.scale_error

    def sum(self, values):
        return values.sum(self.dims, keepdim=True)

    def mean(self, values):
        return values.mean(self.dims, keepdim=True)

    def d_weight(self, dn):
        """(dn - mean(dn) - n * slope) / s and the error of each of the three terms, and of s."""
        slope = torch.where(self.guarded, 0.0, self.sum(dn * self.n) / (self.members - 1))
        size = self.sum((dn * self.n).abs()) / (self.members - 1)
        slope_error = self.sum(dn.abs() * self.error) / (self.members - 1) + 2 * self.members * self.unit * size
        slope_error = torch.where(self.guarded, 0.0, slope_error)
        expected = (dn - self.mean(dn) - self.n * slope) / self.scale
        sizes = dn.abs() + self.mean(dn.abs()) + self.n.abs() * size
        error = 4 * (self.members + 4) * self.unit * sizes
        error = error + self.error * slope.abs() + (self.n.abs() + self.error) * slope_error
        return expected, error / self.scale + expected.abs() * self.scale_error


@randomly
@given(st.data())
def test_modulate_normalized(target, data):
    draw = data.draw
    over, weight = (
        draw(st.sampled_from(("filter", "channel"))),
        draw(tensors(draw(shapes()), draw(types()), target.device)),
    )
    members, pairs = weight.shape[2 if over == "filter" else 1 :].numel(), weight.shape[:2]
    assume(members >= 2 or pairs.numel() == 0)
    gamma, beta = (draw(parameters(pairs, target.device)) for _ in range(2))
    guard, result, layout = draw(st.sampled_from((0.5, 1e-3, 1e-8))), draw(types()), draw(formats(weight.dim()))
    found = modulate_normalized(
        weight, gamma, beta, over=over, eps=guard, dtype=result, memory_format=layout, backend=target.backend
    )
    assert found.dtype == result and lies_as_asked(found, weight, layout)
    grad, mask = draw(tensors(weight.shape, draw(types()), target.device)), draw(masks())
    parts = OPS.modulate_normalized_backward(grad, weight, gamma, over, guard, mask, target.backend)
    # The sums of G do not depend on the weight.
    assert_gradients((torch.empty(0), torch.empty(0), parts[2]), grad, weight, gamma, [False, False, mask[2]], target)
    assert all(asked or part.shape == (0,) for part, asked in zip(parts, mask, strict=True))
    if weight.numel() == 0:
        assert found.shape == weight.shape and not (mask[1] and parts[1].any())
        return
    of, unit = Normalised(weight, over, guard), eps(weight)
    factor, shift, source = read(gamma, weight, 1.0), read(beta, weight, 0.0), grad.double()
    error = factor.abs() * of.error + 2 * unit * ((factor * of.n).abs() + shift.abs())
    assert_close(found, factor * of.n + shift, error, target.truncates, of.clear)
    if mask[0]:
        assert parts[0].dtype == weight.dtype and lies_as_asked(parts[0], weight, None)
        assert_close(parts[0], *of.d_weight(factor * source), target.truncates, of.clear)
    if mask[1]:
        error = source.abs() * of.error + (weight.shape[2:].numel() + 2) * unit * (source * of.n).abs()
        clear = ~over_taps(~of.clear).bool()
        assert_close(parts[1], over_taps(source * of.n), over_taps(error), only=clear)


@st.composite
def arenas(draw):
    """Layers with gaps between them: rows of first weight, first pair, O, I, taps, flags; elements and pairs in all."""
    rows, weights, pairs = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        outer, inner, taps = draw(sides()), draw(sides() | st.sampled_from((8, 16, 24, 40))), draw(sides(least=1))
        weights, pairs = (8 * (-(-end // 8) + draw(st.integers(0, 2))) for end in (weights, pairs))
        rows.append((weights, pairs, outer, inner, taps, draw(st.integers(0, 3))))
        weights, pairs = weights + outer * inner * taps, pairs + outer * inner
    return rows, weights + draw(st.integers(0, 9)), pairs + draw(st.integers(0, 9))


class Network:
    """The arenas of a network, and views of each layer in float64."""

    def __init__(self, draw, target):
        self.rows, self.weights, self.pairs = draw(arenas())
        self.device, self.draw = target.device, draw
        self.kind, self.result = draw(types()), draw(types())
        self.wide = torch.float64 if self.kind == torch.float64 else torch.float32
        self.layers, self.tiles = torch.tensor(self.rows), None
        if target.device != "cpu" or target.backend == "triton":
            packed = bytearray(importlib.import_module("adafm_kernels._C").plan_tiles(self.rows))
            self.tiles = torch.frombuffer(packed, dtype=torch.int32).view(-1, 4).to(target.device)
        self.weight = self.flat(self.kind)

    def flat(self, kind, *leading):
        shape = (*leading, self.weights if not leading and kind is not None else self.pairs)
        return normal(shape, kind or self.wide, self.device, self.draw(st.integers(0, 999)))

    def __iter__(self):
        """For each layer: its flags, a view of its weights ``[O, taps, I]`` and one of its pairs ``[O, 1, I]``."""
        for weight, pair, outer, inner, taps, flags in self.rows:
            of_weights, of_pairs = slice(weight, weight + outer * inner * taps), slice(pair, pair + outer * inner)
            yield (
                flags,
                lambda t, s=of_weights, shape=(outer, taps, inner): t[..., s].view(shape),
                lambda t, s=of_pairs, shape=(outer, 1, inner): t[s].view(shape),
            )

    def untouched(self, before, after, pairs):
        """The room between and behind the layers is as it was."""
        keep = torch.ones(after.shape[-1], dtype=torch.bool, device=self.device)
        for weight, pair, outer, inner, taps, _ in self.rows:
            first, count = (pair, outer * inner) if pairs else (weight, outer * inner * taps)
            keep[first : first + count] = False
        return torch.equal(before[..., keep], after[..., keep])


@randomly
@given(st.data())
def test_arenas(target, data):
    network = Network(data.draw, target)
    unit, mask = eps(network.weight), data.draw(masks())
    gamma, beta, out = network.flat(None), network.flat(None), network.flat(network.result)
    grad, before = network.flat(data.draw(types())), out.clone()
    names = ("grad_weight", "grad_gamma", "grad_beta")
    written = dict(zip(names, (network.flat(network.kind), network.flat(None), network.flat(None)), strict=True))
    written = {name: arena for (name, arena), asked in zip(written.items(), mask, strict=True) if asked}
    held = {name: arena.clone() for name, arena in written.items()}
    OPS.modulate_many_out(network.weight, gamma, beta, network.layers, network.tiles, out=out, backend=target.backend)
    OPS.modulate_many_backward_out(
        grad, network.weight, gamma, network.layers, network.tiles, **written, backend=target.backend
    )
    assert network.untouched(before, out, False)
    assert all(network.untouched(held[name], arena, name != "grad_weight") for name, arena in written.items())
    for _, weights, pairs in network:
        w, g, factor, shift = (t.double() for t in (weights(network.weight), weights(grad), pairs(gamma), pairs(beta)))
        assert_close(weights(out), factor * w + shift, unit * ((factor * w).abs() + shift.abs()), target.truncates)
        taps = w.shape[1] + 2
        if mask[0]:
            error = 2 * unit * (factor * g).abs()
            assert_close(weights(written["grad_weight"]), factor * g, error, target.truncates)
        for name, terms in (("grad_gamma", g * w), ("grad_beta", g)):
            if name in written:
                error = taps * unit * terms.abs().sum(1, keepdim=True)
                assert_close(pairs(written[name]), terms.sum(1, keepdim=True), error)


@randomly
@given(st.data())
def test_step_many(target, data):
    network = Network(data.draw, target)
    unit, grad = eps(network.weight), network.flat(data.draw(types()))
    state = {name: network.flat(None, 2) for name in ("parameters", "exp_avg", "exp_avg_sq", "average")}
    state["exp_avg_sq"] = state["exp_avg_sq"].abs() + 0.01
    averaged, written = data.draw(st.booleans()), data.draw(st.booleans())
    if not averaged:
        state["average"] = None
    out = network.flat(network.result) if written else None
    before = {name: None if t is None else t.clone() for name, t in (*state.items(), ("out", out))}
    hyper = torch.tensor([0.05, 0.9, 0.99, 1e-8, 1.6, 12.0, 0.95, 0.0], dtype=network.wide, device=target.device)
    OPS.step_many(grad, network.weight, network.layers, network.tiles, hyper, **state, out=out, backend=target.backend)
    for name, arena in (*state.items(), ("out", out)):
        assert arena is None or network.untouched(before[name], arena, name != "out")
    lr, beta1, beta2, small, c1, c2, decay, _ = hyper.double().tolist()
    for flags, weights, pairs in network:
        w, g = weights(network.weight).double(), weights(grad).double()
        new = []
        for row, terms in enumerate((g * w, g)):
            d, slack = terms.sum(1, keepdim=True), (w.shape[1] + 2) * unit * terms.abs().sum(1, keepdim=True)
            p, m, v = (pairs(before[name][row]).double() for name in ("parameters", "exp_avg", "exp_avg_sq"))
            m_error = v_error = p_error = torch.zeros_like(p)
            if not flags >> row & 1:
                m_error = slack + 4 * unit * (m.abs() + d.abs())
                v_error = 2 * d.abs() * slack + slack.square() + 6 * unit * (v + d.square())
                m, v = beta1 * m + (1 - beta1) * d, beta2 * v + (1 - beta2) * d * d
                root = (c2 * v).sqrt() + small
                p = p - lr * c1 * m / root
                p_error = (
                    lr * c1 * (m_error / root + m.abs() * c2 * v_error / (2 * root**3))
                    + 8 * unit * lr * c1 * m.abs() / root
                )
                p_error = p_error + 2 * unit * (p.abs() + lr * c1 * m.abs() / root)
            found = {name: pairs(state[name][row]) for name in ("parameters", "exp_avg", "exp_avg_sq")}
            assert_close(found["parameters"], p, p_error)
            assert_close(found["exp_avg"], m, m_error)
            assert_close(found["exp_avg_sq"], v, v_error)
            if averaged:
                a = pairs(before["average"][row]).double()
                error = p_error + 4 * unit * (a.abs() + p.abs())
                assert_close(pairs(state["average"][row]), a + (1 - decay) * (p - a), error)
            # W' is made of the parameters as they were stored.
            new.append(found["parameters"].double())
        if written:
            error = unit * ((new[0] * w).abs() + new[1].abs())
            assert_close(weights(out), new[0] * w + new[1], error, target.truncates)
