"""What the ranks of a run must agree on, as plain values for `World.check_same`.

Ranks that differ in any of it would hang in a collective, or mix different models in one checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scenarioclip_fast import dispatch
from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.data.mix import ShardMix
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.train.config import TrainConfig

SAME_DATA = "give all ranks the same packed data sets, in the same order"
SAME_BACKENDS = "use the same installation, the same kind of device and the same SCENARIOCLIP_FAST_BACKEND on all ranks"
SAME_WEIGHTS = "give all ranks the same files"

# Keys that may differ between ranks, because no number of the run depends on them. All others must be equal, also those
# that matter on rank 0 only: a rank that was given another value was started with another command.
PER_RANK = (
    "run.device",  # each rank has its own; the type of the device is compared
    "data.shards",  # copies on local disks may have other paths; their contents are compared
    "data.threads",  # these resources of a host change no pixel
    "data.prefetch",
    "data.cache_gib",
    "data.shard_cache_dir",
    "data.shard_cache_gib",
)
_SAMPLED = 8  # values of each tensor, from both ends


def settings(config: TrainConfig, resume: object) -> dict[str, Any]:
    """The config without the keys of PER_RANK, and what to resume from."""
    values = {key: value for key, value in flat(config.to_dict()).items() if key not in PER_RANK}
    values["run.dir"] = os.path.abspath(config.run.dir)  # ranks may have other working directories
    return {"--resume": "no" if resume is False else "auto" if resume is True else str(resume), **values}


def loading(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a LoaderConfig, without those of PER_RANK."""
    return {f"data.{key}": value for key, value in values.items() if f"data.{key}" not in PER_RANK}


def data_sets(shards: ShardMix) -> dict[str, Any]:
    """The scenes, their order and their weights."""
    sets = shards.identities()
    return {
        "the number of scenes in data.shards": [entry["scenes"] for entry in sets],
        "the checksum of the keys in data.shards": [f"{entry['keys']:08x}" for entry in sets],
        "the checksum of the contents of data.shards": [f"{entry['shards']:08x}" for entry in sets],
        "the weights in data.shards": [float(entry["weight"]) for entry in sets],
        **vocabulary(shards.vocabulary),
    }


def vocabulary(texts: Vocabulary) -> dict[str, Any]:
    """The texts of all levels, and their tokens."""
    return {"the checksum of the vocabulary": f"{texts.checksum():08x}"}


def backends(device_type: str, dtype: str = "float32") -> dict[str, Any]:
    """The backend of each op, whose choice depends on what is installed."""
    return {f"the backend of {op}": dispatch.choice(op, device_type, dtype) for op in dispatch.BACKENDS}


def weights(module: nn.Module) -> dict[str, Any]:
    """A checksum of some values of each tensor, which tells files of weights apart."""
    tensors = module.state_dict().values()
    ends = [t.detach().flatten()[i].double() for t in tensors for i in (slice(_SAMPLED), slice(-_SAMPLED, None))]
    digest = hashlib.sha256(torch.cat(ends).cpu().numpy().tobytes()).hexdigest() if ends else ""
    return {"the checksum of the weights": digest[:16]}
