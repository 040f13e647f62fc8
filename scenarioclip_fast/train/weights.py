"""The initial weights of a run (model.init), and the file of the teacher's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.requirements import require


def load_initial_weights(model: ScenarioCLIP, path: str | Path) -> None:
    """Load `model` from a `save_pretrained` directory or a CLIP checkpoint.

    A ScenarioCLIP of the same variant is copied level by level; from any other model, one pair of towers is copied to
    all levels. model.freeze may differ.

    Raises:
        UserError: the path does not exist or has another architecture.
    """
    if not Path(path).exists():
        raise UserError(f"model.init: {path} does not exist")
    is_scenarioclip = _is_scenarioclip(Path(path))
    if is_scenarioclip:
        other = ScenarioCLIP.from_pretrained(path)
    else:  # the activation applies if the checkpoint does not record its own
        other = ScenarioCLIP.from_clip(path, activation=model.config.vision.activation)
    if not is_scenarioclip or other.config.variant != model.config.variant:
        model.init_towers_from(other)
        return
    problems = model.config.differences(other.config, "embed_dim", "vision", "text")
    if problems:
        raise UserError(f"model.init: {path} has another architecture (config, file): {'; '.join(problems)}")
    _copy_levels(model, other, path)


@torch.no_grad()
def _copy_levels(model: ScenarioCLIP, other: ScenarioCLIP, path: str | Path) -> None:
    source = dict(other.named_parameters(remove_duplicate=False))
    filled: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = filled.setdefault(id(p), name)
        if first == name:
            p.copy_(source[name])
        elif not torch.equal(source[first], source[name]):
            raise UserError(
                f"model.init: {name} of {path} differs from {first}, but model.freeze makes the levels share it; "
                "set model.freeze as in that model"
            )


def save_teacher(state: dict[str, Any], path: Path) -> None:
    """Write EMATeacher's state: the averaged tensors as safetensors; step, decay, warm-up and scope as metadata."""
    tensors = {name: t.contiguous() for name, t in state.pop("tensors").items()}
    require("safetensors.torch").save_file(tensors, path, metadata={k: str(v) for k, v in state.items()})


@torch.no_grad()
def load_teacher(model: ScenarioCLIP, path: Path) -> None:
    """Replace the weights of `model` with the averages that `save_teacher` wrote.

    Raises:
        UserError: the file does not exist, does not match, or has averages of only some encoders.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run had no teacher (model.variant, loss.distillation_scale)")
    with require("safetensors").safe_open(path, "pt") as file:
        scope = (file.metadata() or {}).get("scope")
        averaged = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if scope != "all":
        raise UserError(
            f"{path} averages only the encoders that distillation uses, not the whole model; "
            "train with loss.teacher_scope=all to evaluate the teacher"
        )
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    wrong = sorted(averaged.keys() ^ own.keys())
    wrong += [name for name in averaged.keys() & own.keys() if averaged[name].shape != own[name].shape]
    if wrong:
        raise UserError(f"{path} does not match the model next to it: {', '.join(wrong[:5])} ({len(wrong)} tensors)")
    for name, value in averaged.items():
        own[name].copy_(value)


def _is_scenarioclip(path: Path) -> bool:
    try:
        return "variant" in parse_json((path / "config.json").read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
