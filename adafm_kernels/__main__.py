"""``python -m adafm_kernels``: the report of ``adafm_kernels.doctor``."""

import sys

from .doctor import main

sys.exit(main())
