"""The EMA teacher: what it averages, its decay, and what it shares with the student."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig


def make(freeze: FreezeConfig | None = None, variant: str = "scenarioclip1", embed_dim: int = 12) -> ScenarioCLIP:
    torch.manual_seed(0)
    return ScenarioCLIP(
        ModelConfig(
            variant=variant,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            vision=VisionConfig(image_size=16, patch_size=8, width=24, layers=2, heads=3),
            text=TextConfig(context_length=8, vocab_size=31, width=16, layers=2, heads=2),
            freeze=freeze or FreezeConfig(1, 1),
        )
    )


def perturb(model: ScenarioCLIP) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def test_window_grows_linearly_from_one_step_to_full_width() -> None:
    teacher = EMATeacher(make(), decay=0.9995, warmup=2000)
    assert teacher.decay_at(0) == 0
    for step in (1, 500, 1999, 2000, 10**6):
        window = 1 / (1 - teacher.decay_at(step))
        assert window == pytest.approx(1 + min(step / 2000, 1) * 1999)
    # With the published values this is the mean of all steps, up to one part in 2000.
    assert teacher.decay_at(700) == pytest.approx(1 - 1 / 701, abs=1e-6)
    assert EMATeacher(make(), decay=0.9, warmup=0).decay_at(0) == pytest.approx(0.9)


@pytest.mark.parametrize("scope", ["distillation", "all"])
def test_average_follows_the_student(scope: str) -> None:
    model = make()
    teacher = EMATeacher(model, decay=0.8, warmup=4, scope=scope)  # type: ignore[arg-type]
    tensors = teacher.state_dict()["tensors"]
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    distilled = ("vision.global.", "text.object.", "text.relation.")
    assert set(tensors) == {name for name in trainable if scope == "all" or name.startswith(distilled)}
    expected = {name: p.clone() for name, p in tensors.items()}
    for step in range(6):
        perturb(model)
        student = dict(model.named_parameters(remove_duplicate=False))
        decay = teacher.decay_at(step)
        expected = {name: decay * p + (1 - decay) * student[name].detach() for name, p in expected.items()}
        teacher.update(model)
    assert teacher.step == 6
    for name, p in tensors.items():
        assert not p.requires_grad
        torch.testing.assert_close(p, expected[name])


def test_frozen_weights_are_the_students_own() -> None:
    model = make()
    teacher = EMATeacher(model)
    averaged, student = teacher.encoders["vision.global"], model.vision["global"]
    assert averaged.blocks[0].expand.weight is student.blocks[0].expand.weight
    assert averaged.blocks[1].expand.weight is not student.blocks[1].expand.weight
    assert model.vision["global"].blocks[1].expand.weight.requires_grad
    unfrozen = make(FreezeConfig(1, 1, pre_layernorm=False))
    assert "vision.global.pre_norm.weight" in EMATeacher(unfrozen).state_dict()["tensors"]


def test_average_follows_replaced_and_copied_models() -> None:
    """The parameters that an update found are not those of a model that has been copied or assigned others."""
    model = make()
    teacher = EMATeacher(model, decay=0.0, warmup=0)
    teacher.update(model)
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()}, assign=True)
    copied = copy.deepcopy(teacher)
    pickle.dumps(copied._student)
    for each in (teacher, copied):
        each.update(model)
        name, average = next(iter(each._tensors.items()))
        torch.testing.assert_close(average, dict(model.named_parameters(remove_duplicate=False))[name].detach())
    owner = weakref.ref(model)
    del model
    gc.collect()
    assert owner() is None


def test_averaged_swaps_the_weights_and_restores_them() -> None:
    model = make()
    teacher = EMATeacher(model, decay=0.5, warmup=0, scope="all")
    perturb(model)
    teacher.update(model)
    pixels, tokens = torch.randn(2, 3, 16, 16), [[29, 3, 30], [29, 4, 4, 30]]
    own = model.encode_image(pixels, "relation"), model.encode_text(tokens, "global")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    averaged_text = _text(teacher, tokens, "object")
    with teacher.averaged(model) as averaged:
        averaged_image = averaged.encode_image(pixels, "global")
        torch.testing.assert_close(averaged.encode_text(tokens, "object"), averaged_text)
        assert not torch.allclose(averaged.encode_image(pixels, "relation"), own[0])
    torch.testing.assert_close(teacher.encode_image(pixels), averaged_image)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert torch.equal(model.encode_text(tokens, "global"), own[1])


def _text(teacher: EMATeacher, tokens: list[list[int]], level: str) -> torch.Tensor:
    from scenarioclip_fast.model.tokens import pack

    return teacher.encoders[f"text.{level}"](*pack(tokens, torch.device("cpu")))


@pytest.mark.parametrize("variant", ["scenarioclip1", "pyramidclip"])
def test_state_survives_a_checkpoint(variant: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = make(variant=variant)
    teacher = EMATeacher(model, decay=0.8, warmup=4)
    for _ in range(3):
        perturb(model)
        teacher.update(model)
    torch.save({"model": model.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = make(variant=variant)
    fresh.load_state_dict(state["model"])
    other = EMATeacher(fresh, decay=0.8, warmup=4)
    other.load_state_dict(state["teacher"])
    perturb(model)
    fresh.load_state_dict(model.state_dict())
    for t, m in ((teacher, model), (other, fresh)):
        t.update(m)
    assert teacher.step == other.step == 4
    for name, p in teacher.state_dict()["tensors"].items():
        assert torch.equal(p, other.state_dict()["tensors"][name]), name


def test_bad_states_and_settings_are_rejected() -> None:
    teacher = EMATeacher(make())
    with pytest.raises(UserError, match=r"missing \['text.global.*got scope 'distillation', expected 'all'"):
        EMATeacher(make(), scope="all").load_state_dict(teacher.state_dict())
    with pytest.raises(
        UserError, match=r"teacher.vision.global.head.out_norm.weight: got shape \[12\], expected \[8\]"
    ):
        state = teacher.state_dict()
        name = "vision.global.head.out_norm.weight"
        small = EMATeacher(make(embed_dim=8))
        state["tensors"] = {**small.state_dict()["tensors"], name: state["tensors"][name]}
        small.load_state_dict(state)
    with pytest.raises(UserError, match="teacher decay: got 1"):
        EMATeacher(make(), decay=1.0)
    with pytest.raises(UserError, match="teacher warm-up: got -1 updates"):
        EMATeacher(make(), warmup=-1)
