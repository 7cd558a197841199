"""``ModulationPlan``: all modulated weights of a network in one pass, once for each optimizer step.

Layer by layer, modulation is bound by launches, layout copies and repetition. A plan keeps what the layers of a network
need in flat buffers, its arenas: W channels-last, gamma and beta, W' in the convolutions' own type and layout, and the
gradients of W', gamma and beta. One call modulates every layer, every forward until the next optimizer step uses that
W', the backwards add up in the gradient of W', and one call reduces it to the gradients of gamma and beta. The result
is that of the layers' own autograd: W' is linear in gamma and beta, which change at the optimizer step only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _arguments, backends
from .nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear
from .plan_arenas import Arenas, Slot, Triple, padded

_LAYERS = (AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear)
_FIXED_GAMMA, _FIXED_BETA = 1, 2


class ModulationPlan:
    """The modulated weights of a whole network from one launch, and the gradients of gamma and beta from another.

    Equivalent, to rounding, to the layers' own autograd; with ``W'`` each layer's modulated weight::

        plan = ModulationPlan(generator, dtype=torch.bfloat16).attach()
        for z in batches:
            plan.modulate()                         # W' of every layer; nothing to do where no parameter changed
            plan.zero_grad()                        # forget the gradients of W'
            loss(generator(z)).backward()           # any number of forwards and backwards
            plan.reduce()                           # gamma.grad and beta.grad of every layer
            optimizer.step()

    Args:
        layers: a module (every AdaFM layer in it, in its order), AdaFM layers as an iterable or a mapping of names, or
            triples ``(weight, gamma, beta)`` among them. In a triple gamma or beta may be None (fixed at one or zero)
            and the weight may be ``[O]``: ``(bias, None, shift)`` is the bias shift of GAN memory.
        dtype: type of W'; None: the weights' type.
        memory_format: ``torch.channels_last``, the only order of the arenas (``channels_last_3d`` for rank 5).
        accumulate: type in which gradients of W' are added up; None: that of W'. With another type ``W'.grad`` is None
            outside of a backward.
        backend: as in ``modulate``; None: the automatic choice.

    The plan takes the layers' weights, and those gamma and beta that have ``[O, I]`` entries of the computing type,
    into its arenas: the Parameter objects stay, their memory becomes a view of an arena, so optimizers, state dicts and
    in-place updates go on as before. Other gamma and beta (``[O, 1]``, ``[1, I]``, half types) and weights
    that several layers share are copied in when they change. Where memory was exchanged behind its back
    (``Module.to``, ``deepcopy``, a new Parameter) the plan packs again at the next ``modulate``.

    ``modulate`` writes W' anew after a ``reduce``, behind which an optimizer steps, and wherever a parameter's version
    counter has moved. Writes that move no counter (through ``parameter.data``, or by a fused optimizer whose gradients
    did not come from ``reduce``) need ``modulate(force=True)``. W' of a layer requires a gradient where, at the last
    ``modulate``, its weight, gamma or beta did.

    Raises:
        TypeError: something in ``layers`` is no AdaFM layer and no triple; a type is not floating-point.
        ValueError: no layers; the weights differ in type or device; another memory format.
        RuntimeError: the backend is not there; a weight, gamma or beta has changed its shape since the plan was made.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[nn.Module | Triple] | Mapping[str, nn.Module | Triple],
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        accumulate: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if memory_format not in (torch.channels_last, torch.channels_last_3d):
            raise ValueError(
                f"memory_format is {memory_format}; the arenas of a plan hold weights as torch.channels_last. For "
                "other layouts call adafm_kernels.modulate_many"
            )
        for name, value in (("dtype", dtype), ("accumulate", accumulate)):
            if value is not None and value not in _arguments.FLOAT_TYPES:
                raise TypeError(f"{name} is {value}; expected float32, float64, float16 or bfloat16")
        self._sources = dict(_named(layers))
        if not self._sources:
            raise ValueError("layers holds no AdaFM layer; make some with adafm_kernels.inject(model) first")
        self._dtype, self._accumulate_dtype, self._backend = dtype, accumulate, backend
        self._slots = _lay_out(self._sources)
        self._attached = False
        self._stale = False
        self._packed: Arenas | None = None
        self._pack()

    # ---- what it holds ----

    @property
    def names(self) -> list[str]:
        """Names of the layers, in the order of the arenas."""
        return [slot.name for slot in self._slots]

    @property
    def weights(self) -> dict[str, Tensor]:
        """W' of each layer by name: leaves in the layer's shape, channels-last, ready for a convolution."""
        return dict(zip(self.names, self._arenas.leaves, strict=True))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each arena."""
        return self._arenas.nbytes()

    # ---- the step ----

    def modulate(self, force: bool = False) -> dict[str, Tensor]:
        """Write W' of every layer in one call and return ``weights``; nothing is written where nothing changed.

        Not differentiable by itself: the gradients of W' are in the plan, and ``reduce`` takes them on. W' must not be
        rewritten between a forward and its backward; autograd raises where it is.
        """
        self._refresh()
        arenas = self._arenas
        versions = self._versions()
        if force or self._stale or versions != arenas.versions or arenas.capturing():
            self._copy_in(force or self._stale)
            arenas.modulate()
            arenas.versions, self._stale = versions, False
        for leaf, triple in zip(arenas.leaves, self._tensors(), strict=True):
            leaf.requires_grad_(any(t is not None and t.requires_grad for t in triple))
        return self.weights

    def zero_grad(self) -> None:
        """Forget the gradients of every W': the next backward writes them and further ones add to them."""
        self._arenas.zero_grad()

    @torch.no_grad()
    def reduce(self) -> None:
        """Turn the gradients of W' into those of gamma and beta (and of trained weights) in one call.

        ``gamma.grad`` and ``beta.grad`` of every layer become views of one arena that the next ``reduce`` overwrites;
        a gradient that was there already, from elsewhere, is added to. Parameters with ``requires_grad`` False are
        left without.
        """
        self._refresh()
        arenas = self._arenas
        arenas.reduce(any(weight.requires_grad for weight, _, _ in self._tensors()))
        self._stale = True
        for slot, (weight, gamma, beta) in zip(self._slots, self._tensors(), strict=True):
            if weight.requires_grad:
                _give(weight, slot.weight_view(arenas.grad_weight))
            for row, parameter in ((0, gamma), (1, beta)):
                if parameter is not None and parameter.requires_grad:
                    found = slot.pair_view(arenas.grad_parameters[row])
                    if parameter.numel() != found.numel():
                        found = found.sum_to_size(parameter.shape[:2])
                    _give(parameter, found.view(parameter.shape))

    @torch.no_grad()
    def step_many(self, hyper: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, average: Tensor | None) -> None:
        """One optimizer step of every gamma and beta and the next W'; ``PlanAdam`` calls it, and says more."""
        self._refresh()
        if self._arenas.flags != self._flags():
            self._pack()
        arenas = self._arenas
        arenas.step(hyper, exp_avg, exp_avg_sq, average)
        torch.autograd.graph.increment_version(self.trained_parameters)
        arenas.versions, self._stale = self._versions(), False

    @property
    def parameters_arena(self) -> Tensor:
        """``[2, pairs]``: gamma of every layer, then beta; the layers' parameters are views of it."""
        return self._arenas.parameters

    @property
    def trained_parameters(self) -> list[Tensor]:
        """Every gamma and beta with ``requires_grad``, layer after layer."""
        return [p for _, *pair in self._tensors() for p in pair if p is not None and p.requires_grad]

    def parameters(self) -> list[Tensor]:
        """Every weight, gamma and beta of the layers: those whose gradients come from ``reduce``."""
        return [t for triple in self._tensors() for t in triple if t is not None]

    @property
    def copied_parameters(self) -> list[str]:
        """Names of the gamma and beta that are copied into the arenas instead of lying there."""
        parts = ("weight", "gamma", "beta")
        return [f"{self._slots[n].name}.{parts[part]}" for n, part in self._arenas.copied if part]

    def pairs_of(self, arena: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The two ``[O, I]`` views of each layer in a ``[2, pairs]`` arena, by name."""
        return {slot.name: (slot.pair_view(arena[0]), slot.pair_view(arena[1])) for slot in self._slots}

    # ---- the layers ----

    def attach(self) -> ModulationPlan:
        """Let the AdaFM layers of the plan take their W' from it instead of modulating in every forward."""
        self._attached = True
        for slot, leaf in zip(self._slots, self._arenas.leaves, strict=True):
            source = self._sources[slot.name]
            if isinstance(source, _LAYERS):
                source.serve(leaf)
        return self

    def detach(self) -> ModulationPlan:
        """Let the layers modulate for themselves again."""
        self._attached = False
        for source in self._sources.values():
            if isinstance(source, _LAYERS):
                source.serve(None)
        return self

    def __enter__(self) -> ModulationPlan:
        self.attach().modulate()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        arenas = self._arenas
        return (
            f"ModulationPlan({len(self)} layers, {sum(s.shape.numel() for s in self._slots):,} weights, "
            f"{arenas.weight.dtype} to {arenas.out.dtype} on {arenas.weight.device}, {arenas.backend})"
        )

    # ---- memory ----

    def __getstate__(self) -> dict[str, Any]:
        # A copy has layers with memory of their own, which it packs for itself.
        return {**self.__dict__, "_packed": None, "_attached": False}

    @property
    def _arenas(self) -> Arenas:
        if self._packed is None:
            self._pack()
        assert self._packed is not None
        return self._packed

    def _tensors(self) -> Iterator[Triple]:
        for source in self._sources.values():
            yield (source.weight, source.gamma, source.beta) if isinstance(source, _LAYERS) else source

    def _pack(self) -> None:
        tensors = list(self._tensors())
        self._check(tensors)
        weight = tensors[0][0]
        backend = backends.forced_backend() if self._backend is None else self._backend
        self._packed = arenas = Arenas(
            self._slots,
            self._flags(),
            weight.dtype,
            self._dtype or weight.dtype,
            self._accumulate_dtype,
            weight.device,
            backends.choose(weight.device.type, weight.device.index, backend).name,
        )
        arenas.link(self._slots, tensors)
        if self._attached:
            self.attach()

    def _check(self, tensors: list[Triple]) -> None:
        first = tensors[0][0]
        for slot, (weight, gamma, beta) in zip(self._slots, tensors, strict=True):
            _arguments.check_modulate(*(_as_matrix(t) if weight.dim() == 1 else t for t in (weight, gamma, beta)), None)
            if weight.dtype != first.dtype or weight.device != first.device:
                raise ValueError(
                    f"the weight of {slot.name!r} is {weight.dtype} on {weight.device}, that of "
                    f"{self._slots[0].name!r} {first.dtype} on {first.device}; a plan takes weights of one type on one "
                    "device"
                )
            for what, found, expected in (
                ("weight", weight, slot.shape),
                ("gamma", gamma, slot.gamma_shape),
                ("beta", beta, slot.beta_shape),
            ):
                shape = None if found is None else found.shape
                if shape != expected:
                    raise RuntimeError(
                        f"the {what} of {slot.name!r} has shape {_listed(shape)}, but had {_listed(expected)} when the "
                        "plan was made; make a new ModulationPlan"
                    )

    def _refresh(self) -> None:
        """Pack again where parameters are no longer what the arenas hold."""
        if self._packed is None or not self._packed.is_linked(self._slots, list(self._tensors())):
            self._pack()

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for triple in self._tensors() for t in triple if t is not None)

    def _flags(self) -> list[int]:
        """What of each layer the optimizer step leaves as it is."""
        flags = []
        for _, gamma, beta in self._tensors():
            fixed_gamma = gamma is None or not gamma.requires_grad
            fixed_beta = beta is None or not beta.requires_grad
            flags.append(fixed_gamma * _FIXED_GAMMA | fixed_beta * _FIXED_BETA)
        return flags

    def _copy_in(self, force: bool) -> None:
        self._arenas.copy_in(self._slots, list(self._tensors()), force)


