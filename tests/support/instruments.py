"""Observe and disturb the training runs of tests.

As a program: `scenarioclip-fast`, which logs its scenes to the file KEYS and its process id to KEYS.RANK, and waits
PAUSE_S seconds after each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.cli import main
from scenarioclip_fast.train import saving, sharding, trainer


def instrument(
    keys: str | None,
    poisoned: Sequence[int] = (),
    compile_backend: str | None = None,
    restored: str | None = None,
    pause_s: float = 0.0,
) -> None:
    """Log each step and this rank's scenes to `keys`; make the pixels of some steps NaN; replace Inductor; save all
    tensors of the run to `restored` when a checkpoint has been loaded; wait after each step.
    """
    train_step, compile_module, restore = trainer.Trainer.train_step, torch.nn.Module.compile, saving.Saver.restore

    if compile_backend is not None:

        def compile_with_backend(module: torch.nn.Module, **options: Any) -> None:
            compile_module(module, **{**options, "backend": compile_backend})

        torch.nn.Module.compile = compile_with_backend  # type: ignore[method-assign,assignment]

    def instrumented(self: trainer.Trainer, batch: Any) -> None:
        if self.step + 1 in poisoned:
            batch.pixels.fill_(float("nan"))
        train_step(self, batch)
        if keys is not None:
            with open(keys, "a") as file:
                file.write(json.dumps([self.step, batch.keys]) + "\n")
        time.sleep(pause_s)

    def restore_and_save(self: saving.Saver, resume: saving.Resume) -> list[str]:
        notes = restore(self, resume)
        tensors = self.state.tensors() | self.state.optimizer_tensors()
        whole = {name: sharding.whole_tensor(t) for name, t in tensors.items()}
        if self.world.is_main_process:
            torch.save(whole, restored)
        return notes

    trainer.Trainer.train_step = instrumented  # type: ignore[method-assign]
    if restored is not None:
        saving.Saver.restore = restore_and_save  # type: ignore[method-assign]


if __name__ == "__main__":
    Path(f"{os.environ['KEYS']}.{os.environ['RANK']}").write_text(str(os.getpid()))
    instrument(os.environ["KEYS"], pause_s=float(os.environ.get("PAUSE_S", "0")))
    sys.exit(main.main())
