"""Turn the JSON of `adafm bench` into the Markdown table that README shows: python benchmarks/render.py FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from adafm_trainer.bench.step import table

TABLES = {"step": table}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python benchmarks/render.py FILE.json", file=sys.stderr)
        return 2
    result = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(TABLES[result["name"]](result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
