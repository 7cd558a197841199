"""The Adam of TensorFlow 1 from PyTorch's: the same rule with epsilon outside the bias correction.

TensorFlow: ``theta -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``. PyTorch (Kingma and Ba, ICLR 2015,
algorithm 1): ``theta -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``. Multiplying the second fraction by
``sqrt(1 - b2^t)`` shows that they are one rule if PyTorch is given ``eps / sqrt(1 - b2^t)`` at step t: 3.2 times larger
at t = 1 for b2 = 0.9, equal in the limit. ``torch.optim.Adam`` has no option for it, but reads ``eps`` at every step.
"""

from __future__ import annotations

import math
from typing import Any


def tf_epsilon(group: dict[str, Any], step: int) -> None:
    """Set ``group["eps"]`` so that an Adam's next step, its ``step``-th, is the one of TensorFlow 1.

    The epsilon that the group came with stays in ``group["tf_eps"]`` and so in the optimizer's state dictionary. To be
    called for every parameter group before every step. Steps that the optimizer skips do not count in its own t; one
    that is counted here all the same makes epsilon smaller by ``sqrt((1 - b2^t) / (1 - b2^(t+1)))``, which is nothing
    against ``sqrt(v)`` anywhere but near zero gradients in the first steps. A captured CUDA graph keeps the epsilon of
    its capture: capture after ``1 - b2^t`` has rounded to 1, or do not capture.

    Args:
        group: parameter group of ``torch.optim.Adam``.
        step: counted from 1.

    Raises:
        ValueError: ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"step is {step}; an optimizer's first step is 1")
    epsilon = group.setdefault("tf_eps", group["eps"])
    group["eps"] = epsilon / math.sqrt(1 - group["betas"][1] ** step)
