"""The training loop, its run directory and its checkpoints."""
