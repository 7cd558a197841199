"""Settings by method: the default recipe and, under ``--faithful``, those of the published experiments."""

from __future__ import annotations

METHODS = ("adafm", "transfergan", "scratch")

_DEFAULTS: dict[str, dict] = {
    "adafm": {"freeze_g": 4, "batch": 8, "steps": 1200},
    "transfergan": {"batch": 8, "steps": 1200},
    "scratch": {"lr_g": 1e-3, "lr_d": 1e-3, "r1_gamma": 30.0, "saturation": 0.1, "data_scale": 0.95, "ema": 0.999},
}

# Zhao, Cong and Carin (ICML 2020), released code: Adam 1e-4 with betas (0, 0.99), penalty 10 on reals at every step
# without the factor one half, average 0.999 from the first step, gamma and beta released after iteration index 10000.
_PUBLISHED = {
    "lr_g": 1e-4,
    "lr_d": 1e-4,
    "lr_head": 1e-4,
    "lr_gamma": 1e-4,
    "lr_beta": 1e-4,
    "warmup": 0,
    "r1_gamma": 20.0,
    "r1_interval": 1,
    "ema": 0.999,
    "ema_ramp": False,
    "flip": True,
    "dither": True,
    "copy": "gmdn",
    "source_weights": "raw",
    "saturation": 0.0,
    "data_scale": 1.0,
    "steps": 60000,
    "tick": 500,
    "snap": 5000,
    "batch": 16,
    "faithful": True,
}
_FAITHFUL: dict[str, dict] = {
    "adafm": {**_PUBLISHED, "head": "new", "freeze_g": 4, "freeze_d": 2, "adafm_start": 10001},
    "transfergan": {**_PUBLISHED, "freeze_g": 4, "freeze_d": 2},
    "scratch": {**_PUBLISHED},
}


def preset(method: str, faithful: bool = False) -> dict:
    """Values of ``TrainConfig`` fields that a method starts from, before flags are applied."""
    return dict((_FAITHFUL if faithful else _DEFAULTS)[method])
