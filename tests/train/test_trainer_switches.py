"""Options that must change only memory and speed, and the evaluation of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import open_checkpoint
from scenarioclip_fast.model import EMATeacher, ModelConfig, ScenarioCLIP, graphs
from scenarioclip_fast.model.encoders import Block, VisionBlock
from scenarioclip_fast.model.graphs import bucket
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.converters import CONVERTERS
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]
# Towers of different widths, as in ViT-B/32, with two blocks each, the first one frozen.
FROZEN = (
    "model.text.width=16",
    "model.text.layers=2",
    "model.vision.layers=2",
    "model.freeze.text_blocks=1",
    "model.freeze.vision_blocks=1",
    "model.freeze.pre_layernorm=true",
)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


def test_activation_checkpointing_does_not_change_the_loss(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast.model import encoders

    plain, saving = (
        small("train.steps=3", *FROZEN, f"train.activation_checkpointing={x}", run=x) for x in ("false", "true")
    )
    calls: list[Any] = []
    checkpoint = encoders.checkpoint
    monkeypatch.setattr(
        encoders, "checkpoint", lambda stage, *a, **k: calls.append(stage) or checkpoint(stage, *a, **k)
    )
    Trainer(plain).fit()
    assert not calls
    Trainer(saving).fit()
    # The trained block of each of the six encoders, in three steps; frozen blocks have no backward pass.
    assert len(calls) == 18 and all(isinstance(stage, Block) for stage in calls)
    # The same operations in the same order.
    assert losses(saving) == losses(plain)


def test_compiled_blocks_do_not_change_the_loss(
    small: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[torch.nn.Module] = []
    compile_module = torch.nn.Module.compile

    def capture(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(module)
        # Dynamo's graphs without Inductor, which would take minutes. With fullgraph, exceeding the recompile limit is
        # an error, not a silent fallback to eager.
        compile_module(module, **{**options, "backend": "eager", "fullgraph": True})

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    torch._dynamo.reset()
    plain = small("train.steps=3", *FROZEN, "train.compile=auto", run="plain")  # on a CPU
    fast = small("train.steps=3", *FROZEN, "train.compile=true", "train.accumulate=2", run="fast")
    Trainer(plain).fit()
    assert not compiled and "are compiled" not in capsys.readouterr().err
    trainer = Trainer(fast)
    trainer.fit()
    assert "the transformer blocks are compiled: the first steps may take minutes" in capsys.readouterr().err
    # Two blocks of each of six encoders, and of the teacher's three.
    assert len(set(map(id, compiled))) == 18
    with torch.inference_mode():  # a later evaluation in the same process stays below the limit
        pixels = torch.randn(3, 3, 32, 32)
        trainer.model.encode_text(trainer.vocabulary.tokens("object"), "object")
        assert torch.isfinite(trainer.model.encode_image(pixels, "relation")).all()
    # The same operations, some decomposed, and sums over microbatches: roundings differ.
    torch.testing.assert_close(losses(fast), losses(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("switch", ["train.accumulate=1", "train.accumulate=2", "run.precision=bf16"])
def test_replayed_vision_encoders_do_not_change_the_loss(
    small: Make, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    """`model.graphs` without the capture itself: padding, fixed memory, gradients, microbatches and the teacher."""
    monkeypatch.setattr(graphs._Graph, "_capture", capture_on_the_cpu)
    rows: list[int] = []
    forward = VisionBlock.forward

    def note(block: VisionBlock, x: torch.Tensor, *rest: Any) -> Any:
        rows.append(x.shape[0])
        return forward(block, x, *rest)

    monkeypatch.setattr(VisionBlock, "forward", note)
    curves = []
    for name in ("plain", "graphs"):
        config = small("train.steps=4", *FROZEN, switch, run=name)
        rows.clear()
        trainer = Trainer(config)
        if name == "graphs":
            monkeypatch.setitem(CONVERTERS, "cuda_graphs", graph_all)
        trainer.fit()
        curves.append(losses(config))
        assert all(n == bucket(n) for n in rows) == (name == "graphs")
    encoder = next(trainer.model.encoders())
    assert encoder.replay is not None and copy.deepcopy(encoder).replay is None
    # Products of more rows may sum in another order: roundings differ.
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-2 if "bf16" in switch else 1e-5, atol=0)


def graph_all(model: ScenarioCLIP, teacher: EMATeacher | None, *_: Any) -> None:
    assert teacher is not None
    assert graphs.graph_vision([*model.encoders(), *teacher.encoders.values()]) == 4


def capture_on_the_cpu(graph: Any, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replays run the function again, and write into the memory of the first results."""
    trains = bool(graph._parameters)
    live: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(trains):
            live[:] = [run(graph._x)]
        return live[0].detach()

    def gradients() -> list[Any]:
        return list(torch.autograd.grad(live[0], graph._parameters, graph._dy, allow_unused=True))

    def replay_backward() -> None:
        for old, new in zip(graph._gradients, gradients(), strict=True):
            assert (old is None) == (new is None)
            if old is not None:
                old.copy_(new)

    graph._y = forward().clone()
    graph._dy = torch.zeros_like(graph._y)
    graph._gradients = gradients() if trains else []
    graph._replay_forward = lambda: graph._y.copy_(forward())
    graph._replay_backward = replay_backward


