"""Writes the tables and the figure of docs/scaling.md.

Run: python -m scenarioclip_fast.benchmarks.scaling           from the committed counts
     python -m scenarioclip_fast.benchmarks.scaling --count   runs 2, 4 and 8 ranks first, in a few minutes
     python -m scenarioclip_fast.benchmarks.scaling --check   writes nothing; fails if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from scenarioclip_fast.benchmarks.scaling import page, runs

RANKS = (2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count real runs of 2, 4 and 8 ranks")
    parser.add_argument("--check", action="store_true", help="fail if docs/scaling.md is out of date")
    args = parser.parse_args(arguments)
    if args.count:
        found = {
            ranks: {form: [vars(c) for c in counts] for form, counts in runs.run(ranks).items()} for ranks in RANKS
        }
        stored = {"parameters": runs.small_workload().parameters, "ranks": found}
        page.COUNTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    text = page.rendered()
    if args.check:
        if page.PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"error: {page.PAGE} is out of date: run python -m scenarioclip_fast.benchmarks.scaling", file=sys.stderr)
        return 1
    page.PAGE.write_text(text, encoding="utf-8")
    page.draw(page.FIGURE)
    print(f"wrote {page.PAGE} and {page.FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
