"""`adafm bench`: measurements on this machine."""

from __future__ import annotations

import sys

from ..bench import curves, op, step

_WHAT = {"op": op, "step": step, "curves": curves}


def main(argv: list[str]) -> int:
    rows = "\n".join(f"  {name:6} {module.__doc__.splitlines()[0]}" for name, module in _WHAT.items())
    usage = (
        f"usage: adafm bench {{{','.join(_WHAT)}}} [flags]\n\n{rows}\n\nadafm bench op --help lists the flags of one."
    )
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not argv or argv[0] not in _WHAT:
        print(usage, file=sys.stderr)
        return 2
    return _WHAT[argv[0]].main(argv[1:])