def test_graphs_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs._Graph, "_capture", capture_on_the_cpu)
    torch.manual_seed(0)
    model = ScenarioCLIP(ModelConfig.preset("tiny")).train()
    plain = copy.deepcopy(model)
    graphs.graph_vision(model.encoders())
    a, b = torch.randn(2, 3, 3, 64, 64)
    with torch.inference_mode():  # what it captures serves later calls
        model.encode_image(a, "global")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(a, "global"), plain.encode_image(a, "global"))
    first, second = (model.encode_image(x, "global").square().sum() for x in (a, b))
    with pytest.raises(RuntimeError, match="an encoder ran again before this backward pass"):
        (first + second).backward()
    loss = model.encode_image(a, "global").square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="or the pass ran before"):
        loss.backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        model.encode_image(a, "global").square().sum().backward(create_graph=True)

    # Other weights are trained, or they have moved: what was captured is not used.
    head = model.vision["global"].head
    head.projection.bias.requires_grad_(False)
    model.zero_grad()
    model.encode_image(a, "global").square().sum().backward()
    assert head.projection.bias.grad is None and head.projection.weight.grad is not None
    head.projection.bias = torch.nn.Parameter(torch.ones_like(head.projection.bias))
    plain.vision["global"].head.projection.bias = head.projection.bias
    torch.testing.assert_close(model.encode_image(a, "global"), plain.encode_image(a, "global"))


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(1, 1025)]
    assert all(n <= size <= 1.25 * n for n, size in enumerate(sizes, 1))
    assert len(set(sizes[127:])) == 4 * 3 + 1  # four sizes per doubling: few graphs


def test_cuda_graphs_require_a_gpu(small: Make) -> None:
    with pytest.raises(UserError, match=r"train\.cuda_graphs: got true on cpu, expected a GPU"):
        Trainer(small("train.steps=1", "train.cuda_graphs=true")).fit()
    with pytest.raises(UserError, match=r"train\.cuda_graphs and train\.activation_checkpointing, expected only one"):
        small("train.cuda_graphs=true", "train.activation_checkpointing=true")
    with pytest.raises(UserError, match=r"train\.cuda_graphs and train\.parallel=fsdp, expected only one"):
        small("train.cuda_graphs=true", "train.parallel=fsdp")


@pytest.mark.gpu
@pytest.mark.compiles
def test_compiled_blocks_on_a_gpu_do_not_change_the_loss(small: Make) -> None:
    torch._dynamo.reset()
    curves = []
    for switch in ("false", "true"):
        config = small("train.steps=4", "run.device=cuda", f"train.compile={switch}", *FROZEN, run=switch)
        Trainer(config).fit()
        curves.append(losses(config))
    # Other kernels round differently, which AdamW's first steps amplify.
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("microbatches", [1, 2])
def test_cuda_graphs_do_not_change_the_loss(small: Make, microbatches: int) -> None:
    common = ("train.steps=8", "run.device=cuda", f"train.accumulate={microbatches}", *FROZEN)
    curves = []
    for switch in ("false", "true"):
        config = small(*common, f"train.cuda_graphs={switch}", run=switch)
        Trainer(config).fit()
        curves.append(losses(config))
    # Products of more rows may sum in another order, which AdamW's first steps amplify; memory overwritten too early by
    # a graph would change the first digit.
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


def test_only_a_teacher_of_all_encoders_is_evaluated(
    small: Make, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("train.steps=4", "loss.teacher_scope=all", *FROZEN, run="all")
    trainer = Trainer(config)
    trainer.fit()
    assert trainer.teacher is not None
    student = open_checkpoint(config.run.dir).model.state_dict()
    teacher = open_checkpoint(config.run.dir, weights="teacher").model.state_dict()
    with trainer.teacher.averaged(trainer.model) as averaged:
        for name, value in averaged.state_dict().items():
            assert torch.equal(teacher[name], value), name
    assert any(not torch.equal(teacher[name], value) for name, value in student.items())
    tables = []
    for weights in ("student", "teacher"):
        file = Path(config.run.dir) / f"{weights}.json"
        command = ["eval", "zeroshot", config.run.dir, str(shards), "--split", "train", "--device", "cpu"]
        assert main([*command, "--weights", weights, "--json", str(file)]) == 0
        tables.append(file.read_text())
    assert tables[0] != tables[1]

    part = small("train.steps=1", run="part")
    Trainer(part).fit()
    capsys.readouterr()
    assert main(["eval", "zeroshot", part.run.dir, str(shards), "--weights", "teacher"]) == 2
    assert "train with loss.teacher_scope=all" in capsys.readouterr().err
    none = small("train.steps=1", "loss.distillation_scale=0", run="none")
    Trainer(none).fit()
    with pytest.raises(UserError, match=r"teacher\.safetensors does not exist: this run had no teacher"):
        open_checkpoint(none.run.dir, weights="teacher")


def test_truncated_texts_are_reported(small: Make, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=1", "model.text.context_length=5")
    trainer = Trainer(config)
    trainer.fit()
    line = "truncated to the context of 5 tokens: "
    vocabulary = trainer.vocabulary
    longer = sum(len(ids) > 5 for ids in vocabulary.tokens("relation"))
    expected = f"{longer} of {len(vocabulary.relations)} relation texts"
    message = next(text for text in capsys.readouterr().err.splitlines() if line in text)
    assert longer > 0 and expected in message
    assert main(["eval", "zeroshot", config.run.dir, str(shards), "--split", "train", "--device", "cpu"]) == 0
    assert expected in capsys.readouterr().err
    assert Trainer(small("train.steps=1", run="whole")).fit().completed
    assert line not in capsys.readouterr().err
