"""CUDA graphs of vision encoders: a range of stages, forward and backward, is replayed with one launch each.

A training step of ViT-B/32 launches about 1,000 kernels, most of them in the vision encoders: an H200's host took
longer to launch them than the GPU to run them. Views are padded with rows of zeros to a few sizes (`bucket`), each of
which is captured when it first occurs. Rows are independent, and padded rows have no gradient: only the order of sums
may change.

Captured work reads and writes fixed memory. Parameters should therefore be updated in place, as optimizers,
`load_state_dict` and the EMA teacher do: where weights have moved, everything is captured again. The gradients of a
step are overwritten by the next one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scenarioclip_fast.model.encoders import Encoder, VisionEncoder
from scenarioclip_fast.model.layers import Linear, autocast_dtype

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

    The graphs of a range share a memory pool, and with it the activations: only the latest forward pass of a range has
    a backward pass.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = weakref.ref(encoder)  # no cycle, which would keep the weights until the next collection
        self._ranges: dict[Hashable, _Range] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the encoder has no graphs

    def __call__(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """The stages `start` to `stop` of x: [n, ...]. x has no gradient."""
        encoder = self._encoder()
        assert encoder is not None
        stages = encoder.stages[start:stop]
        parameters: list[Tensor] = [p for stage in stages for p in stage.parameters() if p.requires_grad]
        trains = torch.is_grad_enabled() and bool(parameters)
        found = self._ranges.setdefault((start, stop, trains, x.device), _Range())
        found.keep_only(_addresses(stages))
        key = (bucket(len(x)), x.shape[1:], x.dtype, _is_channels_last(x), autocast_dtype(x.device.type))
        graph = found.graphs.get(key)
        if graph is None:
            run = functools.partial(encoder.run_stages, start=start, stop=stop)
            graph = found.graphs[key] = _Graph(run, x, parameters if trains else [], found)
        if not trains:
            return graph.forward(x)
        y: Tensor = _Replay.apply(graph, x, *parameters)
        return y


class _Range:
    """The graphs of a range of stages, by size, and their memory pool."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.graphs: dict[Hashable, _Graph] = {}
        self.passes = 0  # forward passes so far
        self._addresses: tuple[Any, ...] = ()

    def keep_only(self, addresses: tuple[Any, ...]) -> None:
        """Drop the graphs if the weights that they read have moved, or others are trained."""
        if addresses != self._addresses:
            self._addresses, self.pool = addresses, None
            self.graphs.clear()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _addresses(stages: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What the captured launches of stages depend on: where weights and their copies are, and which are trained."""
    found: list[Any] = []
    for stage in stages:
        for module in stage.modules():
            tensors = [p for p in module._parameters.values() if p is not None]
            found += [(p.data_ptr(), p.requires_grad) for p in tensors]
            if isinstance(module, Linear):
                found += [t.data_ptr() for t in module.derived()]
    return tuple(found)


class _Graph:
    """A captured function of padded rows, and its gradients for `parameters`."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], owner: _Range) -> None:
        self.owner = owner
        self._parameters, self._rows = parameters, 0
        self._gradients: list[Tensor | None] = []
        # Not in inference mode: a later training step uses what an evaluation captured. No cast of a weight may come
        # from autocast's cache, which is freed when the step ends.
        with torch.inference_mode(False), torch.set_grad_enabled(bool(parameters)), _without_cast_cache(x.device.type):
            self._x = torch.zeros(bucket(len(x)), *x.shape[1:], dtype=x.dtype, device=x.device)
            if _is_channels_last(x):
                self._x = self._x.contiguous(memory_format=torch.channels_last)
            self._capture(run)

    def _capture(self, run: Callable[[Tensor], Tensor]) -> None:
        def gradients(y: Tensor, dy: Tensor) -> list[Tensor | None]:
            return list(torch.autograd.grad(y, self._parameters, dy, allow_unused=True))

        device = self._x.device
        if self.owner.pool is None:
            self.owner.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            stream = _capture_stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    y = run(self._x)
                    if self._parameters:
                        gradients(y, torch.zeros_like(y))
            self._replay_forward, y = _record(lambda: run(self._x), self.owner.pool, stream)
            self._y, self._dy = y.detach(), torch.zeros_like(y)
            if self._parameters:
                self._replay_backward, self._gradients = _record(
                    lambda: gradients(y, self._dy), self.owner.pool, stream
                )

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        self._x[:n].copy_(x)
        if n < self._rows:
            self._x[n:].zero_()
            self._dy[n:].zero_()
        self._rows = n
        self._replay_forward()
        self.owner.passes += 1
        return self._y[:n].clone()  # the next call overwrites the memory of this one

    def backward(self, dy: Tensor) -> list[Tensor | None]:
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            # With several microbatches, p.grad may be the memory that the replay overwrites.
            if p.grad is not None and gradient is not None and p.grad.data_ptr() == gradient.data_ptr():
                p.grad = p.grad.clone()
        self._dy[: self._rows].copy_(dy)
        self._replay_backward()
        self.owner.passes += 1  # its activations are gone, too
        return [None if gradient is None else gradient.detach() for gradient in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, x: Tensor, *parameters: Tensor) -> Tensor:
        y = graph.forward(x)
        ctx.graph, ctx.passes = graph, graph.owner.passes
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("CUDA graphs: got create_graph=True, expected first derivatives only: do without graphs")
        if ctx.passes != ctx.graph.owner.passes:
            raise RuntimeError(
                "CUDA graphs: an encoder ran again before this backward pass, or the pass ran before, and its "
                "activations are overwritten; expected one forward pass per backward pass: embed all views at once, "
                "or do without graphs"
            )
        return (None, None, *ctx.graph.backward(dy))


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _record(run: Callable[[], T], pool: Any, stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    """Capture `run`; return a function that replays it into the memory of its result, and that result."""
    graph = torch.cuda.CUDAGraph()
    # Other threads load data, and may allocate memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def _without_cast_cache(device_type: str) -> AbstractContextManager[Any]:
    dtype = autocast_dtype(device_type)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype, cache_enabled=False)
