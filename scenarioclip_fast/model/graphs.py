"""CUDA graphs of vision encoders: a range of stages, forward and backward, is replayed with one launch each.

A training step of ViT-B/32 launches some 1,100 kernels, and the vision encoders' 800 take a host longer to launch than
a GPU to run. Views are padded with rows of zeros to a few sizes (`bucket`), each of which is captured when it first
occurs. Rows are independent, and padded rows have no gradient: only the order of sums may change.

Captured work reads and writes fixed memory. Parameters must therefore be updated in place, as optimizers,
`load_state_dict` and the EMA teacher do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarioclip_fast.model.encoders import Encoder, VisionEncoder
from scenarioclip_fast.model.layers import autocast_dtype

T = TypeVar("T")
_WARMUP = 2  # calls before a capture: kernels are compiled and workspaces allocated


def bucket(n: int) -> int:
    """Round up to one of four sizes per power of two: at most 25 % more, 10 % on average."""
    step = 1 << max(n.bit_length() - 3, 0)
    return -(-n // step) * step


def graph_vision(encoders: Iterable[Encoder]) -> int:
    """Make vision encoders replay CUDA graphs while they train; return the number of these encoders."""
    found = [encoder for encoder in encoders if isinstance(encoder, VisionEncoder)]
    for encoder in found:
        encoder.replay = StageGraphs(encoder)
    return len(found)


class StageGraphs:
    """Runs ranges of an encoder's stages as CUDA graphs, one per range and size.

    Graphs of a range share a memory pool, since they never run at the same time; graphs with a backward pass have
    their own, because their activations are in use until then.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._pools: dict[Hashable, Any] = {}
        self._graphs: dict[Hashable, _Graph] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the encoder has no graphs

    def __call__(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """The stages `start` to `stop` of x: [n, ...]. x has no gradient."""
        stages = self.encoder.stages[start:stop]
        parameters: list[Tensor] = [p for stage in stages for p in stage.parameters() if p.requires_grad]
        trains = torch.is_grad_enabled() and bool(parameters)
        kind = (start, stop, trains)
        layout = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        weights = next(stages[-1].parameters()).data_ptr()  # moved weights need a new graph
        key = (*kind, bucket(len(x)), x.shape[1:], x.dtype, layout, autocast_dtype(x.device.type), weights)
        graph = self._graphs.get(key)
        if graph is None:
            if kind not in self._pools:
                self._pools[kind] = torch.cuda.graph_pool_handle()
            run = functools.partial(self.encoder.run_stages, start=start, stop=stop)
            graph = _Graph(run, x, parameters if trains else [], self._pools[kind])
            self._graphs[key] = graph
        if not trains:
            return graph.forward(x)
        y: Tensor = _Replay.apply(graph, x, *parameters)
        return y


class _Graph:
    """A captured function of padded rows, and its gradients for `parameters`."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], pool: Any) -> None:
        self._x = x.new_zeros(bucket(len(x)), *x.shape[1:])
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            self._x = self._x.contiguous(memory_format=torch.channels_last)
        self._parameters, self._rows = parameters, 0
        self._gradients: list[Tensor | None] = []
        # A cast of a weight in autocast's cache would be freed when the step ends.
        with _without_cast_cache(x.device.type):
            self._capture(run, pool)

    def _capture(self, run: Callable[[Tensor], Tensor], pool: Any) -> None:
        def gradients(y: Tensor, dy: Tensor) -> list[Tensor | None]:
            return list(torch.autograd.grad(y, self._parameters, dy, allow_unused=True))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                y = run(self._x)
                if self._parameters:
                    gradients(y, torch.zeros_like(y))
        self._replay_forward, y = _record(lambda: run(self._x), pool)
        self._y, self._dy = y.detach(), torch.zeros_like(y)
        if self._parameters:
            self._replay_backward, self._gradients = _record(lambda: gradients(y, self._dy), pool)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        self._x[:n].copy_(x)
        if n < self._rows:
            self._x[n:].zero_()
            self._dy[n:].zero_()
        self._rows = n
        self._replay_forward()
        return self._y[:n].clone()  # the next call overwrites the memory of this one

    def backward(self, dy: Tensor) -> list[Tensor | None]:
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            # With several microbatches, p.grad may be the memory that the replay overwrites.
            if p.grad is not None and gradient is not None and p.grad.data_ptr() == gradient.data_ptr():
                p.grad = p.grad.clone()
        self._dy[: self._rows].copy_(dy)
        self._replay_backward()
        return [None if gradient is None else gradient.detach() for gradient in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.graph.backward(dy))


def _record(run: Callable[[], T], pool: Any) -> tuple[Callable[[], None], T]:
    """Capture `run`; return a function that replays it into the memory of its result, and that result."""
    graph = torch.cuda.CUDAGraph()
    # Other threads load data, and may allocate memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def _without_cast_cache(device_type: str) -> AbstractContextManager[Any]:
    dtype = autocast_dtype(device_type)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype, cache_enabled=False)
