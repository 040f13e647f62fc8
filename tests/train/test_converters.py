from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.fp8 import Float8Linear
from scenarioclip_fast.train import converters
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import Trainer


def test_a_converter_changes_the_model_before_it_is_wrapped(
    small: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_only_heads(
        model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World
    ) -> str | None:
        assert teacher is not None
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and "head" in name)
        return "only the heads are trained"

    monkeypatch.setitem(converters.CONVERTERS, "train_only_heads", train_only_heads)
    trainer = Trainer(small("train.steps=1"))
    trainer.fit()
    assert capsys.readouterr().err.count("only the heads are trained\n") == 1
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    heads = [p for name, p in trainer.model.named_parameters() if "head" in name]
    assert {id(p) for p in trained} == {id(p) for p in (*heads, *trainer.loss.parameters())}


# Two vision blocks, the first one frozen.
FP8 = ("run.precision=bf16", "model.vision.layers=2", "model.freeze.vision_blocks=1", "model.freeze.pre_layernorm=true")


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("mode", "options", "blocks"),
    [
        ("frozen", (), 3 + 1),
        ("all", ("train.accumulate=2", "train.activation_checkpointing=true"), 2 * 4 + 1 * 5),
    ],
)
def test_fp8_trains_like_bf16(
    small: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    mode: str,
    options: tuple[str, ...],
    blocks: int,
) -> None:
    plain, quantised = (
        small("train.steps=4", "optim.lr=1e-4", *FP8, *options, f"train.fp8={m}", run=m) for m in ("none", mode)
    )
    trainer = Trainer(plain)
    trainer.fit()
    assert "fp8" not in capsys.readouterr().err
    assert not any(isinstance(module, Float8Linear) for module in trainer.model.modules())
    Trainer(quantised).fit()
    line = f"train.fp8={mode}: {blocks} transformer blocks with FP8 products; on cpu FP8 is emulated"
    assert capsys.readouterr().err.count(line) == 1
    # FP8 keeps 4 significant bits, and a temperature of 0.07 magnifies errors of the cosines 14-fold. AdamW's first
    # steps have the size of the learning rate whatever the gradient, so the rate is small.
    torch.testing.assert_close(losses(quantised), losses(plain), rtol=2e-2, atol=0)
    kinds = [{name: (w.dtype, w.shape) for name, w in weights(config).items()} for config in (plain, quantised)]
    assert kinds[0] == kinds[1]
    assert not all(torch.equal(w, weights(plain)[name]) for name, w in weights(quantised).items())


def test_fp8_runs_resume_bit_for_bit(small: Callable[..., TrainConfig]) -> None:
    options = ("train.steps=4", "train.checkpoint_every=2", "train.fp8=all", *FP8)
    whole, again = small(*options, run="whole"), small(*options, "run.seed=0", run="again")
    Trainer(whole).fit()
    checkpoint = Path(whole.run.dir) / "checkpoints" / "step-00000002"
    Trainer(again, resume=str(checkpoint)).fit()
    assert losses(again) == losses(whole)[2:]
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(again).items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fp8_on_two_ranks(small: Callable[..., TrainConfig], fork_server: Any, parallel: str) -> None:
    common = ("train.steps=3", "optim.lr=1e-4", "train.fp8=all", *FP8)
    one, two = small(*common, run="one"), small(*common, f"train.parallel={parallel}", run="two")
    Trainer(one).fit()
    fork_server.start(two, ranks=2).finish()
    # Half as many rows in a product: sums in another order, in bf16.
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-2, atol=0)


def test_fp8_requires_bf16(small: Callable[..., TrainConfig]) -> None:
    with pytest.raises(
        UserError, match=r"train\.fp8: got all with run\.precision=float32, expected run\.precision=bf16"
    ):
        small("train.fp8=all")


def test_fp8_requires_a_gpu_with_fp8(small: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    world = World(0, 1, torch.device("cuda:0"), None)
    with pytest.raises(
        UserError, match=r"train\.fp8: got all on a GPU of compute capability 8\.0, expected at least 8\.9"
    ):
        converters.fp8_products(None, None, small("train.fp8=all", *FP8), world)  # type: ignore[arg-type]