def _named(layers: Any) -> Iterator[tuple[str, nn.Module | Triple]]:
    if isinstance(layers, nn.Module) and not isinstance(layers, _LAYERS):
        found: Iterable = ((name, module) for name, module in layers.named_modules() if isinstance(module, _LAYERS))
    elif isinstance(layers, Mapping):
        found = layers.items()
    elif isinstance(layers, nn.Module):
        found = [("0", layers)]
    else:
        found = ((str(number), layer) for number, layer in enumerate(layers))
    for name, layer in found:
        if isinstance(layer, _LAYERS):
            yield name, layer
            continue
        triple = isinstance(layer, (tuple, list)) and len(layer) == 3 and isinstance(layer[0], Tensor)
        if not triple or not all(part is None or isinstance(part, Tensor) for part in layer[1:]):
            raise TypeError(
                f"layers[{name!r}] is a {type(layer).__name__}; expected an AdaFMConv2d, AdaFMConvTranspose2d, "
                "AdaFMLinear or a triple (weight, gamma or None, beta or None)"
            )
        yield name, tuple(layer)


def _lay_out(sources: Mapping[str, nn.Module | Triple]) -> list[Slot]:
    slots, weight_end, pair_end = [], 0, 0
    for name, source in sources.items():
        weight, gamma, beta = (source.weight, source.gamma, source.beta) if isinstance(source, _LAYERS) else source
        if weight.dim() != 1:
            _arguments.check_weight(weight, f"the weight of {name!r}")
        pairs = (1, weight.shape[0]) if weight.dim() == 1 else (weight.shape[0], weight.shape[1])
        shapes = (None if p is None else p.shape for p in (gamma, beta))
        slots.append(Slot(name, weight.shape, *shapes, weight_end, pair_end, pairs))
        weight_end = padded(weight_end + weight.numel())
        pair_end = padded(pair_end + pairs[0] * pairs[1])
    return slots


def _give(parameter: Tensor, gradient: Tensor) -> None:
    """Set or add a gradient; one that is this memory already was given before and is overwritten by it."""
    gradient = gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
    if parameter.grad is None or parameter.grad.data_ptr() == gradient.data_ptr():
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _listed(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def _as_matrix(tensor: Tensor | None) -> Tensor | None:
    return tensor.view(1, -1) if tensor is not None and tensor.dim() == 1 else tensor
