"""Adaptive filter modulation (AdaFM) for PyTorch: ops, drop-in layers, and what serves them.

Importing the package starts no CUDA, imports no Triton, compiles nothing and loads no library: the first op does.
"""

from . import _ops_arena as _ops_arena
from . import nn
from .adam import FusedAdam
from .adapt import (
    adafm_state_dict,
    inject,
    load_adafm_state_dict,
    mark_only_adafm_trainable,
    merge_and_unload,
    print_trainable,
)
from .backends import BackendChoice, use_backend, which_backend
from .family import modulate_lowrank, modulate_many, modulate_normalized, modulate_per_sample
from .functional import adafm_conv2d, adafm_conv_transpose2d, adafm_linear, modulate
from .plan import ModulationPlan
from .plan_adam import PlanAdam

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "FusedAdam",
    "ModulationPlan",
    "PlanAdam",
    "__version__",
    "adafm_conv2d",
    "adafm_conv_transpose2d",
    "adafm_linear",
    "adafm_state_dict",
    "inject",
    "load_adafm_state_dict",
    "mark_only_adafm_trainable",
    "merge_and_unload",
    "modulate",
    "modulate_lowrank",
    "modulate_many",
    "modulate_normalized",
    "modulate_per_sample",
    "nn",
    "print_trainable",
    "use_backend",
    "which_backend",
]
