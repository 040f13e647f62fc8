"""The losses of ScenarioCLIP (arXiv 2511.20274) as modules, and a drop-in for open_clip's ClipLoss.

They depend on the ops only: importing this module imports no model, trainer or data pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive import (
    DUPLICATES,
    ExchangePlan,
    contrastive_loss,
    distributed_dot_product_loss,
    log_sums,
    multilevel_contrastive_loss,
    plan_exchange,
)
from scenarioclip_fast.ops.distillation import distillation_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SMALLEST_SCALE = 1e-6  # far below any learned scale: keeps exp of a diverged parameter from underflowing to 0
_ROUNDED_ONE = 1 - 2**-22  # a few roundings of float32 below 1


class ContrastiveLoss(nn.Module):
    """`ops.contrastive_loss` with a learnable temperature: scale = min(exp(logit_scale), max_scale).

    Args:
        init_temperature: logit_scale starts at ln(1 / init_temperature); at least 1 / max_scale.
        max_scale: upper bound of the scale; a logit_scale beyond it gets no gradient.
        duplicates, group, chunk, backend: as in `ops.contrastive_loss`.
    """

    def __init__(
        self,
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
        *,
        duplicates: str = "negatives",
        group: ProcessGroup | None = None,
        chunk: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.max_scale, self.duplicates = _validated(init_temperature, max_scale, duplicates)
        self.group, self.chunk, self.backend = group, chunk, backend
        self.logit_scale = nn.Parameter(_initial_log(init_temperature, max_scale))

    @property
    def scale(self) -> Tensor:  # []
        return self.logit_scale.exp().clamp(_SMALLEST_SCALE, self.max_scale)

    def forward(
        self,
        image: Tensor,  # [N, D]
        text: Tensor,  # [U, D]
        text_index: Tensor | None = None,  # [N] int64
        text_id: Tensor | None = None,  # [U] int64
        text_weight: Tensor | None = None,  # [U]
        plan: ExchangePlan | None = None,
    ) -> Tensor:  # []
        """Return the mean loss; arguments as in `ops.contrastive_loss`."""
        return contrastive_loss(
            image,
            text,
            self.scale,
            text_index=text_index,
            text_id=text_id,
            text_weight=text_weight,
            duplicates=self.duplicates,
            group=self.group,
            chunk=self.chunk,
            plan=plan,
            backend=self.backend,
        )


class MultiLevelContrastiveLoss(nn.Module):
    """`ops.multilevel_contrastive_loss` with a learnable temperature per level: the `LevelLoss` of the paper.

    `logit_scale[level]` is the parameter of a level, the logarithm of its scale; arguments as in `ContrastiveLoss`.
    """

    def __init__(
        self,
        levels: Sequence[str] = LEVELS,
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
        *,
        duplicates: str = "negatives",
        group: ProcessGroup | None = None,
        chunk: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.max_scale, self.duplicates = _validated(init_temperature, max_scale, duplicates)
        self.group, self.chunk, self.backend = group, chunk, backend
        self.levels = _level_names(levels)
        self.logit_scale = nn.ParameterDict(
            {level: nn.Parameter(_initial_log(init_temperature, max_scale)) for level in self.levels}
        )

    @property
    def scales(self) -> list[Tensor]:  # levels x []
        logs = torch.stack([self.logit_scale[level] for level in self.levels])
        return list(logs.exp().clamp(_SMALLEST_SCALE, self.max_scale).unbind())

    def terms(self, embeddings: Embeddings) -> Tensor:  # [levels]
        e = embeddings
        # The texts of one batch are unique: only texts of different ranks need merging.
        ids = e.text_id if self.group is not None else None
        terms: Tensor = self(e.image, e.text, e.text_index, ids, plan=getattr(e, "plan", None))
        return terms

    def plan(
        self,
        text_ids: Sequence[Tensor],  # levels x [U_l] int64, on the CPU
        rows: Sequence[int],  # levels: N_l
        *,
        width: int,
        dtype: torch.dtype,
        capacity: int,
    ) -> ExchangePlan | None:
        """Start `ops.plan_exchange` for a later call with gradients; None without a group that has a CPU backend."""
        if self.group is None or not collectives.has_cpu_backend(self.group):
            return None
        return plan_exchange(
            text_ids,
            rows,
            group=self.group,
            width=width,
            dtype=dtype,
            duplicates=self.duplicates,
            chunk=self.chunk,
            scale_gradients=any(p.requires_grad for p in self.parameters()),
            capacity=capacity,
        )

    def learned_scalars(self) -> dict[str, dict[str, Tensor]]:
        return {"logit_scale": dict(zip(self.levels, self.scales, strict=True))}

    def forward(
        self,
        images: Sequence[Tensor],  # levels x [N_l, D]
        texts: Sequence[Tensor],  # levels x [U_l, D]
        text_indices: Sequence[Tensor | None] | None = None,  # levels x [N_l] int64
        text_ids: Sequence[Tensor | None] | None = None,  # levels x [U_l] int64
        text_weights: Sequence[Tensor | None] | None = None,  # levels x [U_l]
        plan: ExchangePlan | None = None,
    ) -> Tensor:  # [levels]
        """Return the mean loss of each level; arguments as in `ops.multilevel_contrastive_loss`."""
        return multilevel_contrastive_loss(
            images,
            texts,
            self.scales,
            text_indices=text_indices,
            text_ids=text_ids,
            text_weights=text_weights,
            duplicates=self.duplicates,
            group=self.group,
            chunk=self.chunk,
            plan=plan,
            backend=self.backend,
        )


class Embeddings(Protocol):
    """The embeddings of one batch that `ScenarioLoss` reads; levels in the order of LEVELS."""

    image: list[Tensor]  # 3 x [N_l, D]
    text: list[Tensor]  # 3 x [U_l, D], the batch's unique texts
    text_index: list[Tensor]  # 3 x [N_l] int64 into U_l
    text_id: list[Tensor]  # 3 x [U_l] int64 vocabulary ids
    object_scene: Tensor  # [N_o] int64
    relation_scene: Tensor  # [N_r] int64
    action_scene: Tensor | None  # [N_a] int64, the scenes of the rows of image[0]; None: all B
    teacher_image: Tensor | None  # [B, D] global image embeddings of the teacher
    teacher_object_text: Tensor | None  # [U_o, D]
    teacher_relation_text: Tensor | None  # [U_r, D]
    # plan: optional; an `ops.ExchangePlan` that `MultiLevelContrastiveLoss.plan` returned


class LevelLoss(Protocol):
    """The per-level loss of `ScenarioLoss`: an nn.Module with a term for each level of a batch."""

    levels: tuple[str, ...]

    def terms(self, embeddings: Embeddings) -> Tensor:  # [levels]
        """Return the loss of each level, in the order of `levels`."""

    def learned_scalars(self) -> dict[str, dict[str, Tensor]]:  # name -> level -> []
        """Return the learnable scalars as the loss applies them: {"logit_scale": {"global": 14.3, ...}}.

        `ScenarioLoss` reports each as "NAME/LEVEL"; "logit_scale", the factor of the cosines, is saved with the model.
        """


class DistillationLoss(nn.Module):
    """Distillation from the teacher's embeddings of a scene to the student's embeddings of its parts, and vice versa.

    The sum of four terms: from the teacher's global image embedding to each object's and each relation's image
    embedding; from its embedding of each object's and each relation's text to the scene's global text embedding. Each
    term is a mean over the items of a scene, then over all B scenes; a scene without items adds 0 but counts in B, as
    does, in the terms of texts, a scene without an action.

    Args:
        student_temperature: T_s, or its initial value with `learn_temperature`; the published run never updates it.
        teacher_temperature: T_t.
        learn_temperature: T_s = 1 / clamp(exp(logit_scale), 1, 100) with a parameter logit_scale.
        backend: as in `ops.distillation_loss`.
    """

    def __init__(
        self,
        student_temperature: float = 0.07,
        teacher_temperature: float = 0.07,
        *,
        learn_temperature: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.01 <= student_temperature <= 1:
            raise ValueError(f"student_temperature: got {student_temperature}, expected 0.01 to 1")
        if not teacher_temperature > 0:
            raise ValueError(f"teacher_temperature: got {teacher_temperature}, expected a number above 0")
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.backend = backend
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(student_temperature))) if learn_temperature else None

    def forward(self, embeddings: Embeddings) -> Tensor:  # []
        """Return the sum of the four terms.

        Raises:
            ValueError: the embeddings lack those of the teacher.
        """
        e = embeddings
        if e.teacher_image is None or e.teacher_object_text is None or e.teacher_relation_text is None:
            raise ValueError("embeddings: got no teacher embeddings: call the model with teacher=")
        scenes = len(e.teacher_image)
        if scenes == 0:
            return (sum(x.sum() for x in e.image) + e.text[0].sum()) * 0.0
        scene = torch.cat([e.object_scene, e.relation_scene])
        items = len(scene)
        # The weight of an item: 1 / (B * number of items of its scene and level).
        group = torch.cat([e.object_scene, e.relation_scene + scenes])
        counts = torch.zeros(2 * scenes, device=scene.device).index_add_(
            0, group, torch.ones(items, device=scene.device)
        )
        weight = (scenes * counts).reciprocal()[group]
        # All four terms in one call: the rows of all terms concatenated, and pairs of indices into them.
        students = [e.image[1], e.image[2], e.text[0]]
        teachers = [e.teacher_image, e.teacher_object_text, e.teacher_relation_text]
        student_index, teacher_index, weights = [torch.arange(items, device=scene.device)], [scene], [weight]
        if len(e.text[0]):
            action, known = _actions(e, scenes)
            student_index.append((action + items)[scene])
            teacher_index += [e.text_index[1] + scenes, e.text_index[2] + (scenes + len(e.teacher_object_text))]
            weights.append(weight if known is None else weight * known[scene])
        temperature: Tensor | float = self.student_temperature
        if self.logit_scale is not None:
            temperature = (-self.logit_scale).exp().clamp(0.01, 1)
        return distillation_loss(
            torch.cat(students),
            torch.cat(teachers),
            torch.cat(student_index),
            torch.cat(teacher_index),
            torch.cat(weights),
            student_temperature=temperature,
            teacher_temperature=self.teacher_temperature,
            backend=self.backend,
        )


def _actions(e: Embeddings, scenes: int) -> tuple[Tensor, Tensor | None]:  # int64 [B], float [B]
    """The row of each scene's action in text[0], and 1 for scenes with an action, 0 for others; None: all have one."""
    if e.action_scene is None:
        return e.text_index[0], None
    row = e.text_index[0].new_zeros(scenes).index_copy(0, e.action_scene, e.text_index[0])
    known = torch.zeros(scenes, device=row.device).index_fill(0, e.action_scene, 1.0)
    return row, known


