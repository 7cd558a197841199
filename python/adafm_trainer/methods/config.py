"""Settings of one run: a frozen dataclass whose fields are the command line's flags and the lines of config.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths and intervals count optimizer steps: one generator and one discriminator step each."""

    data: str
    """Training images: a folder or a zip of images."""
    outdir: str
    """Run directory to create. It must not hold a run already (continue one with --resume)."""
    source: str | None = None
    """Source networks: a folder written by `adafm pretrain` or `adafm convert`, or `bundled`."""
    steps: int = 500
    """Optimizer steps of the whole run."""
    batch: int = 16
    """Images a step, over all devices together."""
    batch_gpu: int | None = None
    """Images that pass the networks at once on one device; the gradients of a step add up over such parts, so less
    memory gives the same step. By default a device's whole share of --batch."""
    seed: int = 0
    """Every random draw is keyed by this seed, the step and the sample's index."""
    device: str = "auto"
    """Device to train on: auto takes cuda where there is one, else cpu."""
    precision: Precision = "auto"
    """Compute type: auto takes bf16 where the device computes in it, else fp32. Parameters stay float32."""
    r1_precision: Literal["same", "fp32"] = "same"
    """Compute type of the pass the penalty differentiates twice. fp16 always takes fp32 there."""
    layout: Literal["auto", "channels-last", "contiguous"] = "auto"
    """Memory layout of weights and feature maps: auto takes channels-last with bf16, fp16 and a modulation plan, else
    contiguous."""
    modulation: Literal["plan", "autograd"] = "plan"
    """How modulated filters get their weights. plan: all layers of a network at once, once for each optimizer step;
    autograd: every layer in every forward. The gradients are the same to rounding."""
    conv_double_backward: Literal["auto", "native", "explicit"] = "auto"
    """Second derivative of the discriminator's convolutions, which the penalty needs. native: PyTorch's; explicit: made
    of ordinary convolutions. auto: explicit on the CPU; on CUDA the faster of both, measured at the start, which
    config.yaml then names. Equal to rounding."""

    checkpoint_activations: bool = False
    """Keep only each stage's input for the backward pass and compute the stage again there: less memory for one more
    forward pass, the same gradients bit for bit. The pass that the penalty differentiates twice keeps its maps."""

    graphs: Literal["auto", "on", "off"] = "off"
    """Capture the steps in CUDA graphs and replay them, which spares the time of launching kernels one by one. auto: on
    with CUDA (not with fp16 or several processes), off elsewhere. Off by default as long as no GPU has run it."""

    freeze_g: int = 0
    """Generator groups frozen, counted from the image side (the m of GmDn). `adafm` modulates these groups."""
    freeze_d: int = 0
    """Discriminator groups frozen, counted from the image side (the n of GmDn)."""
    copy: Literal["all", "gmdn"] = "all"
    """What is taken from the source: all, or gmdn: all but the first linear layer, the last one and embeddings."""
    source_weights: Literal["average", "raw"] = "average"
    """Generator taken from the source: its weight average where it has one, or the raw weights (as the paper did)."""
    head: Literal["source", "new", "distilled"] = "source"
    """`adafm` only. source: keep and train the source's own blocks above the modulated ones; new: the paper's fresh
    small head; distilled: that head, first fitted to what the source's own blocks put out."""
    adafm_start: int = 0
    """`adafm` only: steps that run with gamma and beta held at identity before they are trained."""

    lr_g: float = 5e-4
    """Adam step size of the generator's trained source weights."""
    lr_d: float = 5e-4
    """Adam step size of the discriminator."""
    lr_head: float = 5e-4
    """Adam step size of a new or distilled head."""
    lr_gamma: float = 5e-3
    """Adam step size of gamma."""
    lr_beta: float = 1e-3
    """Adam step size of beta."""
    beta1: float = 0.0
    """Adam's decay of the first moment."""
    beta2: float = 0.99
    """Adam's decay of the second moment."""
    warmup: int = 100
    """Steps over which all step sizes rise linearly from 0."""
    loss: Literal["r1"] = "r1"
    """Adversarial loss: non-saturating with R1 gradient penalty."""
    r1_gamma: float = 10.0
    """Strength of the penalty: gamma/2 * E|grad|^2. The paper's reg_param is gamma/2."""
    r1_interval: int = 16
    """The penalty is taken every so many discriminator steps, with as many times its weight."""
    reg_type: Literal["real", "fake", "real_fake"] = "real"
    """Images the penalty is taken at."""
    saturation: float = 0.0
    """Weight of the penalty on generator outputs (before tanh) beyond 2.5 in magnitude."""
    ema: float = 0.995
    """Decay of the generator's weight average, which evaluation and samples use."""
    ema_ramp: bool = True
    """Let the decay rise as (1 + t) / (10 + t) up to --ema."""

    flip: bool = False
    """Mirror each training image with probability one half."""
    dither: bool = False
    """Add uniform noise of 1/128 to the training images (as the paper did)."""
    data_scale: float | None = None
    """Training images are scaled to [-s, s]; by default as the source's were, or to [-1, 1] without one."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How images that are not square are made square."""
    alpha: Literal["white", "black", "drop", "error"] = "white"
    """What transparent pixels become."""

    tick: int = 50
    """Steps between rows of stats.jsonl, collapse checks and sample grids."""
    snap: int = 250
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Checkpoints kept."""
    eval_data: str | None = None
    """Held-out images of the target: a folder or a zip. Without it --holdout or the training images are used."""
    holdout: int = 0
    """Images of --data withheld from training and used for evaluation when --eval-data is not given."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates after the last step only, -1 never."""
    eval_samples: int = 500
    """Generated images an evaluation takes."""
    extractor: str = "auto"
    """Feature network of the metrics: auto, efflite0, random-v1, or inception:FILE."""
    max_skips: int = 10
    """Consecutive steps with non-finite gradients after which the run stops."""
    dist_timeout: float = 600.0
    """Under `torchrun`: seconds after which a process that does not answer counts as lost and the others stop."""
    faithful: bool = False
    """Start from the published settings of the method instead of the default recipe; other flags still apply."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "r1_interval", "tick", "snap", "keep", "eval_samples", "max_skips")
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.batch_gpu is not None and self.batch_gpu < 1:
            raise UsageError(f"--batch-gpu is {self.batch_gpu}; it must be at least 1")
        if not 1 <= self.dist_timeout < float("inf"):
            raise UsageError(f"--dist-timeout is {self.dist_timeout}; it must be at least 1 second")
        for name in ("freeze_g", "freeze_d", "adafm_start", "warmup", "holdout", "r1_gamma", "saturation"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name in ("lr_g", "lr_d", "lr_head", "lr_gamma", "lr_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a step size lies in [0, 1)")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.data_scale is not None and not 0 < self.data_scale <= 1:
            raise UsageError(f"--data-scale is {self.data_scale}; it must lie in (0, 1]")


def write_config(path: Path, method: str, config: TrainConfig, model: dict) -> None:
    """Write ``key: value`` lines, values as JSON (a subset of YAML), that ``read_config`` reads back."""
    lines = [f"method: {json.dumps(method)}", f"model: {json.dumps(model)}"]
    lines += [f"{field.name}: {json.dumps(getattr(config, field.name))}" for field in dataclasses.fields(config)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_config(path: Path) -> tuple[str, TrainConfig, dict]:
    """Read what ``write_config`` wrote: method, settings, model description.

    Raises:
        UsageError: an unknown, repeated or missing key, or a value that is not JSON; with file, line and nearest name.
    """
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values: dict[str, object] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, text = line.partition(":")
        if not separator:
            raise UsageError(f"{path}:{number}: expected `key: value`, found {line!r}")
        if key not in known and key not in ("method", "model"):
            near = difflib.get_close_matches(key, [*known, "method", "model"], 1)
            raise UsageError(f"{path}:{number}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in values:
            raise UsageError(f"{path}:{number}: key {key!r} appears twice")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: the value of {key!r} is not JSON: {text.strip()!r}") from error
    required = ["method", "model", *(n for n, f in known.items() if f.default is dataclasses.MISSING)]
    if missing := [name for name in required if name not in values]:
        raise UsageError(f"{path}: missing {', '.join(missing)}")
    method, model = values.pop("method"), values.pop("model")
    if not isinstance(method, str) or not isinstance(model, dict):
        raise UsageError(f"{path}: `method` must be a string and `model` a mapping")
    return method, TrainConfig(**values), model
