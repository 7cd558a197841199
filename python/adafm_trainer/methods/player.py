"""One network in training: its optimizer, the plan of its modulated weights, and what happens to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adafm_kernels import ModulationPlan

from .moving import MovingBuffers
from .regularise import Anchor

Exchange = Callable[[list[Tensor]], None]


class Player:
    """A network, what trains it, and the way from a loss to a step. Nothing in it waits for the device.

    Trained are the parameters in ``optimizer`` that require a gradient at the time. With a ``plan`` the network's
    modulated weights are computed once for each optimizer step and their gradients reduced once, whatever the number of
    forwards and backwards. A step whose gradients are not finite is not taken, and its forwards leave no buffer moved.

    Args:
        optimizer: a fused one (``FusedAdam``, ``torch.optim.Adam(..., fused=True)``): it skips a step by itself, on the
            device.
        plan: of the network's AdaFM layers, attached; None: they modulate in every forward.
        scaler: for fp16.
        exchange: averages tensors over processes in place. It is given the gradients of every trained parameter in the
            network's order, zeros where a parameter had no part in the loss, so that all processes give the same; of a
            network that chooses what runs, also which of them had one.
        anchor: holds parameters near where they started: adds to their gradients.
        penalty: adds to the gradients too; see ``TransferMethod.generator_penalty``.

    Raises:
        ValueError: the optimizer is not fused, or holds a parameter that is not the network's.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        plan: ModulationPlan | None = None,
        scaler: torch.amp.GradScaler | None = None,
        exchange: Exchange | None = None,
        anchor: Anchor | None = None,
        penalty: Callable[[], None] | None = None,
    ) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(f"the optimizer of the {type(network).__name__} is not fused; make it with fused=True")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters = [p for p in network.parameters() if id(p) in held]
        if len(self._parameters) != len(held):
            raise ValueError(
                f"{len(held) - len(self._parameters)} parameters of the optimizer are not in the "
                f"{type(network).__name__}; make the optimizer of the network's own parameters"
            )
        self.network, self.optimizer, self.plan = network, optimizer, plan
        self.scaler, self.exchange, self.anchor = scaler, exchange, anchor
        self.penalty = penalty
        self.buffers = MovingBuffers(network)

    def trained(self) -> list[Tensor]:
        """The parameters that the next step changes, in the network's order."""
        return [p for p in self._parameters if p.requires_grad]

    def begin(self) -> None:
        """Drop the gradients and bring the modulated weights up to date: before the forwards of a step."""
        self._prepare()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The network computes, and gradients pass through it, but none are made for it. Those it had are dropped:
        the other network's step has their memory. ``buffers.settle`` is to follow, by what becomes of that step."""
        trained = self.trained()
        for p in trained:
            p.requires_grad_(False)
        try:
            self._prepare()
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    def backward(self, total: Tensor) -> None:
        """Add the gradients of ``total`` to those of this step; nothing else in its graph gets any."""
        inputs = self.trained()
        if self.plan is not None:
            planned = {id(p) for p in self.plan.parameters()}
            inputs = [p for p in inputs if id(p) not in planned]
            inputs += [leaf for leaf in self.plan.weights.values() if leaf.requires_grad]
        if inputs:
            scaled = total if self.scaler is None else self.scaler.scale(total)
            scaled.backward(inputs=inputs)

    def step(self) -> Tensor:
        """Take the step that the gradients since ``begin`` give; whether they were finite, a bool on the device."""
        if self.plan is not None:
            self.plan.reduce()
        trained = self.trained()
        if self.exchange is not None:
            self._average(trained)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.anchor is not None:
            self.anchor.add_gradients()
        if self.penalty is not None:
            self.penalty()
        gradients = [p.grad for p in trained if p.grad is not None]
        finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        self.buffers.settle(finite)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return finite
        self.optimizer.found_inf = (~finite).to(torch.float32)
        self.optimizer.step()
        return finite

    def _average(self, trained: list[Tensor]) -> None:
        """Average the gradients over the processes. What a choosing network ran on none of them keeps none, and so its
        moments, as in one process."""
        ran = torch.tensor([float(p.grad is not None) for p in trained])
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in trained]
        if not hasattr(self.network, "choose"):
            self.exchange(gradients)
            return
        self.exchange([*gradients, ran])
        for p, share in zip(trained, ran.tolist(), strict=True):
            if share == 0:
                p.grad = None

    def _prepare(self) -> None:
        self.buffers.remember()
        self.optimizer.zero_grad(set_to_none=True)
        if self.plan is not None:
            self.plan.modulate()
            self.plan.zero_grad()
