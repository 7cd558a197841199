"""CUDA graphs of the training step: each phase is captured once and replayed from then on.

The pattern is that of PyTorch's "CUDA semantics", section "Whole-network capture": a few eager steps on a side stream,
then the capture, then copies into the captured inputs and a replay. The eager steps are training steps, and the step of
the capture takes place by its first replay, so a run with graphs does what a run without them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UsageError
from ..methods.gan_step import GanStep
from ..methods.player import Player
from ..methods.step_config import DiscriminatorResult, GeneratorResult, StepConfig

R = TypeVar("R")

# Steps of each phase before its capture; PyTorch's examples take 3.
EAGER_STEPS = 3
GENERATOR, PLAIN, PENALISED = "generator's step", "discriminator's step", "discriminator's step with penalty"


class Graph(Protocol):
    """What has been captured."""

    def replay(self) -> None: ...


class Runtime(Protocol):
    """How steps run before their capture, and how they are captured."""

    def eager(self) -> AbstractContextManager[None]:
        """A context for the steps that precede a capture."""

    def capture(self, step: Callable[[], R]) -> tuple[Graph, R]:
        """Record ``step`` without running it; its result holds the tensors that every replay writes."""


class CudaRuntime:
    """``torch.cuda.CUDAGraph``, on one side stream for the eager steps and the captures.

    Every graph has a memory pool of its own, because the phases are not always replayed in the order of their capture.
    The device's default random generator is registered with a graph by PyTorch when the capture begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def eager(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def capture(self, step: Callable[[], R]) -> tuple[Graph, R]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = step()
        return graph, result


@dataclass
class _Captured(Generic[R]):
    graph: Graph
    inputs: Any
    result: R


class _Phase:
    """One kind of step: eager at first, then captured, then replayed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self.captured: _Captured | None = None
        self._signature: object = None

    def run(self, runtime: Runtime, step: Callable[..., R], inputs: Any, signature: object) -> R:
        """Take ``step(*inputs)`` by the means of the day. Another ``signature`` than before starts anew."""
        if signature != self._signature:
            self.steps, self.captured, self._signature = 0, None, signature
        self.steps += 1
        if self.captured is None:
            if self.steps <= EAGER_STEPS:
                with runtime.eager():
                    return step(*inputs)
            self.captured = self._capture(runtime, step, inputs)
        else:
            for mine, given in zip(tree_leaves(self.captured.inputs), tree_leaves(inputs), strict=True):
                if isinstance(given, Tensor):
                    mine.copy_(given, non_blocking=True)
        self.captured.graph.replay()
        return self.captured.result

    def _capture(self, runtime: Runtime, step: Callable[..., R], inputs: Any) -> _Captured:
        held = tree_map_only(Tensor, torch.clone, inputs)
        try:
            graph, result = runtime.capture(lambda: step(*held))
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"the {self.name} cannot be captured in a CUDA graph: {reason}; run with --graphs off"
            ) from error
        return _Captured(graph, held, result)


class GraphedStep:
    """A ``GanStep`` whose phases are replayed: the same calls, the same results and the same state.

    The phases are the generator's step, the discriminator's step and the one with the penalty. Each runs eagerly
    ``EAGER_STEPS`` times before its capture, and again where the parameters in training or the inputs' shapes change.
    The optimizers must be capturable (``make_capturable``).

    Tensors of a result are overwritten by the next step of the same phase: copy what is to stay.
    """

    def __init__(self, step: GanStep, runtime: Runtime) -> None:
        self.eager, self._runtime = step, runtime
        self._phases = {name: _Phase(name) for name in (GENERATOR, PLAIN, PENALISED)}

    @property
    def G(self) -> Player:
        return self.eager.G

    @property
    def D(self) -> Player:
        return self.eager.D

    @property
    def config(self) -> StepConfig:
        return self.eager.config

    @property
    def d_steps(self) -> int:
        return self.eager.d_steps

    @d_steps.setter
    def d_steps(self, value: int) -> None:
        self.eager.d_steps = value

    def generator(
        self, z: Tensor, y: Tensor | None = None, noise: Any = None, draws: Tensor | None = None
    ) -> GeneratorResult:
        """``GanStep.generator``."""
        return self._run(GENERATOR, self.eager.generator, (z, y, noise, draws))

    def fakes(self, z: Tensor, y: Tensor | None = None, noise: Any = None) -> Tensor:
        """``GanStep.fakes``, which is not captured."""
        if self.G.plan is not None:
            # A replayed step of the generator has moved its parameters behind the back of their version counters.
            self.G.plan.modulate(force=True)
        return self.eager.fakes(z, y, noise)

    def discriminator(
        self,
        x_real: Tensor,
        images: Tensor,
        y: Tensor | None = None,
        y_fake: Tensor | None = None,
        mix: Tensor | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> DiscriminatorResult:
        """``GanStep.discriminator``."""
        steps = self.eager.d_steps
        phase = PLAIN if steps % self.config.reg_interval else PENALISED
        result = self._run(phase, self.eager.discriminator, (x_real, images, y, y_fake, mix, draws))
        # A replay counts nothing.
        self.eager.d_steps = steps + 1
        return result

    def state_dict(self) -> dict:
        return self.eager.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take over a checkpoint's counters; what was captured belongs to other tensors and is dropped."""
        self.eager.load_state_dict(state)
        self._phases = {name: _Phase(name) for name in self._phases}

    def _run(self, name: str, step: Callable[..., R], inputs: tuple) -> R:
        phase, signature = self._phases[name], self._signature(inputs)
        if phase.captured is None:
            # Replays write parameters behind the back of their version counters, by which a plan knows what is stale.
            for player in (self.G, self.D):
                if player.plan is not None:
                    player.plan.modulate(force=True)
        return phase.run(self._runtime, step, inputs, signature)

    def _signature(self, inputs: tuple) -> object:
        trained = tuple(tuple(map(id, player.trained())) for player in (self.G, self.D))
        shapes = tuple((t.shape, t.dtype, t.stride()) if isinstance(t, Tensor) else t for t in tree_leaves(inputs))
        return trained, shapes


