"""Adaptive filter modulation (AdaFM) for PyTorch: ops, drop-in layers, and what serves them.

Importing the package starts no CUDA, imports no Triton, compiles nothing and loads no library: the first op does.
"""

from . import nn
from .backends import BackendChoice, use_backend, which_backend
from .functional import adafm_conv2d, adafm_conv_transpose2d, adafm_linear, modulate

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "__version__",
    "adafm_conv2d",
    "adafm_conv_transpose2d",
    "adafm_linear",
    "modulate",
    "nn",
    "use_backend",
    "which_backend",
]
