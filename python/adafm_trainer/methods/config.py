"""Settings of one run: a frozen dataclass whose fields are the command line's flags and the lines of config.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths and intervals count optimizer steps: one generator step and ``critic_steps``
    discriminator steps each."""

    data: str
    """Training images: a folder or a zip of images."""
    outdir: str
    """Run directory to create. It must not hold a run already (continue one with --resume)."""
    source: tuple[str, ...] = ()
    """Source networks: a folder written by `adafm pretrain` or `adafm convert`, or `bundled`. `minegan` takes several,
    one --source each."""
    steps: int = 500
    """Optimizer steps of the whole run."""
    batch: int = 16
    """Images a step, over all devices together."""
    batch_gpu: int | None = None
    """Images that pass the networks at once on one device; the gradients of a step add up over such parts, so less
    memory gives the same step, except that normalisation over the batch, and a source chosen for the batch, go by the
    part. By default a device's whole share of --batch."""
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

    normalise_d: Literal["auto", "on", "off"] = "auto"
    """`gan-memory` only: take mean and deviation out of D's filters too; auto: with --classes only, as published."""
    storage: Literal["full", "low-rank"] = "full"
    """`gan-memory` only: how --bank keeps a task. full: as it is; low-rank: gamma and beta of the wide layers as
    singular vectors that the tasks share."""
    bank: str | None = None
    """`gan-memory` only: folder of the tasks of one source, to which the run adds what it has learned; it is made where
    there is none. A run with --storage low-rank starts from what it holds. By default nothing is added."""
    task: str | None = None
    """`gan-memory` only: name of the task in --bank; by default that of --data without folder and ending."""

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
    lr_miner: float = 5e-4
    """`minegan` only: Adam step size of the miner."""
    beta1: float = 0.0
    """Adam's decay of the first moment."""
    beta2: float = 0.99
    """Adam's decay of the second moment."""
    warmup: int = 100
    """Steps over which all step sizes rise linearly from 0."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    adam_epsilon: Literal["torch", "tensorflow"] = "torch"
    """Where Adam's epsilon stands: torch: added to the corrected root of the second moment; tensorflow: to the
    uncorrected one, as in TensorFlow 1."""
    loss: Literal["auto", "nonsat", "hinge", "wgan-gp"] = "auto"
    """Adversarial loss; auto takes the one that the source's family was published with. nonsat (non-saturating) and
    hinge go with the R1 penalty, wgan-gp with its own."""
    r1_gamma: float = 10.0
    """Strength of the R1 penalty: gamma/2 * E|grad|^2; 0 leaves it out. The paper's reg_param is gamma/2."""
    r1_interval: int = 16
    """The penalty, R1 or that of wgan-gp, is taken every so many discriminator steps, with as many times its weight."""
    reg_type: Literal["real", "fake", "real_fake"] = "real"
    """Images the R1 penalty is taken at."""
    gp_weight: float = 10.0
    """Weight of the penalty of wgan-gp: the mean squared distance from 1 of the gradient's norm at interpolates."""
    critic_steps: int = 1
    """Discriminator steps in each optimizer step, every one with training images of its own."""
    order: Literal["generator-first", "discriminator-first"] = "generator-first"
    """Which network is updated first in a step. generator-first: the (first) discriminator step takes the images made
    for the generator's; discriminator-first: images are made for each of its steps."""
    labels: Literal["none", "folders"] = "none"
    """Labels of the training images: the first folder level of --data, in the order of its names. They go to networks
    that are conditioned on labels."""
    classes: int = 0
    """Classes of the target: an unconditional source becomes conditional (family wgan-resnet; `gan-memory`: every
    source); 0 keeps the source's, and takes no labels in `gan-memory`."""
    conditioning: Literal["batchnorm", "concatenate"] = "batchnorm"
    """How the generator that --classes makes conditional takes its label: through tables of its normalisations, or
    joined to the latent."""
    class_weight: float = 1.0
    """Weight of an auxiliary classifier's cross entropy, in both networks' losses."""
    transfer: Literal["both", "generator", "discriminator", "none"] = "both"
    """`transfergan` only: which networks start from the source; the others start at random."""
    miner_init: Literal["identity", "orthogonal", "reference", "glorot"] = "identity"
    """`minegan` only: start values of the miner. identity: the source's own samples; reference: the authors'."""
    miner_dim: int | None = None
    """`minegan` only: length of the miner's input; by default that of the source's latent."""
    miner_hidden: int | None = None
    """`minegan` only: width of the miner; by default the length of the source's latent."""
    miner_buffers: Literal["frozen", "moving"] = "frozen"
    """`minegan` only: while the generator is frozen its batch statistics and spectral vectors are used and kept as they
    are, or move with every step as in the authors' code."""
    stage2: Literal["all", "adafm", "none"] = "all"
    """`minegan` only: what is trained beside the miner from --stage2-start on: all of the generator, gamma and beta of
    its --freeze-g groups, or nothing."""
    stage2_start: int = 400
    """`minegan` only: steps that train the miner alone."""
    select: Literal["sample-max", "batch-max"] = "sample-max"
    """`minegan` with several sources: the discriminator chooses one for each sample, or one for the batch."""
    selector: Literal["p", "head"] = "p"
    """`minegan` with several sources: what chooses one when there is no discriminator: the estimated probabilities, or
    a classifier on the miner."""
    mining_warmup: int = 200
    """`minegan` with several sources: steps in which every source gets the same share of the samples."""

    reg: Literal["none", "l2sp", "ewc"] = "none"
    """What holds the generator's trained source weights near their start: l2sp: their squared distance; ewc: the same
    with each weight's Fisher information."""
    reg_weight: float = 0.0
    """Weight of --reg."""
    saturation: float = 0.0
    """Weight of the penalty on generator outputs (before tanh) beyond 2.5 in magnitude."""
    ema: float = 0.995
    """Decay of the generator's weight average, which evaluation and samples use."""
    ema_ramp: bool = True
    """Let the decay rise as (1 + t) / (10 + t) up to --ema."""

    aug: Literal["none", "flip", "diffaug", "ada"] = "none"
    """Augmentation. flip: each training image is mirrored with probability one half; diffaug (Zhao et al., 2020) and
    ada (Karras et al., 2020): everything the discriminator sees is transformed, in both networks' steps."""
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
    subset: int = 0
    """Train on this many of the images of --data, drawn by --seed after --holdout; 0: on all of them."""
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
        if self.source is None or isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,) if self.source else ())
        positive = (
            "steps", "batch", "r1_interval", "critic_steps", "tick", "snap", "keep", "eval_samples", "max_skips"
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.batch_gpu is not None and self.batch_gpu < 1:
            raise UsageError(f"--batch-gpu is {self.batch_gpu}; it must be at least 1")
        if not 1 <= self.dist_timeout < float("inf"):
            raise UsageError(f"--dist-timeout is {self.dist_timeout}; it must be at least 1 second")
        weights = ("r1_gamma", "gp_weight", "class_weight", "reg_weight", "saturation")
        for name in ("miner_dim", "miner_hidden"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        starts = ("adafm_start", "stage2_start", "mining_warmup")
        for name in ("freeze_g", "freeze_d", *starts, "warmup", "holdout", "subset", "classes", *weights):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if (self.reg == "none") != (self.reg_weight == 0):
            raise UsageError(f"--reg {self.reg} --reg-weight {self.reg_weight}: give both, or neither")
        for name in ("lr_g", "lr_d", "lr_head", "lr_gamma", "lr_beta", "lr_miner"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a step size lies in [0, 1)")
        if not 0 < self.adam_eps < 1:
            raise UsageError(f"--adam-eps is {self.adam_eps}; it must lie between 0 and 1")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.data_scale is not None and not 0 < self.data_scale <= 1:
            raise UsageError(f"--data-scale is {self.data_scale}; it must lie in (0, 1]")
