"""Runs `scenarioclip-fast` in forks of one process that has imported everything: a run starts in no time.

A line of JSON asks for a run or waits for one: {"args": [...], "env": {...}, "log": PATH, "keys": PATH or null,
"poisoned": [STEP, ...], "file_limit": BYTES or null} is answered with its process id, {"wait": PID, "seconds": S} with
its exit code (negative: the signal), or null.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from typing import Any, NoReturn

import instant_clip_tokenizer  # noqa: F401  # like the next ones, what runs import later on
import safetensors.torch  # noqa: F401
import simplejpeg  # noqa: F401
import torch._dynamo  # noqa: F401  # by the first optimiser: a second
import yaml  # noqa: F401

from scenarioclip_fast.cli import main
from scenarioclip_fast.train import trainer


def run(request: dict[str, Any]) -> NoReturn:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    if request["file_limit"] is not None:  # a larger file cannot be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    meddle(request["keys"], request["poisoned"])
    code = 1
    try:
        code = main.main(request["args"])
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def meddle(keys: str | None, poisoned: list[int]) -> None:
    """Appends each step and the scenes that this rank sees in it to a file; spoils the pixels of some steps."""
    train_step = trainer.Trainer.train_step

    def meddled(self: trainer.Trainer, batch: Any) -> None:
        if self.step + 1 in poisoned:
            batch.pixels.fill_(float("nan"))
        train_step(self, batch)
        if keys is not None:
            with open(keys, "a") as file:
                file.write(json.dumps([self.step, batch.keys]) + "\n")

    trainer.Trainer.train_step = meddled  # type: ignore[method-assign]


def wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.01)
    return ended[pid]


ended: dict[int, int] = {}
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        answer = wait(asked["wait"], asked["seconds"])
    else:
        answer = os.fork()
        if answer == 0:
            run(asked)
    print(json.dumps(answer), flush=True)
