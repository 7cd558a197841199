"""`python -m adafm_trainer.cli`: the `adafm` command, in the form that `torchrun -m` starts."""

from . import main

raise SystemExit(main())
