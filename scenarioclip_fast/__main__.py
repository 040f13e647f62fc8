"""`python -m scenarioclip_fast`: the command line, also for `torchrun -m scenarioclip_fast train`."""

from __future__ import annotations

import sys

from scenarioclip_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m scenarioclip_fast"))
