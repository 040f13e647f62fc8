"""Weights into a run (model.init), out of it (the teacher's) and from there into an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.requirements import require


def load_initial_weights(model: ScenarioCLIP, path: str | Path) -> None:
    """Fills `model` from a `save_pretrained` directory or a CLIP checkpoint.

    A ScenarioCLIP of the same variant is taken over level by level; of any other model, one pair of towers is
    copied to all levels. What is frozen may differ. UserError for another architecture.
    """
    if not Path(path).exists():
        raise UserError(f"model.init: {path} does not exist")
    ours = _is_ours(Path(path))
    if ours:
        other = ScenarioCLIP.from_pretrained(path)
    else:  # where the checkpoint does not say its activation, the config does
        other = ScenarioCLIP.from_clip(path, activation=model.config.vision.activation)
    if not ours or other.config.variant != model.config.variant:
        model.init_towers_from(other)
        return
    problems = model.config.differences(other.config, "embed_dim", "vision", "text")
    if problems:
        raise UserError(f"model.init: {path} has another architecture (here, there): {'; '.join(problems)}")
    _copy_levels(model, other, path)


@torch.no_grad()
def _copy_levels(model: ScenarioCLIP, other: ScenarioCLIP, path: str | Path) -> None:
    theirs = dict(other.named_parameters(remove_duplicate=False))
    filled: dict[int, str] = {}
    for name, mine in model.named_parameters(remove_duplicate=False):
        first = filled.setdefault(id(mine), name)
        if first == name:
            mine.copy_(theirs[name])
        elif not torch.equal(theirs[first], theirs[name]):
            raise UserError(
                f"model.init: {name} of {path} differs from {first}, but model.freeze makes the levels share it; "
                "freeze as that model did"
            )


def save_teacher(state: dict[str, Any], path: Path) -> None:
    """EMATeacher's state: the averaged tensors as safetensors; step, decay, warm-up and scope in its metadata."""
    tensors = {name: t.contiguous() for name, t in state.pop("tensors").items()}
    require("safetensors.torch").save_file(tensors, path, metadata={k: str(v) for k, v in state.items()})


@torch.no_grad()
def load_teacher(model: ScenarioCLIP, path: Path) -> None:
    """Puts the averaged weights that `save_teacher` wrote in place of `model`'s own.

    UserError where they are not there, do not fit, or are those of a part of the encoders.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run had no teacher (model.variant, loss.distillation_scale)")
    with require("safetensors").safe_open(path, "pt") as file:
        scope = (file.metadata() or {}).get("scope")
        averaged = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if scope != "all":
        raise UserError(
            f"{path} averages only the encoders that distillation asks for, not a whole model; "
            "train with loss.teacher_scope=all to evaluate the teacher"
        )
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    wrong = sorted(averaged.keys() ^ own.keys())
    wrong += [name for name in averaged.keys() & own.keys() if averaged[name].shape != own[name].shape]
    if wrong:
        raise UserError(f"{path} does not fit the model beside it: {', '.join(wrong[:5])} ({len(wrong)} tensors)")
    for name, value in averaged.items():
        own[name].copy_(value)


def _is_ours(path: Path) -> bool:
    try:
        return "variant" in json.loads((path / "config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