class ScenarioLoss(nn.Module):
    """The total loss of one batch: a contrastive term per level, and distillation if the batch has teacher embeddings.

    Args:
        init_temperature, max_scale, duplicates, group: for the default `contrastive`, as in `ContrastiveLoss`.
        distillation_scale: weight of the distillation; 0 disables it. At 1, the published value, the term is a mean
            over the D coordinates times T_s^2 = 0.0049: for unrelated rows, D = 512 and 128 scenes, 9e-5 of the
            contrastive loss and 4e-4 of its gradient's norm. A weight of D turns the mean into a KL divergence in nats,
            times T_s^2 as in Hinton's distillation (arXiv 1503.02531): 5 % of that loss, 19 % of its gradient.
        student_temperature, teacher_temperature: as in `DistillationLoss`.
        contrastive: the per-level loss; None: a `MultiLevelContrastiveLoss`, whose `logit_scale[level]` are the
            logarithms of the three learnable scales.
        backend: for the distillation and the default `contrastive`.

    Raises:
        ValueError: a setting out of range; a setting of the default `contrastive` together with another; levels of
            `contrastive` that are not global, object and relation, in this order.
        TypeError: `contrastive` is not an nn.Module.
    """

    def __init__(
        self,
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
        duplicates: str = "negatives",
        distillation_scale: float = 1.0,
        *,
        student_temperature: float = 0.07,
        teacher_temperature: float = 0.07,
        contrastive: LevelLoss | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not distillation_scale >= 0:
            raise ValueError(f"distillation_scale: got {distillation_scale}, expected a weight of at least 0")
        self.distillation_scale = distillation_scale
        defaults = (init_temperature, max_scale, duplicates, group) == (0.07, 100.0, "negatives", None)
        if contrastive is not None and not defaults:
            raise ValueError(
                "init_temperature, max_scale, duplicates and group configure the default per-level loss: set them on "
                "the one passed as contrastive"
            )
        if contrastive is None:
            contrastive = MultiLevelContrastiveLoss(
                LEVELS, init_temperature, max_scale, duplicates=duplicates, group=group, backend=backend
            )
        if not isinstance(contrastive, nn.Module):  # its parameters would not be trained
            raise TypeError(f"contrastive: got {type(contrastive).__name__}, expected an nn.Module")
        if (levels := tuple(getattr(contrastive, "levels", ()))) != LEVELS:
            raise ValueError(f"contrastive: got levels {list(levels)}, expected {list(LEVELS)}")
        self.contrastive: LevelLoss = contrastive
        self.distillation = DistillationLoss(student_temperature, teacher_temperature, backend=backend)

    def forward(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """Compute the loss and its terms, all 0-d.

        Returns:
            "loss" to call backward on; its terms "contrastive/LEVEL" and "distillation" (before its weight); the
            learned scalars, detached: "logit_scale/LEVEL", the factor of the cosines, by default.
        """
        terms = self.contrastive.terms(embeddings)
        loss = terms.sum()
        distillation = torch.zeros_like(loss)
        if embeddings.teacher_image is not None and self.distillation_scale > 0:
            distillation = self.distillation(embeddings)
            loss = loss + self.distillation_scale * distillation
        scalars = self.learned_scalars()
        return {
            "loss": loss,
            **{f"contrastive/{level}": t for level, t in zip(self.contrastive.levels, terms.unbind(), strict=True)},
            "distillation": distillation,
            **{f"{name}/{level}": v.detach() for name, by_level in scalars.items() for level, v in by_level.items()},
        }

    def learned_scalars(self) -> dict[str, dict[str, Tensor]]:  # name -> level -> []
        """Return the learnable scalars of the per-level loss (see `LevelLoss`)."""
        return self.contrastive.learned_scalars()


class ClipLoss(nn.Module):
    """Drop-in replacement for open_clip's ClipLoss: the same loss and gradients, without the N x N logits.

    Takes open_clip's arguments except `use_horovod` and `logit_bias`. As in open_clip, features are not normalised, and
    every rank has the same number of rows. `ops.contrastive_loss` with `group=` gives the loss of
    gather_with_grad=True; it normalises the rows.

    Args:
        local_loss: each rank computes the loss of its own rows against all ranks' features.
        gather_with_grad: gradients reach all ranks' features; otherwise only this rank's own.
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: of the default process group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # []
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # []
        """Return the loss, or {"contrastive_loss": loss} with `output_dict`.

        Args:
            image_features, text_features: this rank's rows, normalised by the caller; row i of one belongs to row i of
                the other.
            logit_scale: factor of the products, already exponentiated.
            output_dict: whether to return a dictionary.

        Raises:
            ValueError, TypeError: invalid or inconsistent arguments.
            RuntimeError: world_size is more than 1, but there is no process group.
        """
        loss = self._loss(image_features, text_features, logit_scale)
        loss = loss.to(torch.promote_types(image_features.dtype, torch.float32))
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        if self.world_size == 1:
            return _symmetric(image, text, scale)
        if self.gather_with_grad and not self.local_loss:
            # Same value, less work: every rank computes only its own rows.
            return distributed_dot_product_loss(image, text, scale, _world())
        images, texts = self._gather(image), self._gather(text)
        if not self.local_loss:
            return _symmetric(images, texts, scale)
        own = torch.arange(len(image), device=image.device) + self.rank * len(image)
        return (_rows(image, texts, scale, own) + _rows(text, images, scale, own)) / 2

    def _gather(self, x: Tensor) -> Tensor:  # [N, D] -> [world_size * N, D]
        blocks = collectives.gather_rows(
            x if self.gather_with_grad else x.detach(), [len(x)] * self.world_size, _world()
        )
        if not self.gather_with_grad and not self.local_loss:
            blocks[self.rank] = x
        return torch.cat(blocks)


def _world() -> ProcessGroup:
    if dist.group.WORLD is None:
        raise RuntimeError("world_size: got more than 1, but torch.distributed.init_process_group was not called")
    return dist.group.WORLD


def _symmetric(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    row, column, positive = log_sums(image, text, scale, normalize=False)
    return (row.mean() + column.mean()) / 2 - positive.mean()


def _rows(x: Tensor, others: Tensor, scale: Tensor | float, own: Tensor) -> Tensor:
    row, _, positive = log_sums(x, others, scale, text_index=own, normalize=False)
    return (row - positive).mean()


def _validated(init_temperature: float, max_scale: float, duplicates: str) -> tuple[float, str]:
    for name, value in (("init_temperature", init_temperature), ("max_scale", max_scale)):
        if not isinstance(value, Real):
            raise TypeError(f"{name}: got {value!r}, expected a number above 0")
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    if init_temperature == math.inf:
        raise ValueError("init_temperature: got inf, expected a finite number above 0")
    if init_temperature * max_scale < _ROUNDED_ONE:
        raise ValueError(
            f"init_temperature: got {init_temperature}, expected at least 1 / max_scale = {1 / max_scale}: beyond "
            "max_scale the temperature gets no gradient; raise max_scale or init_temperature"
        )
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates: got {duplicates!r}, expected one of {', '.join(map(repr, DUPLICATES))}")
    return max_scale, duplicates


def _initial_log(init_temperature: float, max_scale: float) -> Tensor:  # []
    # float32's exp(log(100)) is above 100, where the clamp passes no gradient; and exp differs in the last bits between
    # devices, hence the margin.
    bound = math.log(max_scale * _ROUNDED_ONE)
    log = torch.tensor(min(-math.log(init_temperature), bound))
    return log if log.item() <= bound else torch.nextafter(log, log.new_tensor(-math.inf))


def _level_names(levels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise TypeError(f"levels: got {levels!r}, expected a list of names")
    names = tuple(levels)
    if not names:
        raise ValueError("levels: got no names, expected at least one")
    parameters = nn.ParameterDict()
    for name in names:
        if not isinstance(name, str) or not name or "." in name or hasattr(parameters, name):
            raise ValueError(
                f"levels: got {name!r}, expected names of parameters: text without '.' that is no attribute of "
                "nn.ParameterDict"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"levels: got {list(names)}, expected different names: each level has its own parameter")
    return names