def resolve_graphs(
    wanted: str,
    device: torch.device,
    *,
    scaled: bool = False,
    grouped: bool = False,
    choosing: bool = False,
    moving_epsilon: bool = False,
) -> tuple[bool, str]:
    """Whether steps are captured, and a line for the log that says so and why.

    ``scaled``: fp16 with its gradient scalers; ``grouped``: gradients are averaged over processes; ``choosing``: the
    generator chooses among several sources; ``moving_epsilon``: Adam's epsilon differs from step to step. ``auto`` is
    on for CUDA where none is the case.

    Raises:
        UsageError: ``on`` where a step cannot be captured.
    """
    obstacle = None
    if device.type != "cuda":
        obstacle = f"{device} has no CUDA graphs", "--device cuda"
    elif scaled:
        obstacle = "the gradient scalers of fp16 look at their numbers on the host", "--precision bf16"
    elif grouped:
        obstacle = "the exchange of gradients between processes is not captured", "one process"
    elif choosing:
        obstacle = "how many samples each source makes is read on the host", "one --source"
    elif moving_epsilon:
        obstacle = "a captured step keeps Adam's epsilon of its capture", "--adam-epsilon torch"
    if wanted == "off":
        return False, "CUDA graphs: off, as asked"
    if obstacle is None:
        return True, f"CUDA graphs: on; each phase runs {EAGER_STEPS} steps before its capture"
    why, remedy = obstacle
    if wanted == "on":
        raise UsageError(f"--graphs on: {why}; leave --graphs out, or take {remedy}")
    return False, f"CUDA graphs: off, {why}"


def make_capturable(optimizer: Optimizer, device: torch.device, on: bool) -> None:
    """Put an Adam's settings into the form that a graph needs, or back: the step size is read from the device.

    To be called after the optimizer is made and after a state is loaded, which may be of either form.
    """
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        group["capturable"] = on
        group["lr"] = torch.tensor(lr, dtype=torch.float32, device=device) if on else lr


def set_learning_rate(group: dict[str, Any], lr: float) -> None:
    """The step size of one group of an optimizer, in place where it is read from the device."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
