"""The hash by which processes compare what they hold."""

from __future__ import annotations

import torch
from adafm_trainer.trainer.digest import state_digest


def test_digest_tells_states_apart():
    states = [
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"b": torch.zeros(4)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": [torch.zeros(2), torch.zeros(2)]},
        {"a": 0.0},
        {"a": "0.0"},
        {0: "0.0"},
        {"0": "0.0"},
        [["a"], "b"],
        [["a", "b"]],
    ]
    assert len({state_digest(state) for state in states}) == len(states)
    image = torch.randn(2, 3, 4, 4)
    assert state_digest({"x": 1, "y": image}) == state_digest(
        {"y": image.to(memory_format=torch.channels_last), "x": 1}
    )
