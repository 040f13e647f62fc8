"""The loss modules against the formulas of the paper, computed scene by scene."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import reference
from torch import Tensor, nn

from scenarioclip_fast.losses import (
    LEVELS,
    ClipLoss,
    ContrastiveLoss,
    DistillationLoss,
    MultiLevelContrastiveLoss,
    ScenarioLoss,
)

D = 24


def batch(
    objects: list[int], relations: list[int], seed: int = 0, teacher: bool = True, actions: list[int] | None = None
) -> SimpleNamespace:
    """Embeddings in float64 of one batch with these numbers of objects and relations per scene, with repeated texts.

    actions: the scenes that have an action; None: all.
    """
    g = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        return torch.randn(n, D, dtype=torch.float64, generator=g, requires_grad=True)

    counts = [len(objects) if actions is None else len(actions), sum(objects), sum(relations)]
    ids, index = [], []
    for n in counts:
        used, inverse = torch.unique(torch.randint(4, (n,), generator=g), return_inverse=True)
        ids.append(used)
        index.append(inverse)
    text = [rows(len(used)) for used in ids]
    return SimpleNamespace(
        image=[rows(n) for n in counts],
        text=text,
        text_index=index,
        text_id=ids,
        object_scene=torch.repeat_interleave(torch.arange(len(objects)), torch.tensor(objects)),
        relation_scene=torch.repeat_interleave(torch.arange(len(relations)), torch.tensor(relations)),
        action_scene=None if actions is None else torch.tensor(actions, dtype=torch.int64),
        teacher_image=rows(len(objects)).detach() if teacher else None,
        teacher_object_text=rows(len(text[1])).detach() if teacher else None,
        teacher_relation_text=rows(len(text[2])).detach() if teacher else None,
    )


def kl(teacher: Tensor, student: Tensor, temperature: float = 0.07) -> Tensor:
    p = (teacher / 0.07).softmax(0).clamp_min(1e-8)
    return temperature**2 * F.kl_div((student / temperature).log_softmax(0), p, reduction="batchmean")


def distillation_scene_by_scene(e: Any, temperature: float = 0.07) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    scenes = len(e.teacher_image)
    actions = list(range(scenes)) if e.action_scene is None else e.action_scene.tolist()
    for level, scene, texts in (
        (1, e.object_scene, e.teacher_object_text),
        (2, e.relation_scene, e.teacher_relation_text),
    ):
        for b in range(scenes):
            items = (scene == b).nonzero()[:, 0].tolist()
            if not items:
                continue
            vision = [kl(e.teacher_image[b], e.image[level][i], temperature) for i in items]
            language = []
            if b in actions:
                caption = e.text[0][e.text_index[0][actions.index(b)]]
                language = [kl(texts[e.text_index[level][i]], caption, temperature) for i in items]
            total = total + (sum(vision) + sum(language)) / len(items) / scenes
    return total


def naive_terms(e: Any, s: float) -> list[Tensor]:
    return [reference.naive_loss(x, y[i], s) for x, y, i in zip(e.image, e.text, e.text_index, strict=True)]


@pytest.mark.parametrize(
    ("objects", "relations", "actions"),
    [
        ([3, 1, 4], [2, 1, 1], None),
        ([2, 0, 5], [0, 0, 3], None),
        ([1], [1], None),
        ([2, 2], [0, 0], None),
        ([3, 1, 4, 2], [2, 1, 1, 0], [1, 3]),
        ([3, 1, 4], [2, 1, 1], []),
    ],
)
def test_scenario_loss(objects: list[int], relations: list[int], actions: list[int] | None) -> None:
    e = batch(objects, relations, actions=actions)
    module = ScenarioLoss().double()
    out = module(e)
    assert set(out) == {"loss", "distillation", *(f"{k}/{v}" for k in ("contrastive", "logit_scale") for v in LEVELS)}
    assert all(v.dim() == 0 for v in out.values())
    terms = [
        t if len(x) else torch.zeros((), dtype=torch.float64)
        for t, x in zip(naive_terms(e, 1 / 0.07), e.image, strict=True)
    ]
    distillation = distillation_scene_by_scene(e)
    # The parameter is the logarithm of the scale in float32.
    close = {"rtol": 1e-6, "atol": 1e-8}
    for level, term in zip(LEVELS, terms, strict=True):
        torch.testing.assert_close(out[f"contrastive/{level}"], term, **close)
        torch.testing.assert_close(out[f"logit_scale/{level}"].item(), 1 / 0.07, **close)
    torch.testing.assert_close(out["distillation"], distillation, **close)
    leaves = [*e.image, *e.text]
    expected = torch.autograd.grad(sum(terms) + distillation, leaves, allow_unused=True)
    found = torch.autograd.grad(out["loss"], [*leaves, *module.parameters()])
    for f, w in zip(found, expected, strict=False):
        torch.testing.assert_close(f, torch.zeros_like(f) if w is None else w, rtol=1e-6, atol=1e-7)


def test_distillation_of_a_scene_without_objects() -> None:
    """It adds 0 but counts as a scene: if half of the scenes are empty, the loss is half as large."""
    e = batch([2, 0], [1, 0])
    full = SimpleNamespace(**vars(e))
    full.image = [e.image[0][:1], *e.image[1:]]
    full.text_index = [e.text_index[0][:1], *e.text_index[1:]]
    full.teacher_image = e.teacher_image[:1]
    loss = DistillationLoss()
    torch.testing.assert_close(2 * loss(e), loss(full))


def test_distillation_is_optional_and_weighted() -> None:
    e = batch([2, 3], [1, 1])
    contrastive = sum(ScenarioLoss()(e)[f"contrastive/{level}"] for level in LEVELS)
    distillation = ScenarioLoss()(e)["distillation"]
    torch.testing.assert_close(ScenarioLoss(distillation_scale=0.5)(e)["loss"], contrastive + 0.5 * distillation)
    for module, embeddings in (
        (ScenarioLoss(distillation_scale=0.0), e),
        (ScenarioLoss(), batch([2, 3], [1, 1], teacher=False)),
    ):
        out = module(embeddings)
        torch.testing.assert_close(out["loss"], contrastive)
        assert out["distillation"] == 0
    with pytest.raises(ValueError, match="call the model with teacher="):
        DistillationLoss()(batch([1], [1], teacher=False))


def test_teacher_gets_no_gradient() -> None:
    e = batch([2, 3], [1, 1])
    for name in ("teacher_image", "teacher_object_text", "teacher_relation_text"):
        getattr(e, name).requires_grad_()
    ScenarioLoss()(e)["loss"].backward()
    assert e.teacher_image.grad is None and e.teacher_object_text.grad is None
    assert all(x.grad is not None for x in (*e.image, *e.text))


def test_learnable_student_temperature() -> None:
    e = batch([2, 3], [1, 1])
    module = DistillationLoss(0.2, learn_temperature=True).double()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    expected = distillation_scene_by_scene(e, temperature)  # type: ignore[arg-type]
    found = module(e)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (by_temperature,) = torch.autograd.grad(expected, temperature)
    (by_log,) = torch.autograd.grad(found, list(module.parameters()))
    torch.testing.assert_close(by_log, -0.2 * by_temperature, rtol=1e-5, atol=0)
    assert not list(DistillationLoss().parameters())


def test_temperatures() -> None:
    image, text = torch.randn(20, D), torch.randn(20, D)
    module = ContrastiveLoss(init_temperature=0.1, max_scale=50.0)
    torch.testing.assert_close(module(image, text), reference.naive_loss(image, text, 10.0))
    module(image, text).backward()
    assert module.logit_scale.grad.abs() > 0
    # Clamped: the loss is that of the largest scale, without a gradient.
    with torch.no_grad():
        module.logit_scale.fill_(math.log(80.0))
    module.zero_grad()
    loss = module(image, text)
    torch.testing.assert_close(loss, reference.naive_loss(image, text, 50.0))
    loss.backward()
    assert module.logit_scale.grad == 0
    levels = MultiLevelContrastiveLoss(("a", "b"))
    levels([image, image], [text, text]).sum().backward()
    assert {n: p.grad is not None for n, p in levels.named_parameters()} == {
        "logit_scale.a": True,
        "logit_scale.b": True,
    }


def test_diverged_temperature_is_clamped() -> None:
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    for module in (ContrastiveLoss(), MultiLevelContrastiveLoss(["global"])):
        with torch.no_grad():
            next(module.parameters()).fill_(-1e30)
        loss = module(x, x) if isinstance(module, ContrastiveLoss) else module([x], [x])
        torch.testing.assert_close(loss.squeeze(), torch.tensor(5.0).log())


def test_duplicates_reach_the_op() -> None:
    e = batch([4, 4], [2, 2], teacher=False)
    found = ScenarioLoss(duplicates="positives").double()(e)["contrastive/object"]
    expected = reference.naive_positives_loss(e.image[1], e.text[1], 1 / 0.07, e.text_index[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_weights_reach_the_op() -> None:
    e = batch([2, 3], [1, 1])
    image, text, index = e.image[1], torch.cat([e.text[1], e.text[2]]), e.text_index[1]  # the last texts have no rows
    weight = torch.arange(1.0, len(text) + 1)
    logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / 0.07
    columns = F.cross_entropy(logits[:, index].T, torch.arange(len(image)))
    rows = F.cross_entropy(logits + weight.log(), index) + weight[index].log().mean()
    # The parameter is the logarithm of the scale in float32.
    close = {"rtol": 1e-6, "atol": 1e-8}
    loss = ContrastiveLoss().double()
    torch.testing.assert_close(loss(image, text, index, text_weight=weight), (rows + columns) / 2, **close)
    losses = MultiLevelContrastiveLoss(["a", "b"]).double()
    found = losses([image, image], [text, text], [index, index], text_weights=[weight, None])
    torch.testing.assert_close(found, torch.stack([(rows + columns) / 2, loss(image, text, index)]), **close)


def test_compiles_without_graph_break() -> None:
    e = batch([2, 3], [1, 1])
    module = ScenarioLoss()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(e)["loss"], module(e)["loss"])


def test_clip_loss_equals_open_clip() -> None:
    g = torch.Generator().manual_seed(0)
    for length in (1.0, 3.0):  # features are not normalised
        x, y = (length * F.normalize(torch.randn(33, D, generator=g), dim=1) for _ in range(2))
        leaves = [x.requires_grad_(), y.requires_grad_(), torch.tensor(8.0, requires_grad=True)]
        found, expected = ClipLoss()(*leaves), reference.open_clip_loss(*leaves)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))
        torch.testing.assert_close(ClipLoss()(*leaves, output_dict=True), {"contrastive_loss": expected})
        every_option = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)  # no effect on one rank
        torch.testing.assert_close(every_option(*leaves), expected)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ClipLoss(world_size=2)(*leaves)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastiveLoss(init_temperature=0.0), "init_temperature: got 0.0, expected a number above 0"),
        (lambda: ContrastiveLoss(init_temperature=math.inf), "init_temperature: got inf, expected a finite number"),
        (
            lambda: ContrastiveLoss(init_temperature=0.1, max_scale=5.0),
            "got 0.1, expected at least 1 / max_scale = 0.2",
        ),
        (lambda: ContrastiveLoss(max_scale=-1.0), "max_scale: got -1.0, expected a number above 0"),
        (lambda: MultiLevelContrastiveLoss(()), "levels: got no names, expected at least one"),
        (lambda: MultiLevelContrastiveLoss(("a", "a")), r"levels: got \['a', 'a'\], expected different names"),
        (lambda: MultiLevelContrastiveLoss(("a.b",)), r"levels: got 'a\.b', expected names of parameters"),
        (lambda: MultiLevelContrastiveLoss(("keys",)), "levels: got 'keys', expected names of parameters"),
        (lambda: MultiLevelContrastiveLoss((1,)), "levels: got 1, expected names of parameters"),  # type: ignore
        (lambda: ScenarioLoss(duplicates="drop"), "duplicates: got 'drop', expected one of 'negatives', 'positives'"),
        (lambda: ScenarioLoss(distillation_scale=-1.0), "distillation_scale: got -1.0, expected a weight"),
        (lambda: DistillationLoss(student_temperature=2.0), "student_temperature: got 2.0, expected 0.01 to 1"),
        (lambda: DistillationLoss(teacher_temperature=0.0), "teacher_temperature: got 0.0, expected a number above 0"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastiveLoss("0.07"), "init_temperature: got '0.07', expected a number above 0"),  # type: ignore
        (lambda: ContrastiveLoss(max_scale=None), "max_scale: got None, expected a number above 0"),  # type: ignore
        (lambda: MultiLevelContrastiveLoss("global"), "levels: got 'global', expected a list of names"),
        (lambda: MultiLevelContrastiveLoss(None), "levels: got None, expected a list of names"),  # type: ignore
    ],
)
def test_settings_of_another_type(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("scale", [100.0, 49.0, 14.3, 1.0])
def test_a_start_at_the_largest_scale_is_trained(scale: float) -> None:
    """exp(log(scale)) must not exceed the bound by rounding."""
    x, y = torch.randn(2, 20, D, generator=torch.Generator().manual_seed(0))
    for module in (ContrastiveLoss(1 / scale, scale), MultiLevelContrastiveLoss(["a", "b", "c"], 1 / scale, scale)):
        loss = module(x, y) if isinstance(module, ContrastiveLoss) else module([x] * 3, [y] * 3)
        loss.sum().backward()
        assert all(p.grad.abs() > 0 for p in module.parameters())
        torch.testing.assert_close(next(module.parameters()).exp().item(), scale, rtol=2e-6, atol=0)


class CosineLoss(nn.Module):
    """Another per-level loss: 1 - weight * mean cosine, with a learnable weight per level."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = LEVELS
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def terms(self, e: Any) -> Tensor:
        cosines = [F.cosine_similarity(x, y[i]).mean() for x, y, i in zip(e.image, e.text, e.text_index, strict=True)]
        return 1 - self.weight * torch.stack(cosines)

    def learned_scalars(self) -> dict[str, dict[str, Tensor]]:
        return {"weight": dict(zip(self.levels, self.weight.unbind(), strict=True))}


