"""The training loop and what surrounds a step: statistics, samples, checkpoints, evaluation, signals."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

from torch import Tensor

from ..data.grid import save_grid
from ..data.images import ImageSet
from ..data.prepare import prepare
from ..data.sampler import indices as sample_indices
from ..errors import DivergedError, Interrupted
from ..methods.config import TrainConfig
from .adapter import identity_distance, save_adapter
from .assemble import Assembly
from .checkpoint import save_checkpoint, write_atomic
from .collapse import CollapseWatch
from .evaluation import Evaluator
from .progress import Clock, Console, duration
from .rundir import RunDirectory
from .sampling import draw_latents, draw_noise, generate
from .signals import StopRequest
from .skips import Skips

GRID = 64


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one step on the device: ``real [B, C, H, W]``, ``z [B, z_dim]``, the noise maps or None."""

    real: Tensor
    z: Tensor
    noise: tuple[Tensor, ...] | None


class Trainer:
    """Runs an assembled pair on a training set from ``state`` to the last step; ``run`` may be called once.

    ``state`` is what a checkpoint's trainer.pt holds under "loop", or None for a new run.
    """

    def __init__(
        self,
        assembly: Assembly,
        config: TrainConfig,
        training: ImageSet,
        evaluator: Evaluator | None,
        run: RunDirectory,
        console: Console,
        state: dict | None = None,
    ) -> None:
        self.assembly, self.config, self.training, self.evaluator = assembly, config, training, evaluator
        self.run_directory, self.console = run, console
        state = state or {"step": 0, "skips": 0, "consecutive": 0, "wall": 0.0, "sums": {}, "counts": {}, "warned": []}
        self.step = state["step"]
        self.skips = Skips(assembly.device, state["skips"], state["consecutive"])
        self.warned = set(state["warned"])
        self._sums: dict[str, Tensor] = dict(state["sums"])
        self._counts: dict[str, int] = dict(state["counts"])
        self.clock = Clock(state["wall"])
        self.parallel = assembly.parallel
        self._samples = self.parallel.samples(config.batch)
        if self.parallel.main:
            self._look_at_reals()

    def _look_at_reals(self) -> None:
        """What the grids and gauges of rank 0 compare with."""
        config, training = self.config, self.training
        reference = sample_indices(config.seed, 0, min(len(training), 500), len(training))
        self._reals = prepare(
            training.batch(reference),
            seed=config.seed,
            step=0,
            sample_indices=range(len(reference)),
            flip=False,
            dither=False,
            scale=config.data_scale,
        )
        self.watch = CollapseWatch(self._reals)

    def run(self) -> None:
        """Train to ``config.steps``.

        Raises:
            Interrupted: a signal asked to stop; the step was finished and saved.
            DivergedError: gradients or pictures are lost. DiskError: a checkpoint could not be written.
        """
        config, parallel = self.config, self.parallel
        if self.step == 0:
            parallel.on_main("the grid of reals", self._save_reals)
            self._tick()
            self._save()
        with StopRequest() as stop:
            self.clock.lap()
            while self.step < config.steps:
                self._train_step()
                done = self.step == config.steps
                self.console.progress(self.step, config.steps, self.clock.seconds_per_step())
                if self.step % config.tick == 0 or done:
                    self._tick()
                evaluate = config.eval_every > 0 and self.step % config.eval_every == 0
                if evaluate and not done:
                    parallel.on_main("the evaluation", self._evaluate)
                stopping = parallel.any(stop.requested)
                if self.step % config.snap == 0 or done or stopping:
                    self._save()
                if stopping and not done:
                    raise Interrupted(
                        f"stopped after step {self.step} of {config.steps}; continue with "
                        f"`adafm train --resume {self.run_directory.root}`"
                    )
        adapter = self.run_directory.root / "adapter"
        parallel.on_main("the adapter", partial(save_adapter, adapter, self.assembly, config))
        if config.eval_every >= 0:
            parallel.on_main("the evaluation", self._evaluate)

    def _train_step(self) -> None:
        config, assembly, step = self.config, self.assembly, self.step
        event = assembly.method.before_step(assembly.networks, config, step)
        if event:
            self.console.line(f"step {step}: {event}")
        assembly.set_learning_rates(config, step)
        batch = self.inputs(step)
        g = assembly.step.generator(batch.z, None, batch.noise)
        assembly.average.update()
        d = assembly.step.discriminator(batch.real, g.images)
        self.step += 1
        self.clock.step()
        self.skips.add(g.finite & d.finite)
        if assembly.device.type == "cpu" or self.step % config.tick == 0:
            self._check_skips()
        self._accumulate(
            g_loss=g.loss,
            d_loss=d.loss_real + d.loss_fake,
            d_real=d.d_real.float().mean(),
            d_fake=d.d_fake.float().mean(),
            r1=None if d.r1_real is None else d.r1_real.mean(),
            r1_fake=None if d.r1_fake is None else d.r1_fake.mean(),
        )

    def inputs(self, step: int) -> Batch:
        """What the networks see in ``step``: a function of the seed, the step and the settings alone."""
        config, assembly = self.config, self.assembly
        samples = self._samples
        rows = sample_indices(config.seed, step * config.batch + samples.start, len(samples), len(self.training))
        real = prepare(
            self.training.batch(rows),
            seed=config.seed,
            step=step,
            sample_indices=samples,
            flip=config.flip,
            dither=config.dither,
            scale=config.data_scale,
        )
        real = real.to(assembly.device, memory_format=assembly.layout)
        generator = assembly.networks.generator
        z = draw_latents(generator, config.seed, "train", step, samples).to(assembly.device)
        noise = draw_noise(generator, config.seed, "train", step, samples)
        if noise is not None:
            noise = tuple(n.to(assembly.device) for n in noise)
        return Batch(real, z, noise)

    def _check_skips(self) -> None:
        """Give up where too many steps in a row were not taken. Reading the count waits for a GPU."""
        if self.skips.longest() < self.config.max_skips:
            return
        bad = [
            name
            for network in (self.assembly.networks.generator, self.assembly.networks.discriminator)
            for name, p in network.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        raise DivergedError(
            f"gradients were not finite in {self.skips.longest()} steps in a row up to step {self.step} "
            f"(first: {', '.join(bad[:5]) or 'none now'}); lower --lr-g and --lr-d, or use --precision fp32, and "
            f"start from the last checkpoint in {self.run_directory.checkpoints}"
        )

    def _accumulate(self, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
                self._counts[name] = self._counts.get(name, 0) + 1

    def _tick(self) -> None:
        """Statistics since the last tick over all processes; rank 0 writes them down and looks at samples."""
        self._sums = self.parallel.mean(self._sums)
        self.parallel.on_main("the tick", self._write_tick)
        self._sums, self._counts = {}, {}
        self.clock.lap()

    def _write_tick(self) -> None:
        """One row of statistics, a grid from fixed latents, and the collapse gauges."""
        config, root = self.config, self.run_directory
        images = self._grid()
        save_grid(root.samples / f"step{self.step:06d}.png", images / config.data_scale)
        gauges = self.watch.gauges(images)
        means = {name: (value / self._counts[name]).item() for name, value in self._sums.items()}
        seconds = self.clock.seconds_per_step() if self.step else 0.0
        row = {
            "step": self.step,
            "images": self.step * config.batch,
            "wall": round(self.clock.wall(), 3),
            "seconds_per_step": round(seconds, 5),
            **means,
            **dataclasses.asdict(gauges),
            **identity_distance(self.assembly.networks.generator),
            "skips": self.skips.total(),
        }
        root.append(root.stats, row)
        self._say_tick(row, seconds)
        for message in gauges.warnings(self.step):
            self._warn(message)
        if self.step >= 200 and gauges.pixel_std < 0.02:
            raise DivergedError(
                f"the samples of step {self.step} are blank (pixel deviation {gauges.pixel_std:.4f}): tanh has "
                "saturated and its gradient vanished. Start again with another --seed, --saturation 0.1, --data-scale "
                "0.95 or a larger --r1-gamma"
            )

    def _say_tick(self, row: dict, seconds: float) -> None:
        config = self.config
        left = duration((config.steps - self.step) * seconds)
        parts = [f"step {self.step}/{config.steps}", f"{row['images']} images", duration(row["wall"])]
        if "d_loss" in row:
            parts += [f"{seconds:.3f} s/step", f"{left} left", f"D {row['d_loss']:.3f}", f"G {row['g_loss']:.3f}"]
            parts += [f"D(real) {row['d_real']:+.2f}", f"D(fake) {row['d_fake']:+.2f}"]
        if "r1" in row:
            parts.append(f"R1 {row['r1']:.4f}")
        parts.append(f"varied {row['diversity']:.2f}")
        if row["skips"]:
            parts.append(f"skipped {row['skips']}")
        self.console.line("  ".join(parts))

    def _warn(self, message: str) -> None:
        key = message.split(":")[-1]
        row = {"step": self.step, "event": "warning", "message": message}
        self.run_directory.append(self.run_directory.stats, row)
        if key not in self.warned:
            self.warned.add(key)
            self.console.line(f"warning at step {self.step}: {message}")

    def _grid(self) -> Tensor:
        assembly = self.assembly
        return generate(assembly.average.module, self.config.seed, "grid", range(GRID), autocast=assembly.autocast)

    def _save_reals(self) -> None:
        save_grid(self.run_directory.root / "reals.png", self._reals[:GRID] / self.config.data_scale)

    def _save(self) -> None:
        """A checkpoint by rank 0, after every process has shown that it holds the same.

        The sums are averaged first, so that a run resumed from here has the statistics of one that went on.
        """
        self._sums = self.parallel.mean(self._sums)
        loop = {
            "step": self.step,
            "skips": self.skips.total(),
            "consecutive": self.skips.consecutive(),
            "wall": self.clock.wall(),
            "sums": self._sums,
            "counts": self._counts,
            "warned": sorted(self.warned),
            "processes": self.parallel.world,
        }
        model, average = self.assembly.model_state(), self.assembly.average.module.state_dict()
        trainer = self.assembly.trainer_state()
        self.parallel.agree([self.step, model, average, trainer], f"weights and optimizer states at step {self.step}")
        self.parallel.on_main(
            "the checkpoint",
            partial(
                save_checkpoint,
                self.run_directory.checkpoints,
                self.step,
                model,
                average,
                {**trainer, "loop": loop},
                self.config.keep,
            ),
        )

    def _evaluate(self) -> None:
        if self.evaluator is None:
            return
        assembly = self.assembly
        metrics = self.evaluator.evaluate(assembly.average.module, assembly.autocast, self.config.data_scale)
        row = {"step": self.step, "images": self.step * self.config.batch, "metrics": metrics}
        self.run_directory.append(self.run_directory.metrics, row)
        self.console.line(f"step {self.step}: {self.evaluator.summary(metrics)}")
        self.evaluator.save_nearest(self.run_directory.root / "nearest.png")


def write_blocks(path: Path, rows: list[dict]) -> None:
    """blocks.json: the block table as the report reads it."""
    write_atomic(path, json.dumps(rows, indent=1))
