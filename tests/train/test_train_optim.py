from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train import optim
from scenarioclip_fast.train.config import OptimSection
from scenarioclip_fast.train.optim import (
    GroupRule,
    ParamGroup,
    build_optimizer,
    guarded_step,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.6))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("decay_scale", [False, True])
def test_weight_decay_applies_to_matrices_only(decay_scale: bool) -> None:
    model, loss = make_model(), Temperature()
    optimizer = build_optimizer(model, loss, OptimSection(decay_logit_scale=decay_scale))
    matrices, vectors, temperatures = optimizer.param_groups
    decays = [group["weight_decay"] for group in (matrices, vectors, temperatures)]
    assert decays == [0.2, 0.0, 0.2 if decay_scale else 0.0]
    assert [id(p) for p in matrices["params"]] == [id(model[0].weight)]
    assert [id(p) for p in temperatures["params"]] == [id(loss.logit_scale)]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in (*model.parameters(), *loss.parameters()) if p.requires_grad}


def test_the_first_rule_that_matches_a_parameter_applies() -> None:
    parameters = [(name, p) for name, p in make_model().named_parameters()]
    rules = [GroupRule(r"0\..*", 0.1, min_dims=2, lr_multiple=0.5), GroupRule(r"9\..*", 0.3), GroupRule(r".*", 0.0)]
    first, last = parameter_groups(parameters, rules)  # no parameter matches the second rule
    assert (first["weight_decay"], len(first["params"])) == (0.1, 1)
    assert (last["weight_decay"], len(last["params"])) == (0.0, 5)
    optimizer = torch.optim.SGD([first, last], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamv", r"optim\.name: got 'adamv', did you mean adamw\? expected one of adamw, sgd"),
        ("AdamW", r"did you mean adamw\?"),
        ("lbfgs-b", r"optim\.name: got 'lbfgs-b', expected one of adamw, sgd"),
    ],
)
def test_an_unknown_optimizer(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(make_model(), Temperature(), OptimSection(name=name))


def test_the_rate_matches_torchs_linear_and_cosine_schedules() -> None:
    config, total = OptimSection(lr=0.5, warmup=0.1), 50
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=45),
        ],
        milestones=[5],
    )
    for step in range(total):
        # torch's schedules multiply their factors step by step and collect rounding errors
        assert learning_rate(step, total, config) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert learning_rate(total, total, config) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 1, OptimSection(warmup=0.0)) == OptimSection().lr


def backward(model: nn.Module, scale: float) -> Tensor:
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    loss: Tensor = (model(x).square().sum() + model[0].weight.sum()) * scale
    loss.backward()
    return loss


def adagrad(groups: list[ParamGroup], config: OptimSection) -> torch.optim.Optimizer:
    """An optimizer without a fused kernel, whose steps `guarded_step` must undo."""
    return torch.optim.Adagrad(groups, lr=config.lr, fused=False)


@pytest.fixture(autouse=True)
def register_adagrad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optim.OPTIMIZERS, "adagrad", adagrad)


NAMES = ["adamw", "sgd", "adagrad"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-3, 10.0])  # below and above the clipping norm
def test_a_step_matches_torchs_clipping_and_optimizer(name: str, scale: float) -> None:
    model, reference = make_model(), make_model()
    config = OptimSection(name=name, lr=1e-2, weight_decay=0.2)
    guarded = build_optimizer(model, Temperature(), config)
    groups = [
        {"params": [reference[0].weight], "weight_decay": 0.2},
        {"params": [reference[0].bias, *reference[1].parameters(), reference[2].bias], "weight_decay": 0.0},
    ]
    plain: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, fused=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, fused=False),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=1e-2),
    }[name]()
    for _ in range(3):
        norm, skipped = guarded_step(guarded, backward(model, scale), 1.0)
        backward(reference, scale)
        expected = nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.requires_grad], 1.0)
        plain.step()
        plain.zero_grad()
        assert not skipped
        torch.testing.assert_close(norm, expected)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        # a few float32 roundings: guarded_step divides by the norm's ratio, torch multiplies by its inverse
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", ["loss", "nan", "inf"])
def test_a_non_finite_step_changes_nothing(bad: str, name: str) -> None:
    model = make_model()
    optimizer = build_optimizer(model, Temperature(), OptimSection(name=name, lr=0.1))
    guarded_step(optimizer, backward(model, 1.0), 1.0)
    weights = [p.clone() for p in model.parameters()]
    states = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()}
    loss = backward(model, 1.0)
    if bad == "loss":
        loss = loss * math.inf
    else:
        model[0].weight.grad[1, 2] = float(bad)
    _, skipped = guarded_step(optimizer, loss, 1.0)
    assert skipped
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, after)
    for k, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(states[k][n], v) for n, v in state.items())  # including the step count
    _, skipped = guarded_step(optimizer, backward(model, 1.0), 1.0)
    assert not skipped
    assert not torch.equal(weights[0], model[0].weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_first_step_leaves_a_clean_state(name: str) -> None:
    models = make_model(), make_model()
    for model in models:
        optimizer = build_optimizer(model, Temperature(), OptimSection(name=name, lr=0.1, weight_decay=0.0))
        if model is models[1]:
            guarded_step(optimizer, backward(model, math.nan), 1.0)
        guarded_step(optimizer, backward(model, 1.0), 1.0)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov without a fused kernel"])
def test_the_host_does_not_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        optim.OPTIMIZERS,
        "nesterov without a fused kernel",
        lambda groups, config: torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=False),
    )

    class RecordOps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    model = make_model()
    optimizer = build_optimizer(model, Temperature(), OptimSection(name=name))
    loss = backward(model, 10.0)
    with RecordOps():
        guarded_step(optimizer, loss, 1.0)
    assert any(f"_fused_{name}_" in op for op in seen) or name not in ("adamw", "sgd")
    assert not any("_local_scalar_dense" in op or "nonzero" in op for op in seen)