def test_another_level_loss() -> None:
    e = batch([2, 3], [1, 1])
    module = ScenarioLoss(contrastive=CosineLoss())
    out = module(e)
    assert [f"{out[f'weight/{level}']:.0f}" for level in LEVELS] == ["1", "2", "3"]
    assert not any(out[f"weight/{level}"].requires_grad for level in LEVELS)
    terms = module.contrastive.terms(e)
    torch.testing.assert_close(out["loss"], terms.sum() + out["distillation"])
    torch.testing.assert_close(out["contrastive/object"], terms[1])
    out["loss"].backward()
    assert (module.contrastive.weight.grad != 0).all()
    assert list(module.state_dict()) == ["contrastive.weight"]
    with pytest.raises(TypeError, match=r"contrastive: got SimpleNamespace, expected an nn\.Module"):
        ScenarioLoss(contrastive=SimpleNamespace(levels=LEVELS))  # type: ignore[arg-type]


def test_learned_scalars() -> None:
    module = ScenarioLoss(init_temperature=0.2, max_scale=5.0)
    with torch.no_grad():
        module.contrastive.logit_scale["object"].fill_(math.log(6.0))
    assert list(module.state_dict()) == [f"contrastive.logit_scale.{level}" for level in LEVELS]
    scalars = module.learned_scalars()
    assert {name: list(values) for name, values in scalars.items()} == {"logit_scale": list(LEVELS)}
    assert scalars["logit_scale"]["object"] == 5.0, "clamped, as the loss applies it"


@pytest.mark.parametrize("option", [{"init_temperature": 0.1}, {"max_scale": 50.0}, {"duplicates": "positives"}])
def test_settings_of_the_default_loss_beside_another_loss(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="configure the default per-level loss: set them on the one"):
        ScenarioLoss(contrastive=MultiLevelContrastiveLoss(), **option)


@pytest.mark.parametrize("levels", [("relation", "object", "global"), ("global", "object")])
def test_levels_of_another_loss(levels: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"contrastive: got levels \[.*\], expected \['global', 'object', 'relation'\]"
    ):
        ScenarioLoss(contrastive=MultiLevelContrastiveLoss(levels))
    with pytest.raises(ValueError, match=r"contrastive: got levels \[\]"):
        ScenarioLoss(contrastive=nn.Linear(1, 1))  # type: ignore[arg-type]
