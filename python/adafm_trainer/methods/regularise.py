"""Anchors: trained weights of the source are held near the values they came with.

``--reg l2sp``: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
(ICML 2018), the part of L2-SP that acts on the source's weights. ``--reg ewc``: Li, Zhang, Lu and Shechtman, "Few-shot
Image Generation with Elastic Weight Consolidation" (NeurIPS 2020), where each weight's squared distance counts by its
Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SourceError, UsageError

NAMES = ("none", "l2sp", "ewc")


class Anchor:
    """The penalty ``weight * sum_i f_i (p_i - p0_i)^2`` over named parameters of a network, and its exact gradient.

    p0 are the values at construction. Without ``fisher`` every f is 1: L2-SP, whose published coefficient alpha/2 is
    ``weight``. With it: EWC, whose published lambda is ``weight``. New parameters are not to be named: the penalty
    that L2-SP puts on them is a plain weight decay.

    The gradient is added to the parameters' ``.grad`` and needs no graph, so it holds for a network whose weights a
    plan modulates too.

    Args:
        names: parameters that came from the source and are trained at any time of the run.
        fisher: for every name a tensor of the parameter's shape, not negative (``fisher_information``).

    Raises:
        UsageError: a weight that is negative or not finite; no names.
        ValueError: a name that is not a parameter, or stands there twice; Fisher information that does not fit.
    """

    def __init__(
        self, network: nn.Module, names: Iterable[str], weight: float, fisher: Mapping[str, Tensor] | None = None
    ) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"--reg-weight is {weight}; it must be a finite number, not negative")
        self.weight = weight
        self._parameters = _named(network, names)
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fisher = None if fisher is None else self._fitting(fisher, "the Fisher information")

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add ``2 weight f (p - p0)`` to the gradients: after the last backward, before the optimizer's step.

        Parameters at rest (``requires_grad`` False) are passed over; one without a gradient gets this as its gradient.
        With several processes it comes after the exchange of gradients, with fp16 after they are unscaled.
        """
        names = [name for name, p in self._parameters.items() if p.requires_grad]
        if not names or not self.weight:
            return
        parameters = [self._parameters[name] for name in names]
        pull = self._pull(names)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch._foreach_add_([p.grad for p in parameters], pull, alpha=2 * self.weight)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty, a float32 (float64 for float64) scalar on the device; parameters at rest count."""
        names = list(self._parameters)
        terms = torch._foreach_mul(self._pull(names), self._away(names))
        wide = [t if t.dtype == torch.float64 else t.float() for t in terms]
        return self.weight * torch.stack([t.sum() for t in wide]).sum()

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: start values and Fisher information (or None), by name, on the CPU."""
        return {"start": _on_cpu(self._start), "fisher": None if self._fisher is None else _on_cpu(self._fisher)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: other names or shapes, or a state with Fisher information for an anchor without, or vice versa.
        """
        if (state["fisher"] is None) != (self._fisher is None):
            kinds = {True: "l2sp", False: "ewc"}
            raise ValueError(
                f"the saved anchor is one of --reg {kinds[state['fisher'] is None]}, this run's of --reg "
                f"{kinds[self._fisher is None]}; resume with the --reg of the run"
            )
        self._start = self._fitting(state["start"], "the saved start values", sign=False)
        if self._fisher is not None:
            self._fisher = self._fitting(state["fisher"], "the saved Fisher information")

    def _pull(self, names: Sequence[str]) -> list[Tensor]:
        """``f (p - p0)`` of each named parameter."""
        pull = self._away(names)
        if self._fisher is not None:
            torch._foreach_mul_(pull, [self._fisher[name] for name in names])
        return pull

    def _away(self, names: Sequence[str]) -> list[Tensor]:
        """``p - p0`` of each named parameter."""
        now, start = [self._parameters[name] for name in names], [self._start[name] for name in names]
        return list(torch._foreach_sub(now, start))

    def _fitting(self, values: Mapping[str, Tensor], what: str, sign: bool = True) -> dict[str, Tensor]:
        """Copies of ``values`` in the parameters' types and places, checked."""
        if different := sorted(self._parameters.keys() ^ values.keys()):
            raise ValueError(f"{what} and the anchored parameters differ in {', '.join(different[:5])}")
        fitting = {}
        for name, p in self._parameters.items():
            value = values[name]
            if value.shape != p.shape:
                raise ValueError(f"{what} of {name} is {list(value.shape)}; the parameter is {list(p.shape)}")
            if sign and not (value.isfinite() & (value >= 0)).all():
                raise ValueError(f"{what} of {name} must be finite and not negative")
            fitting[name] = torch.empty_like(p, requires_grad=False).copy_(value)
        return fitting


class Latents(NamedTuple):
    """Inputs of a generator for one batch: ``z [B, z_dim]``, labels ``y [B]`` or None, noise maps or None."""

    z: Tensor
    y: Tensor | None = None
    noise: Sequence[Tensor] | None = None


def fisher_information(
    generator: nn.Module, discriminator: nn.Module, batches: Iterable[Latents | Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a source generator's parameters: for each name a tensor of its parameter's shape.

    ``F_i`` is the mean over samples of ``(d log sigma(D(G(z))) / d p_i)^2``: the squared gradient, taken for every
    sample by itself, of the log-likelihood that the paper puts in place of the one a GAN does not have, which is the
    discriminator's binary cross entropy of a generated sample against "real". Sums are float32 (float64 for float64).

    Both networks compute in evaluation mode, without autocast and one sample at a time; their modes, gradients and
    ``requires_grad`` are as before afterwards. To be called on the source as it was loaded, before a plan is attached:
    the plan's weights are constants to a backward.

    Args:
        batches: ``Latents``, or ``z`` alone; their split has no influence.

    Raises:
        UsageError: no names. ValueError: a name that is not a parameter of the generator, no samples, or no named
            parameter that has any part in the output.
        SourceError: a sample's gradient is not finite.
    """
    parameters = _named(generator, names)
    listed = list(parameters.values())
    sums = [torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32) for p in listed]
    count, reached = 0, False
    with _at_evaluation(generator, discriminator), _asking(listed), torch.enable_grad():
        for batch in batches:
            z, y, noise = batch if isinstance(batch, Latents) else Latents(batch)
            for i in range(len(z)):
                one = slice(i, i + 1)
                labels = None if y is None else y[one]
                maps = None if noise is None else [n[one] for n in noise]
                with torch.autocast(z.device.type, enabled=False):
                    logits = discriminator(generator(z[one], labels, maps), labels)
                    likelihood = F.logsigmoid(logits).sum()
                    gradients = torch.autograd.grad(likelihood, listed, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += gradient.to(total.dtype).square()
                        reached = True
                count += 1
    if not count:
        raise ValueError("Fisher information needs at least one sample; give it latents")
    if not reached:
        raise ValueError(
            f"none of the {len(listed)} named parameters has a part in the generator's output; a network with a plan "
            "attached has constant weights: take the Fisher information before"
        )
    fisher = {name: total / count for name, total in zip(parameters, sums, strict=True)}
    if bad := [name for name, value in fisher.items() if not value.isfinite().all()]:
        raise SourceError(f"the Fisher information is not finite in {', '.join(bad[:5])}; is the source whole?")
    return fisher


def _named(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    listed, held = list(names), dict(network.named_parameters())
    where = type(network).__name__
    if not listed:
        raise UsageError(f"no trained parameter of the {where} comes from the source; take --reg none")
    if unknown := [name for name in listed if name not in held]:
        raise ValueError(f"not parameters of the {where}: {', '.join(unknown[:5])}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"parameters named twice: {', '.join(sorted({n for n in listed if listed.count(n) > 1})[:5])}")
    return {name: held[name] for name in listed}


@contextmanager
def _at_evaluation(*networks: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _asking(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """All of ``parameters`` ask for gradients."""
    asked = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, before in zip(parameters, asked, strict=True):
            p.requires_grad_(before)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
