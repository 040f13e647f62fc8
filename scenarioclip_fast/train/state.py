"""The state of a run, as named tensors for a checkpoint, and its progress."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scenarioclip_fast.data import SceneLoader
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.parsing import are_numbers
from scenarioclip_fast.train.checkpoint import TensorEntry
from scenarioclip_fast.train.optim import trained_parameters

SUMMARY_STEPS = 10  # number of losses in the means of a run's summary
# Number of losses in the mean that ranks checkpoints: single steps are noisy, and a fixed number makes means comparable
# whatever the checkpoint interval.
_BEST_OVER_STEPS = 100


@dataclass
class Progress:
    """The progress of a run, over all its processes and resumes."""

    step: int = 0
    scenes: int = 0
    views: int = 0
    skipped: int = 0  # steps without an update
    skipped_in_row: int = 0
    bad_samples: int = 0  # found so far, over all ranks
    first_losses: list[float] = field(default_factory=list)
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=_BEST_OVER_STEPS))

    @property
    def last_losses(self) -> list[float]:
        return list(self.recent_losses)[-SUMMARY_STEPS:]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "recent_losses": list(self.recent_losses)}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Restore what `to_dict` returned; fields that an earlier version did not save keep their values.

        Raises:
            TypeError: a value is not a number, or not a list of numbers, as it should be.
        """
        for name in (f.name for f in fields(self) if f.name in values):
            value = values[name]
            is_count = isinstance(getattr(self, name), int)
            if not (isinstance(value, int) if is_count else isinstance(value, list) and are_numbers(*value)):
                raise TypeError(f"progress.{name}: expected {'an integer' if is_count else 'a list of numbers'}")
            setattr(self, name, deque(value, _BEST_OVER_STEPS) if name == "recent_losses" else value)


@dataclass
class RunState:
    """Everything needed to resume a run."""

    model: ScenarioCLIP
    loss: ScenarioLoss
    teacher: EMATeacher | None
    optimizer: Optimizer
    loader: SceneLoader
    progress: Progress

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and averages, which are global, under names that do not depend on wrappers."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        found |= {f"loss/{name}": t for name, t in self.loss.state_dict().items()}
        if self.teacher is not None:
            found |= {f"teacher/{name}": t for name, t in self.teacher.state_dict()["tensors"].items()}
        return found

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state as "optimizer/PARAMETER/KEY"; empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, p in self._trained():
            for key, value in self.optimizer.state.get(p, {}).items():
                if not isinstance(value, Tensor):
                    kind = type(self.optimizer).__name__
                    raise TypeError(
                        f"{kind}: state {key!r} is {value!r}, expected a tensor, because checkpoints save only tensors"
                    )
                found[f"{name}/{key}"] = value
        return found

    def empty_optimizer_tensors(self, saved: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        """Return tensors to load the optimizer state of a checkpoint into; `saved` lists the checkpoint's tensors.

        Only the checkpoint knows the keys: an optimizer creates its state in its first step.
        """
        keys: dict[str, list[str]] = defaultdict(list)
        for full in saved:
            if full.startswith("optimizer/"):
                name, _, key = full.rpartition("/")
                keys[name].append(key)
        found: dict[str, Tensor] = {}
        for name, p in self._trained():
            for key in keys[name]:
                size, dtype = saved[f"{name}/{key}"]
                like_parameter = size == p.shape and p.ndim > 0  # then also sharded like it
                found[f"{name}/{key}"] = (
                    torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                    if like_parameter
                    else torch.zeros(size, dtype=dtype)  # load_state_dict moves it to the optimizer's device
                )
        return found

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the filled `empty_optimizer_tensors` into the optimizer; its hyperparameters stay as configured."""
        keys: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            keys[name][key] = tensor
        index = {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        state = {index[p]: keys[name] for name, p in self._trained() if name in keys}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _trained(self) -> list[tuple[str, Tensor]]:
        parameters = trained_parameters(self.model, self.loss)
        return [(f"optimizer/{name.replace('.', '/', 1)}", p) for name, p in parameters]
