"""Uses the GPU for the first time and writes the description of the machine for the record.

Run: python describe.py OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu.sections import REHEARSAL

from scenarioclip_fast.bench import machine


def main() -> None:
    if REHEARSAL:
        description = machine.describe_rehearsal()
    else:
        import torch

        torch.ones(1, device="cuda").add_(1).item()
        description = machine.describe("cuda")
    Path(sys.argv[1]).write_text(json.dumps(description))


if __name__ == "__main__":
    main()
