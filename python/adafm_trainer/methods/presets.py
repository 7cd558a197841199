"""Settings by method and source family: the default recipe and, under ``--faithful``, those of the publications."""

from __future__ import annotations

from ..errors import UsageError

METHODS = ("adafm", "transfergan", "minegan", "gan-memory", "freezed", "bsa", "scratch")

# What a family is trained with, whatever the method. A critic with a gradient penalty at interpolates wants several
# steps for each of the generator's, all on fresh images.
_WGAN_GP = {"critic_steps": 5, "order": "discriminator-first", "r1_interval": 1, "beta1": 0.0, "beta2": 0.9}
_FAMILIES: dict[str, dict] = {
    "wgan-resnet": {**_WGAN_GP, "lr_g": 1e-4, "lr_d": 1e-4, "lr_miner": 1e-4, "ema": 0.999},
    "mnist": {**_WGAN_GP, "beta1": 0.5, "lr_g": 1e-4, "lr_d": 1e-4, "lr_miner": 1e-4, "ema": 0.999},
    "biggan": {"lr_g": 1e-4, "lr_d": 4e-4, "lr_miner": 1e-4, "beta2": 0.999, "order": "discriminator-first"},
    "dcgan": {"lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.5, "beta2": 0.999},
}
_DEFAULTS: dict[str, dict] = {
    "adafm": {"freeze_g": 4, "batch": 8, "steps": 1200},
    "transfergan": {"batch": 8, "steps": 1200},
    "minegan": {"batch": 8, "steps": 1200, "stage2_start": 400},
    # gamma starts at the filters' deviations, some hundredths, where adafm starts at 1.
    "gan-memory": {"batch": 8, "steps": 1200, "lr_gamma": 1e-3, "lr_beta": 1e-3},
    "freezed": {"batch": 8, "steps": 1200, "freeze_d": 3},
    # Scales and shifts alone are soon outdone by a D with the step size of the others.
    "bsa": {"batch": 8, "steps": 1200, "lr_gamma": 0.02, "lr_beta": 0.02, "lr_d": 1e-4, "r1_gamma": 30.0},
    # From random weights 500 steps draw stripes, 3000 pictures.
    "scratch": {
        "steps": 4000,
        "lr_g": 1e-3,
        "lr_d": 1e-3,
        "r1_gamma": 30.0,
        "saturation": 0.1,
        "data_scale": 0.95,
        "ema": 0.999,
    },
}
# What a method's recipe for GP-GAN sets, and other families do not take over.
_GPGAN_ONLY = {
    "bsa": ("lr_gamma", "lr_beta", "lr_d", "r1_gamma"),
    "scratch": ("lr_g", "lr_d", "r1_gamma", "saturation", "data_scale"),
}

_RELEASED = {
    "warmup": 0,
    "ema_ramp": False,
    "source_weights": "raw",
    "saturation": 0.0,
    "data_scale": 1.0,
    "batch": 16,
    "faithful": True,
}
# Zhao, Cong and Carin (ICML 2020), released code: Adam 1e-4 with betas (0, 0.99), penalty 10 on reals at every step
# without the factor one half, average 0.999 from the first step, gamma and beta released after iteration index 10000.
_GPGAN = {
    **_RELEASED,
    "lr_g": 1e-4,
    "lr_d": 1e-4,
    "lr_head": 1e-4,
    "lr_gamma": 1e-4,
    "lr_beta": 1e-4,
    "r1_gamma": 20.0,
    "r1_interval": 1,
    "ema": 0.999,
    "aug": "flip",
    "dither": True,
    "copy": "gmdn",
    "steps": 60000,
    "tick": 500,
    "snap": 5000,
}
# Wang et al. (ECCV 2018), released code: WGAN-GP with weight 10 and 5 critic steps before each generator step, Adam
# 1e-5 (1e-4 from scratch) with betas (0, 0.9) and TensorFlow's epsilon, no average, no flips.
_TRANSFERGAN = {
    **_RELEASED,
    **_WGAN_GP,
    "loss": "wgan-gp",
    "gp_weight": 10.0,
    "adam_epsilon": "tensorflow",
    "lr_g": 1e-5,
    "lr_d": 1e-5,
    "ema": 0.0,
    "steps": 25000,
    "tick": 250,
    "snap": 4000,
}
# Wang et al. (CVPR 2020), released code. BigGAN: non-saturating loss without penalty, discriminator first on images of
# its own, 800 images a step, Adam (0, 0.999), batch statistics that move in stage 1 too, 300 steps of mining.
_MINEGAN_BIGGAN = {
    **_RELEASED,
    "source_weights": "average",
    "loss": "nonsat",
    "r1_gamma": 0.0,
    "order": "discriminator-first",
    "lr_g": 1e-4,
    "lr_miner": 1e-4,
    "lr_d": 4e-4,
    "beta1": 0.0,
    "beta2": 0.999,
    "adam_eps": 1e-6,
    "ema": 0.0,
    "batch": 800,
    "batch_gpu": 100,
    "miner_init": "reference",
    "miner_buffers": "moving",
    "stage2_start": 300,
    "steps": 10000,
    "tick": 100,
    "snap": 500,
}
# Digits: WGAN-GP, batch 50, Adam 1e-4 (0.5, 0.9), a miner from 4 numbers, 10,000 steps of mining and as many after.
_MINEGAN_MNIST = {
    **_RELEASED,
    **_WGAN_GP,
    "beta1": 0.5,
    "loss": "wgan-gp",
    "adam_epsilon": "tensorflow",
    "lr_g": 1e-4,
    "lr_d": 1e-4,
    "lr_miner": 1e-4,
    "ema": 0.0,
    "batch": 50,
    "miner_dim": 4,
    "miner_init": "glorot",
    "stage2_start": 10000,
    "mining_warmup": 0,
    "steps": 20000,
    "tick": 250,
    "snap": 2000,
}
# By method and family; "gpgan" stands for its four.
_FAITHFUL: dict[tuple[str, str], dict] = {
    ("adafm", "gpgan"): {**_GPGAN, "head": "new", "freeze_g": 4, "freeze_d": 2, "adafm_start": 10001},
    ("transfergan", "gpgan"): {**_GPGAN, "freeze_g": 4, "freeze_d": 2},
    # Cong et al. (NeurIPS 2020), released code: as above, with nothing of the source left out.
    ("gan-memory", "gpgan"): {**_GPGAN, "copy": "all"},
    ("scratch", "gpgan"): {**_GPGAN},
    ("transfergan", "wgan-resnet"): {**_TRANSFERGAN},
    ("scratch", "wgan-resnet"): {**_TRANSFERGAN, "lr_g": 1e-4, "lr_d": 1e-4},
    ("minegan", "biggan"): {**_MINEGAN_BIGGAN},
    ("minegan", "mnist"): {**_MINEGAN_MNIST},
    ("transfergan", "mnist"): {**_MINEGAN_MNIST, "miner_dim": None},
    ("scratch", "mnist"): {**_MINEGAN_MNIST, "miner_dim": None},
}


def preset(method: str, faithful: bool = False, arch: str = "resnet") -> dict:
    """Values of ``TrainConfig`` fields that ``method`` starts from with a source of family ``arch``, before flags.

    Raises:
        UsageError: the published settings are asked for, and none were published of this method on this family.
    """
    family = arch if arch in _FAMILIES else "gpgan"
    if not faithful:
        own = {k: v for k, v in _DEFAULTS[method].items() if family == "gpgan" or k not in _GPGAN_ONLY.get(method, ())}
        return {**own, **_FAMILIES.get(family, {})}
    if (method, family) not in _FAITHFUL:
        known = ", ".join(f"{name} on {what}" for name, what in _FAITHFUL)
        raise UsageError(
            f"--faithful: there is no publication of {method} on {family} whose settings are known here; leave it out "
            f"(there are {known})"
        )
    return dict(_FAITHFUL[method, family])
