"""Run `scenarioclip-fast` in forks of a process that has imported everything, so that runs start fast.

Each line of JSON is a request. {"args": [...], "env": {...}, "directory": PATH, "log": PATH, "keys": PATH or null,
"poisoned": [STEP, ...], "file_limit": BYTES or null, "compile_backend": NAME or null, "restored": PATH or null} starts
a run; the answer is its process id.
{"wait": PID, "seconds": S} waits for one; the answer is its exit code (negative: the signal), or null after S seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from typing import Any, NoReturn

import instant_clip_tokenizer  # noqa: F401  # runs import these lazily
import safetensors.torch  # noqa: F401
import simplejpeg  # noqa: F401
import torch._dynamo  # noqa: F401  # imported by the first optimizer; takes a second
import yaml  # noqa: F401
from instruments import instrument

from scenarioclip_fast.cli import main


def run(request: dict[str, Any]) -> NoReturn:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    os.chdir(request["directory"])
    if request["file_limit"] is not None:  # writing a larger file fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    instrument(request["keys"], request["poisoned"], request["compile_backend"], request["restored"])
    code = 1
    try:
        code = main.main(request["args"])
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    request = json.loads(line)
    if "wait" in request:
        answer = wait(request["wait"], request["seconds"])
    else:
        answer = os.fork()
        if answer == 0:
            run(request)
    print(json.dumps(answer), flush=True)
