"""An exponential moving average (EMA) of the student's trainable weights, for distillation and evaluation."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.compile import compile_blocks
from scenarioclip_fast.model.encoders import Packing
from scenarioclip_fast.model.scenarioclip import ScenarioCLIP
from scenarioclip_fast.ops import ema_update_

# The encoders that distillation uses: of whole images, object names and relation texts.
_DISTILLATION = ("vision.global", "text.object", "text.relation")


class EMATeacher:
    """Averages the student's trainable weights; frozen ones are the student's own tensors.

    After update t (t = 0, 1, ...) the teacher is decay_t teacher + (1 - decay_t) student, with
        decay_t = 1 - 1 / (1 + min(t / warmup, 1) (1 / (1 - decay) - 1)),
    so that the window 1 / (1 - decay_t) grows linearly from one step to its full width over `warmup` updates, and the
    initial weights drop out at the first update. With the published 0.9995 and 2000 this equals, up to 1 part in 2000,
    Mean Teacher's min(1 - 1 / (t + 1), decay) (arXiv 1703.01780): first the mean of all steps, then the moving average.

    Args:
        model: the student, on its device; build the teacher after the student's weights are loaded and moved.
        decay: of the moving average, in [0, 1).
        warmup: number of updates until `decay` is reached.
        scope: "distillation" averages the three encoders that distillation uses; "all" averages all encoders, so that
            `averaged` gives a fully averaged model, at twice the memory and traffic.

    Raises:
        UserError: `decay` or `warmup` out of range.
    """

    def __init__(
        self,
        model: ScenarioCLIP,
        decay: float = 0.9995,
        warmup: int = 2000,
        scope: Literal["distillation", "all"] = "distillation",
    ) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"teacher decay: got {decay}, expected 0 <= decay < 1")
        if warmup < 0:
            raise UserError(f"teacher warm-up: got {warmup} updates, expected 0 or more")
        if scope not in ("distillation", "all"):
            raise ValueError(f"scope: got {scope!r}, expected 'distillation' or 'all'")
        self.decay, self.warmup, self.scope, self.step = decay, warmup, scope, 0
        encoders = {
            f"{kind}.{level}": encoder for kind in ("vision", "text") for level, encoder in getattr(model, kind).items()
        }
        if scope == "distillation":
            encoders = {name: encoders[name] for name in _DISTILLATION}
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.encoders: dict[str, Any] = copy.deepcopy(encoders, frozen)
        self._tensors: dict[str, Tensor] = {}
        # The model of the last update, and the module and name of each of its averaged parameters.
        self._student: tuple[weakref.ref[ScenarioCLIP], list[tuple[weakref.ref[nn.Module], str]]] | None = None
        seen: set[int] = set()
        for prefix, encoder in self.encoders.items():
            for name, p in encoder.named_parameters():
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    self._tensors[f"{prefix}.{name}"] = p.requires_grad_(False)

    def refresh(self) -> None:
        """Look up the averaged tensors again after FSDP2 has replaced them with sharded ones."""
        now = {f"{prefix}.{name}": p for prefix, e in self.encoders.items() for name, p in e.named_parameters()}
        self._tensors = {name: now[name] for name in self._tensors}
        self._student = None

    def decay_at(self, step: int) -> float:
        """Return the decay of update number `step`, counted from 0."""
        ramp = min(step / self.warmup, 1.0) if self.warmup else 1.0
        return 1 - 1 / (1 + ramp * (1 / (1 - self.decay) - 1))

    @torch.no_grad()
    def update(self, model: ScenarioCLIP) -> None:
        """Move the average towards the student; call it after each optimizer step."""
        teacher, student = self._pairs(model)
        ema_update_(teacher, student, self.decay_at(self.step))
        self.step += 1

    @torch.no_grad()
    def restart(self, model: ScenarioCLIP) -> None:
        """Reset the average to the student's current weights."""
        ema_update_(*self._pairs(model), 0.0)
        self.step = 0

    @torch.no_grad()
    def encode_image(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Run the averaged global vision encoder from stage `start` on (0: pixels [n, 3, S, S]): [n, D]."""
        return self.encoders["vision.global"].run(x, start=start)

    @torch.no_grad()
    def encode_text(self, x: Tensor, packing: Packing, level: str, *, start: int = 0) -> Tensor:
        """Run the averaged text encoder of `level` from stage `start` on (0: token ids [T]): [n, D]."""
        return self.encoders[f"text.{level}"].run(x, packing, start=start)

    @contextlib.contextmanager
    def averaged(self, model: ScenarioCLIP) -> Iterator[ScenarioCLIP]:
        """Swap the averaged weights (those in `scope`) into the model for the duration of the context."""
        pairs = list(zip(*self._pairs(model), strict=True))
        _swap(pairs)
        try:
            yield model
        finally:
            _swap(pairs)

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` the teacher's blocks: see `model.compile.compile_blocks`."""
        encoders = nn.ModuleDict({k.replace(".", "_"): v for k, v in self.encoders.items()})
        compile_blocks(encoders, **options)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "decay": self.decay,
            "warmup": self.warmup,
            "scope": self.scope,
            "tensors": {name: p.detach() for name, p in self._tensors.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the step and the averaged tensors; `decay` and `warmup` stay as constructed.

        Raises:
            UserError: tensors are missing, unexpected or of another shape.
        """
        tensors = state["tensors"]
        missing = sorted(self._tensors.keys() - tensors.keys())
        extra = sorted(tensors.keys() - self._tensors.keys())
        if missing or extra:
            raise UserError(
                f"the teacher's state does not match: missing {missing[:5]} ({len(missing)}), extra {extra[:5]} "
                f"({len(extra)}); got scope {state['scope']!r}, expected {self.scope!r}"
            )
        for name, p in self._tensors.items():
            if p.shape != tensors[name].shape:
                raise UserError(f"teacher.{name}: got shape {list(tensors[name].shape)}, expected {list(p.shape)}")
            p.copy_(tensors[name])
        self.step = int(state["step"])

    def _pairs(self, model: ScenarioCLIP) -> tuple[list[Tensor], list[Tensor]]:
        if self._student is None or self._student[0]() is not model:  # naming all parameters takes milliseconds
            owners = {
                f"{prefix}.{name}" if prefix else name: (weakref.ref(module), name)
                for prefix, module in model.named_modules(remove_duplicate=False)
                for name in module._parameters
            }
            self._student = weakref.ref(model), [owners[name] for name in self._tensors]
        student = []
        for owner, name in self._student[1]:
            module = owner()
            assert module is not None
            parameter = module._parameters[name]
            assert parameter is not None
            student.append(parameter.detach())
        return list(self._tensors.values()), student

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_student": None}


def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for teacher, student in pairs:
        kept = teacher.clone()
        teacher.copy_(student)
        student.copy_(kept)
