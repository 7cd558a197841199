"""How each kind of golden file is recomputed and compared; ``tests/golden/README.md`` describes the files."""
