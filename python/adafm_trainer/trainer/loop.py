"""The training loop and what surrounds a step: statistics, samples, checkpoints, evaluation, signals."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.grid import save_grid
from ..data.images import ImageSet
from ..data.prepare import prepare
from ..data.sampler import indices as sample_indices
from ..errors import DivergedError, Interrupted
from ..methods.config import TrainConfig
from .adapter import adapted_numbers, identity_distance, save_adapter
from .assemble import Assembly
from .buffers import SharedBuffers
from .checkpoint import save_checkpoint, write_atomic
from .collapse import CollapseWatch
from .evaluation import Evaluator
from .inputs import Inputs, Latents
from .progress import Clock, Console, duration
from .rundir import RunDirectory
from .sampling import generate
from .signals import StopRequest
from .skips import Skips

GRID = 64


class Trainer:
    """Runs an assembled pair on a training set from ``state`` to the last step; ``run`` may be called once.

    ``state`` is what a checkpoint's trainer.pt holds under "loop", or None for a new run; ``labels`` are those of the
    training images.
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
        labels: Tensor | None = None,
    ) -> None:
        self.assembly, self.config, self.training, self.evaluator = assembly, config, training, evaluator
        self.run_directory, self.console = run, console
        state = state or {"step": 0, "skips": 0, "consecutive": 0, "wall": 0.0, "sums": {}, "counts": {}, "warned": []}
        self.step = state["step"]
        self.skips = Skips(assembly.device, state["skips"], state["consecutive"])
        self.warned = set(state["warned"])
        self._finite: list[Tensor] = []
        self._sums: dict[str, Tensor] = dict(state["sums"])
        self._counts: dict[str, int] = dict(state["counts"])
        self.clock = Clock(state["wall"])
        self.parallel = assembly.parallel
        self._buffers_g = SharedBuffers(assembly.networks.generator, self.parallel)
        self._buffers_d = SharedBuffers(assembly.networks.discriminator, self.parallel)
        self.inputs = Inputs(
            config,
            training,
            labels,
            assembly.networks.generator,
            assembly.labelled,
            assembly.augment,
            self.parallel,
            assembly.layout,
        )
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
        self._finite = []
        made = self._generator_step() if config.order == "generator-first" else None
        for critic in range(config.critic_steps):
            self._discriminator_step(critic, made if critic == 0 else None)
        if made is None:
            self._generator_step()
        elif config.critic_steps > 1:
            # Images made for the discriminator have moved them since the generator's step.
            self._buffers_g.share()
        self._buffers_d.share()
        self.skips.add(torch.stack(self._finite).all())
        self.step += 1
        self.clock.step()
        if assembly.device.type == "cpu" or self.step % config.tick == 0:
            self._check_skips()

    def _generator_step(self) -> tuple[Tensor, Latents]:
        """Update the generator and its average; the images made before the update, and what they were made from."""
        assembly, inputs = self.assembly, self.inputs.latents(self.step)
        draws = self.inputs.draws(self.step, "generator")
        assembly.set_epsilon(assembly.step.G, self.step + 1)
        result = assembly.step.generator(inputs.z, inputs.y, inputs.noise, draws)
        self._buffers_g.share()
        assembly.average.update()
        self._finite.append(result.finite)
        self._accumulate(g_loss=result.loss)
        return result.images, inputs

    def _discriminator_step(self, critic: int, made: tuple[Tensor, Latents] | None) -> None:
        """One update of the discriminator, on images ``made`` already or made for it."""
        assembly, step, reals = self.assembly, self.step, self.inputs.reals(self.step, critic)
        if made is None:
            latents = self.inputs.latents(step, critic)
            made = assembly.step.fakes(latents.z, latents.y, latents.noise), latents
        images, latents = made
        draws = None
        if assembly.augment is not None:
            draws = tuple(self.inputs.draws(step, f"{which}{critic}") for which in ("real", "fake"))
        mix = self.inputs.mix(step, critic)
        assembly.set_epsilon(assembly.step.D, step * self.config.critic_steps + critic + 1)
        result = assembly.step.discriminator(reals.images, images, reals.y, latents.y, mix, draws)
        if assembly.augment is not None:
            count = (step * self.config.critic_steps + critic + 1) * self.config.batch
            assembly.augment.update(result.d_real, count)
        self._finite.append(result.finite)
        self._accumulate(
            d_loss=result.loss_real + result.loss_fake,
            d_real=result.d_real.float().mean(),
            d_fake=result.d_fake.float().mean(),
            r1=None if result.r1_real is None else result.r1_real.mean(),
            r1_fake=None if result.r1_fake is None else result.r1_fake.mean(),
            gp=None if result.gp is None else result.gp.mean(),
            class_loss=result.class_real,
        )

    def _images(self) -> int:
        """Training images that the discriminator has seen."""
        return self.step * self.config.critic_steps * self.config.batch

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
            "images": self._images(),
            "wall": round(self.clock.wall(), 3),
            "seconds_per_step": round(seconds, 5),
            **means,
            **dataclasses.asdict(gauges),
            **identity_distance(self.assembly.networks.generator),
            **adapted_numbers(self.assembly),
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
        if "gp" in row:
            parts.append(f"GP {row['gp']:.4f}")
        parts.append(f"varied {row['diversity']:.2f}")
        if "p" in row:
            parts.append("p " + " ".join(f"{p:.2f}" for p in row["p"]))
        if "aug_p" in row:
            parts.append(f"ADA {row['aug_p']:.3f}")
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
        metrics = self.evaluator.evaluate(
            assembly.average.module, assembly.autocast, self.config.data_scale, self.console.line
        )
        row = {
            "step": self.step,
            "images": self.step * self.config.critic_steps * self.config.batch,
            "metrics": metrics,
        }
        self.run_directory.append(self.run_directory.metrics, row)
        self.console.line(f"step {self.step}: {self.evaluator.summary(metrics)}")
        self.evaluator.save_nearest(self.run_directory.root / "nearest.png")


def write_blocks(path: Path, rows: list[dict]) -> None:
    """blocks.json: the block table as the report reads it."""
    write_atomic(path, json.dumps(rows, indent=1))
