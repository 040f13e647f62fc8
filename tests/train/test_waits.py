"""Check on a CPU that a training step does not synchronise with the device.

tests/train/test_trainer.py has the same check on a GPU. Here, tensors are labelled as if on a GPU or in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scenarioclip_fast.data import Batch
from scenarioclip_fast.ops.contrastive import validate
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.trainer import Trainer

# Ops whose result or output size the host reads. Indexing with a mask is another case.
SYNCHRONISING_OPS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
}
# Methods that read a CPU tensor without calling an op.
READING_METHODS = {
    "tolist",
    "numpy",
    "cpu",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__format__",
}
# Functions that copy from memory that is not pinned, if given a device.
UPLOADS = {"tensor", "as_tensor", "asarray", "new_tensor"}


class HostSync(AssertionError):
    """An operation that would wait for a GPU."""


class Memory:
    """Labels storages as on the device or on the host. Results of ops inherit the label of their inputs; tensors
    created without inputs have no label and may be used with either."""

    def __init__(self) -> None:
        self.device: set[int] = set()
        self.host: set[int] = set()
        self._kept: list[Any] = []  # so that no address is reused

    def add(self, kind: set[int], tensors: Iterable[Any]) -> None:
        for t in tensors:
            if isinstance(t, Tensor):
                self._kept.append(t.untyped_storage())
                kind.add(t.untyped_storage()._cdata)

    def on(self, kind: set[int], values: Any) -> list[Tensor]:
        return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.untyped_storage()._cdata in kind]


class Methods(TorchFunctionMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in READING_METHODS and self.memory.on(self.memory.device, args):
            raise HostSync(f"{name} of a tensor on the device")
        out = function(*args, **kwargs)
        if name in UPLOADS:
            if kwargs.get("device") is not None:
                raise HostSync(f"{name} with a device: a copy from memory that is not pinned")
            self.memory.add(self.memory.host, [out])
        return out


class Ops(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        memory, name = self.memory, op.overloadpacket.__name__
        on_device = memory.on(memory.device, (args, kwargs))
        # A 0-d tensor is a number, passed with the launch.
        on_host = [t for t in memory.on(memory.host, (args, kwargs)) if t.dim()]
        if on_device:
            self.seen.add(name)
            masks = [t for t in on_device if t.dtype == torch.bool] if name in ("index", "index_put_") else []
            counted = name == "repeat_interleave" and kwargs.get("output_size") is None
            if name in SYNCHRONISING_OPS or counted or any(t is not args[0] for t in masks):
                raise HostSync(f"{op} of a tensor on the device")
            if on_host:
                raise HostSync(f"{op} of tensors on the device and on the host")
        with torch._C.DisableTorchFunction():  # this package's ops may check values on a CPU
            out = op(*args, **kwargs)
        if on_device or on_host:
            memory.add(memory.device if on_device else memory.host, tree_leaves(out))
        return out


@contextmanager
def checked(memory: Memory) -> Iterator[Ops]:
    with Methods(memory), Ops(memory) as ops:
        yield ops


class CheckedTrainer(Trainer):
    """Checks the steps from the third one on, when caches are full."""

    def train_step(self, batch: Batch) -> None:
        tokens = self.model.tokens
        assert tokens is not None
        if self.step == 0:
            # A copy: on a CPU the buffers of both are the same tensor.
            self.seen: set[str] = set()
        if self.step < 2:
            super().train_step(batch)
            return
        index = [t.clone() for t in batch.tensors[1:]]
        batch = Batch(batch.pixels, batch.keys, *index, host=batch.host)
        memory = Memory()
        states = [s for state in self.optimizer.state.values() for s in state.values()]
        modules = [self.model, self.loss, *(self.teacher.encoders.values() if self.teacher else ())]
        weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        memory.add(memory.device, [*weights, *states, *batch.tensors, tokens._hidden])
        memory.add(memory.host, [*batch.host, tokens._host_lengths, tokens._filled])
        upload = tokens._upload

        def uploaded(parts: list[Tensor]) -> list[Tensor]:  # pinned and non-blocking
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                copies = [part.clone() for part in upload(parts)]
            memory.add(memory.device, copies)
            return copies

        tokens._upload = uploaded  # type: ignore[method-assign]
        try:
            with checked(memory) as ops:
                super().train_step(batch)
        finally:
            tokens._upload = upload  # type: ignore[method-assign]
        self.seen |= ops.seen


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_does_not_synchronise(
    small: Callable[..., TrainConfig], microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It checks values on a CPU only.
    monkeypatch.setattr(validate, "_check_values", lambda *_: None)
    layers = ("model.text.layers=2", "model.freeze.text_blocks=1", f"train.accumulate={microbatches}")
    trainer = CheckedTrainer(small("train.steps=4", "train.log_every=100", *layers))
    assert trainer.fit().completed
    # Forward, backward, clipping, optimizer, teacher.
    assert trainer.seen >= {"contrastive_forward", "contrastive_backward", "_foreach_norm", "_fused_adamw_", "stack"}
    assert trainer.seen & {"_foreach_lerp_", "lerp_"}


FAULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda device, host: device[0].item(),
    "bool": lambda device, host: bool((device > 0).any()),
    "float in a format": lambda device, host: f"{device[0]:.3f}",
    "tolist": lambda device, host: device.tolist(),
    "cpu": lambda device, host: (device * 2).cpu(),
    "nonzero": lambda device, host: device.nonzero(),
    "mask": lambda device, host: device[device > 0],
    "where by a mask": lambda device, host: device.masked_select(device > 0),
    "unique": lambda device, host: torch.unique(device),
    "repeat": lambda device, host: device.repeat_interleave(device.long()),
    "index on the host": lambda device, host: device[host.long()],
    "upload": lambda device, host: device + torch.tensor([1.0, 2.0, 3.0], device=device.device),
    "numbers on the host": lambda device, host: device * torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_synchronisation_is_detected(fault: str) -> None:
    device, host, memory = torch.ones(3), torch.arange(3.0), Memory()
    memory.add(memory.device, [device])
    memory.add(memory.host, [host])
    with checked(memory):
        # Host tensors may be read, and numbers are passed with launches.
        assert host.sum().item() == 3 and (device * torch.tensor(2.0) * host[1]).shape == (3,)
        with pytest.raises(HostSync):
            FAULTS[fault](device, host)
