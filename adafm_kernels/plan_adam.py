"""``PlanAdam``: Adam on the gamma and beta of a ``ModulationPlan``, in one launch with everything around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plan import ModulationPlan


class PlanAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, ICLR 2015) for a plan: reduce, Adam, average and the next modulation in one launch.

    ``step`` takes the place of ``plan.reduce()``, ``optimizer.step()``, the update of an average and the following
    ``plan.modulate()``::

        optimizer = PlanAdam(plan, lr=1e-3, average_decay=0.999)
        for z in batches:
            plan.zero_grad()
            loss(generator(z)).backward()
            optimizer.step()

    Every gamma and beta of the plan with ``requires_grad`` is trained; ``gamma.grad`` and ``beta.grad`` are not
    written, so gradients can neither be clipped nor looked at: that is the price of the one pass. Equals
    ``torch.optim.Adam`` (without weight decay and amsgrad) to rounding. Learning-rate schedulers work: ``lr``,
    ``betas`` and ``eps`` of the one parameter group are read at each step.

    Args:
        plan: its parameters must lie in its arenas: full ``[O, I]`` shapes in the computing type.
        lr, betas, eps: as in ``torch.optim.Adam``.
        average_decay: keep ``average = decay * average + (1 - decay) * parameter``, starting at the parameters; None:
            no average.

    Raises:
        ValueError: a setting is out of range; a gamma or beta is broadcast or of a half type; nothing is to be trained.
    """

    def __init__(
        self,
        plan: ModulationPlan,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        average_decay: float | None = None,
    ) -> None:
        if lr < 0.0 or eps < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps}: expected lr, eps >= 0 and betas in [0, 1)")
        if average_decay is not None and not 0.0 <= average_decay <= 1.0:
            raise ValueError(f"average_decay is {average_decay}; expected a number in [0, 1] or None")
        copied = plan.copied_parameters
        if copied:
            raise ValueError(
                f"{', '.join(copied)}: PlanAdam needs gamma and beta of shape [O, I] in the computing type, each in "
                "one layer only; train these with plan.reduce() and torch.optim.Adam"
            )
        trained = plan.trained_parameters
        if not trained:
            raise ValueError("no gamma and no beta of the plan has requires_grad; nothing is to be trained")
        super().__init__(trained, {"lr": lr, "betas": tuple(betas), "eps": eps})
        self.plan, self.average_decay, self.steps = plan, average_decay, 0
        parameters = plan.parameters_arena
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.average = None if average_decay is None else parameters.clone()
        self.hyper = torch.zeros(8, dtype=parameters.dtype, device=parameters.device)

    def prepare(self) -> None:
        """Count one step and write its numbers to ``hyper``, from which the launch reads them."""
        self.steps += 1
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        decay = 0.0 if self.average_decay is None else self.average_decay
        corrections = (1.0 / (1.0 - beta1**self.steps), 1.0 / (1.0 - beta2**self.steps))
        numbers = (float(group["lr"]), beta1, beta2, group["eps"], *corrections, decay, 0.0)
        self.hyper.copy_(torch.tensor(numbers, dtype=self.hyper.dtype))

    def launch(self) -> None:
        """The one launch. A CUDA graph captures this; ``prepare`` runs before each replay."""
        self.plan.step_many(self.hyper, self.exp_avg, self.exp_avg_sq, self.average)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every trained gamma and beta from the gradients of W', then every W'. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare()
        self.launch()
        return loss

    def averages(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The averaged gamma and beta ``[O, I]`` of each layer by name; views that the next step changes."""
        if self.average is None:
            raise RuntimeError("there is no average: average_decay is None")
        return self.plan.pairs_of(self.average)

    def state_dict(self) -> dict[str, Any]:
        """Settings, steps, moments and the average. The moments are in the order of the plan's arenas."""
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "average": self.average}
        layers = [[name, list(self.plan.weights[name].shape)] for name in self.plan.names]
        return {"steps": self.steps, "group": group, "layers": layers, **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a ``state_dict``; ValueError where it is of other layers or lacks the average."""
        layers = [[name, list(self.plan.weights[name].shape)] for name in self.plan.names]
        if state_dict["layers"] != layers:
            raise ValueError(f"the state is of the layers {state_dict['layers']}; this plan has {layers}")
        if (state_dict["average"] is None) != (self.average is None):
            raise ValueError(
                f"the state has {'no' if state_dict['average'] is None else 'an'} average and average_decay is "
                f"{self.average_decay}; make the optimizer with the same average_decay as before"
            )
        self.steps = state_dict["steps"]
        self.param_groups[0].update(state_dict["group"])
        self.exp_avg.copy_(state_dict["exp_avg"])
        self.exp_avg_sq.copy_(state_dict["exp_avg_sq"])
        if self.average is not None:
            self.average.copy_(state_dict["average"])
