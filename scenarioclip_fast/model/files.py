"""Read checkpoint files without running code: safetensors, and pickles through `weights_only=True`."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import check_expansion, open_file
from scenarioclip_fast.model.convert import State, shorten
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.requirements import require

_INDEX = ".index.json"  # of a sharded checkpoint
_WEIGHT_FILES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
    "open_clip_pytorch_model.bin",
)


def find_weights(path: Path) -> Path:
    """Return the weights file `path`, or the first known one in the directory `path`."""
    if path.is_file():
        return path
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    problem = "contains none of " + ", ".join(_WEIGHT_FILES) if path.is_dir() else "no such file or directory"
    raise UserError(f"{path}: {problem}")


def read_state(path: Path) -> State:
    """Read the tensors of a safetensors file, a pickle, or the index of a sharded checkpoint."""
    if path.name.endswith(_INDEX):
        shards = read_json(path).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name or name.endswith(_INDEX) for name in names):
            raise UserError(f"{path}: expected a weight_map from tensors to files in the same directory")
        return {name: value for shard in names for name, value in read_state(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch")
        return _guarded(lambda: safetensors.load_file(path), path)
    return state_dict_of(unpickle(path), path)


def unpickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of tensors and plain values."""
    with warnings.catch_warnings():
        # _guarded raises a clear error for such files.
        warnings.filterwarnings("ignore", ".*looks like a TorchScript archive", UserWarning)
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        record = _guarded(lambda: _load(path), path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: got a {type(record).__name__}, expected a dictionary of tensors")
    return record


def _load(path: Path) -> Any:
    with open_file(path) as file:
        check_expansion(file)
        return torch.load(file, map_location="cpu", weights_only=True)


def state_dict_of(record: dict[str, Any], path: Path) -> State:
    """Return the state dict under `state_dict` of a training checkpoint, or `record` itself."""
    record = record.get("state_dict", record)
    if not isinstance(record, dict):
        raise UserError(f"{path}: state_dict: got a {type(record).__name__}, expected a dictionary of tensors")
    wrong = [str(name) for name, value in record.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: expected a dictionary of tensors, but {shorten(sorted(wrong))} are not tensors")
    return dict(record)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        record = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: got a {type(record).__name__}, expected an object")
    return record


def _guarded(read: Callable[[], Any], path: Path) -> Any:
    """Call `read`; convert the errors of unreadable files to UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return read()
    except pickle.UnpicklingError as error:
        # Only the reason: torch's full message explains how to run the code.
        found = re.search(r"WeightsUnpickler error:\s+(.+)", str(error))
        reason = found[1].partition(". ")[0] if found else "torch.load rejects it"
        raise UserError(
            f"{path}: refused: it has more than tensors and plain values, and reading it could run code ({reason}); "
            "save only its state_dict, preferably as safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError) as error:
        # Files that are not pickles raise any of these.
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: refused: a TorchScript archive (like OpenAI's own files), and reading it could run code; "
                "use the same weights in Hugging Face or open_clip form"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    except Exception as error:
        # Matched by module name, because safetensors may not be installed.
        if type(error).__module__.startswith("safetensors"):
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        raise
