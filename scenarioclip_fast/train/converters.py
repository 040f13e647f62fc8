"""Changes to the model between its construction and its parallel wrapper: one function each, listed in CONVERTERS.

To add one, write a function with the signature of `Converter` and add it to CONVERTERS.
"""

from __future__ import annotations

from typing import Protocol

import torch

from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.encoders import Encoder
from scenarioclip_fast.model.fp8 import use_fp8
from scenarioclip_fast.model.graphs import graph_vision
from scenarioclip_fast.train.config import TrainConfig


class Converter(Protocol):
    def __call__(
        self, model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World
    ) -> str | None:
        """Change the model (and its teacher, whose encoders are copies) in place if `config` requests it.

        Parameters must keep their names and shapes, because checkpoints rely on them.

        Returns:
            One line for the log, or None.
        """


def all_encoders(model: ScenarioCLIP, teacher: EMATeacher | None) -> list[Encoder]:
    """The encoders of the student, and of its teacher if there is one."""
    return [*model.encoders(), *([] if teacher is None else teacher.encoders.values())]


def checkpoint_activations(
    model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World
) -> str | None:
    """Apply train.activation_checkpointing; the teacher has no backward pass."""
    model.set_checkpointing(config.train.activation_checkpointing)
    return None


def fp8_products(model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World) -> str | None:
    """Apply train.fp8."""
    mode = config.train.fp8
    if mode == "none":
        return None
    on_gpu = world.device.type == "cuda"
    if on_gpu and (capability := torch.cuda.get_device_capability(world.device)) < (8, 9):
        raise UserError(
            f"train.fp8: got {mode} on a GPU of compute capability {capability[0]}.{capability[1]}, expected at least "
            "8.9 (Ada, Hopper): set train.fp8=none"
        )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    blocks = use_fp8(all_encoders(model, teacher), frozen, mode)
    where = "" if on_gpu else f"; on {world.device} FP8 is emulated: rounded equally, but slower than bf16"
    return f"train.fp8={mode}: {blocks} transformer blocks with FP8 products{where}"


def compile_blocks(model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World) -> str | None:
    """Apply train.compile."""
    if not config.train.compiles_on(world.device.type):
        return None
    model.compile_blocks()
    if teacher is not None:
        teacher.compile_blocks()
    return "the transformer blocks are compiled: the first steps may take minutes"


def cuda_graphs(model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World) -> str | None:
    """Apply train.cuda_graphs."""
    if not config.train.cuda_graphs:
        return None
    encoders = graph_vision(all_encoders(model, teacher))
    return f"{encoders} vision encoders run as CUDA graphs, which are captured when a number of views first occurs"


# In the order of application.
CONVERTERS: dict[str, Converter] = {
    "activation_checkpointing": checkpoint_activations,
    "fp8": fp8_products,  # before the blocks are compiled
    "compile": compile_blocks,
    "cuda_graphs": cuda_graphs,  # of the compiled blocks, if they are
}


def convert(model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World) -> list[str]:
    """Apply all converters; return their log lines."""
    lines = [converter(model, teacher, config, world) for converter in CONVERTERS.values()]
    return [line for line in lines if line is not None]
