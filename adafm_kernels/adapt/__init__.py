"""AdaFM for networks that were written without it: ``inject``, what trains, small adapter files, and the way back.

    adafm_kernels.inject(model)             # gamma and beta into every convolution, the rest frozen
    adafm_kernels.print_trainable(model)
    adafm_kernels.merge_and_unload(model)   # plain layers again

The words are those of PEFT and loralib; neither is needed.
"""

from .injection import inject
from .merging import merge_and_unload
from .modulation import Modulation
from .trainable import (
    TrainableCounts,
    adafm_state_dict,
    load_adafm_state_dict,
    mark_only_adafm_trainable,
    print_trainable,
)

__all__ = [
    "Modulation",
    "TrainableCounts",
    "adafm_state_dict",
    "inject",
    "load_adafm_state_dict",
    "mark_only_adafm_trainable",
    "merge_and_unload",
    "print_trainable",
]
