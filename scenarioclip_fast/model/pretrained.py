"""Save, load and initialise models: this package's own format, CLIP checkpoints and the published code's checkpoints.

Nothing here builds a model, so that `ScenarioCLIP` can import it: the functions return a config and tensors, or load
into existing modules. Weights are always loaded strictly.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from scenarioclip_fast.checksums import SUMS, verify_sums, write_sums
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model import convert
from scenarioclip_fast.model.config import Activation, ModelConfig
from scenarioclip_fast.model.convert import EncoderWeights, State, shorten
from scenarioclip_fast.model.files import find_weights, read_json, read_state, state_dict_of, unpickle
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

SCHEMA = 1
MODEL_FILES = ("model.safetensors", "config.json")


def save_pretrained(
    state: Mapping[str, Tensor], config: ModelConfig, directory: str | Path, scales: Mapping[str, float] | None = None
) -> None:
    """Write `model.safetensors`, `config.json` and their checksums, `SHA256SUMS`, into `directory`.

    scales: the learned logit scale of each level; stored in config.json for exports.

    Raises:
        UserError: an unknown level, or a scale that is not a finite number above 0.
    """
    factors = {level: float(scale) for level, scale in (scales or {}).items()}
    if problem := _scales_problem(factors):
        raise UserError(problem)
    safetensors = require("safetensors.torch")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    safetensors.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    record = {"schema": SCHEMA, "model": config.to_dict(), "scales": factors}
    (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # safetensors makes it private
    write_sums(directory, MODEL_FILES)


def verify(directory: str | Path, names: Iterable[str] = MODEL_FILES) -> None:
    """Compare files of a saved model with their checksums; warn if it has none, as those of earlier versions.

    Raises:
        UserError: a file is damaged or was changed.
    """
    if not verify_sums(Path(directory), names):
        warnings.warn(f"{directory} has no {SUMS}, so damage to its files cannot be detected", stacklevel=2)


def read_config(directory: str | Path) -> ModelConfig:
    """Read the config that `save_pretrained` wrote."""
    path = Path(directory) / "config.json"
    if not path.exists() and (inner := Path(directory) / "model" / "config.json").is_file():
        raise UserError(f"{directory} is a run directory: expected its model, {inner.parent}")
    record = read_json(path)
    if record.get("schema") != SCHEMA or "model" not in record:
        raise UserError(
            f"{path}: got schema {short(record.get('schema'))}, expected {SCHEMA} and a key 'model'; "
            "use from_clip for a plain CLIP, from_reference for a checkpoint of the method's published code"
        )
    with _errors_prefixed_by(path):
        return ModelConfig.from_dict(record["model"])


def load_saved(module: nn.Module, directory: str | Path) -> None:
    """Load the `model.safetensors` that `save_pretrained` wrote."""
    path = Path(directory) / "model.safetensors"
    load_strictly(module, read_state(path), str(path))


def read_scales(directory: str | Path) -> dict[str, float]:
    """Read the `scales` passed to `save_pretrained`; empty if none."""
    path = Path(directory) / "config.json"
    scales = read_json(path).get("scales", {})
    if problem := _scales_problem(scales):
        raise UserError(f"{path}: {problem}")
    return scales


def _scales_problem(scales: object) -> str | None:
    good = isinstance(scales, dict) and all(
        level in LEVELS and type(v) in (int, float) and 0 < v < math.inf for level, v in scales.items()
    )
    return None if good else f"scales: got {scales!r}, expected a finite factor above 0 for each of {', '.join(LEVELS)}"


def read_clip(path: Path, activation: Activation | None = None) -> EncoderWeights:
    """Read the encoders of a Hugging Face or open_clip CLIP, the same at every level. See `ScenarioCLIP.from_clip`."""
    file = find_weights(path)
    # Training checkpoints prefix the names with "module.".
    state = {name.removeprefix("module."): value for name, value in read_state(file).items()}
    if convert.is_open_clip(state):
        config_file = file.parent / "open_clip_config.json"
        record = read_json(config_file) if config_file.is_file() else None
        with _errors_prefixed_by(file):
            return convert.from_open_clip(state, record, activation)
    if convert.is_hugging_face(state):
        record = read_json(file.parent / "config.json")
        with _errors_prefixed_by(file):
            return convert.from_hugging_face(state, record)
    raise UserError(
        f"{file}: not a CLIP checkpoint (no 'visual.*' of open_clip, no 'vision_model.*' of Hugging Face among "
        f"its {len(state)} tensors, which start with {sorted(state)[:3]})"
    )


def read_reference(path: Path, teacher: bool = False, heads: tuple[int, int] | None = None) -> EncoderWeights:
    """Read the encoders of a published checkpoint. See `ScenarioCLIP.from_reference`."""
    record = unpickle(path)
    if teacher:
        ema = record.get("ema")
        weights = ema.get("teacher_state") if isinstance(ema, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{path}: no EMA teacher (expected ema.teacher_state); pass teacher=False")
        record = weights
    state = state_dict_of(record, path)
    with _errors_prefixed_by(path):
        return convert.from_published(state, heads)


def load_encoders(kind: str, encoders: nn.ModuleDict, states: Mapping[str, State], path: Path) -> None:
    """Load the encoders of all levels; raise UserError if `states` differ in tensors that the levels share."""
    trainable = {name for name, p in encoders["global"].named_parameters() if p.requires_grad}
    for level, state in states.items():
        for name, value in state.items():
            first = states["global"].get(name)
            if name in trainable or first is value:
                continue
            if first is None or not torch.equal(first, value):
                raise UserError(
                    f"{path}: {kind} encoder, {name}: frozen by the config, but it differs between 'global' and "
                    f"{level!r}; pass a `freeze` that trains it"
                )
        load_strictly(encoders[level], state, f"{path}: {kind} encoder of level {level!r}")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; one error lists missing, unexpected, misshapen and non-float tensors.

    source: prefix of the error.
    """
    own = module.state_dict()
    shared = sorted(own.keys() & state.keys())
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} ({list(state[name].shape)}, expected {list(own[name].shape)})"
            for name in shared
            if state[name].shape != own[name].shape
        ],
        # load_state_dict would copy the integers of quantised weights as if they were values.
        "not floats": [f"{name} ({v.dtype})" for name, v in sorted(state.items()) if not v.is_floating_point()],
    }
    found = [f"{problem} {shorten(names)}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"{source}: tensors do not match the model: {'; '.join(found)}")
    module.load_state_dict(cast(State, state))


@contextlib.contextmanager
def _errors_prefixed_by(path: Path) -> Iterator[None]:
    """Prefix errors with the file's path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
