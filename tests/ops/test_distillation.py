"""distillation_loss: every backend against the definition in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarioclip_fast.kernels.distillation import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scenarioclip_fast as scf
from scenarioclip_fast import dispatch, requirements
from scenarioclip_fast.ops import distillation_loss

# Device of each backend; test_triton_in_the_interpreter runs Triton on a CPU.
DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def case(backend: str) -> Any:
    marks = [pytest.mark.gpu] if DEVICES[backend] == "cuda" else []
    reason = dispatch.unavailable_reason("distillation_loss", backend, DEVICES[backend])
    return pytest.param(backend, marks=[*marks, pytest.mark.skipif(reason is not None, reason=str(reason))])


BACKENDS = [case(backend) for backend in DEVICES]


def on(backend: str, p: dict[str, Tensor]) -> dict[str, Tensor]:
    # Triton's interpreter runs kernels on CPU tensors.
    device = "cpu" if backend == "triton" and requirements.triton_interprets() else DEVICES[backend]
    return {name: t.to(device) for name, t in p.items()}


def problem(
    students: int, teachers: int, pairs: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "student": torch.randn(students, width, generator=g).to(dtype),
        "teacher": torch.randn(teachers, width, generator=g).to(dtype),
        "student_index": torch.randint(max(students, 1), (pairs,), generator=g),
        "teacher_index": torch.randint(teachers, (pairs,), generator=g),
        "weight": torch.rand(pairs, generator=g),
    }


def exact(p: dict[str, Tensor], temperature: float, teacher_temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and temperature gradient by the definition and autograd, in float64."""
    student = p["student"].double().requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = reference.distillation_loss(
        student,
        p["teacher"].double(),
        p["student_index"],
        p["teacher_index"],
        p["weight"],
        t,
        teacher_temperature,
    )
    return loss.detach(), *torch.autograd.grad(loss, (student, t))


def evaluate(
    p: dict[str, Tensor], temperature: float, teacher_temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    p = on(backend, p)
    student = p["student"].clone().requires_grad_()
    t = torch.tensor(temperature, device=student.device, requires_grad=True)
    loss = distillation_loss(
        **{**p, "student": student},
        student_temperature=t,
        teacher_temperature=teacher_temperature,
        backend=backend,
    )
    # An upstream gradient other than 1 must not be ignored.
    return loss.detach().cpu(), *(g.cpu() / 3 for g in torch.autograd.grad(loss * 3, (student, t)))


def check(p: dict[str, Tensor], backend: str, temperature: float = 0.07, teacher_temperature: float = 0.07) -> None:
    # float32 sums of D terms around 1/T = 14: expect errors of some 1e-6 of the largest term.
    for found, expected in zip(
        evaluate(p, temperature, teacher_temperature, backend),
        exact(p, temperature, teacher_temperature),
        strict=True,
    ):
        scale = expected.abs().amax().clamp_min(1e-12) if expected.numel() else 1
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("students", "teachers", "pairs", "width"),
    [(3, 2, 7, 5), (17, 33, 64, 123), (70, 9, 300, 512), (5, 4, 0, 8), (0, 4, 0, 8), (2, 3, 40, 1025)],
)
def test_sizes(backend: str, students: int, teachers: int, pairs: int, width: int) -> None:
    check(problem(students, teachers, pairs, width), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_coordinate_gives_zero(backend: str) -> None:
    # The terms, around w s / T = 14, cancel up to rounding.
    for result in evaluate(problem(1, 1, 1, 1), 0.07, 0.07, backend):
        assert result.abs() < 14 * 2**-22


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.01, 0.07), (1.0, 1.0), (0.07, 5.0)])
def test_temperatures(backend: str, temperature: float, teacher_temperature: float) -> None:
    check(problem(6, 5, 20, 64), backend, temperature, teacher_temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp_and_large_values(backend: str) -> None:
    p = problem(4, 4, 12, 32)
    p["teacher"] *= 30  # a nearly one-hot softmax: the clamp determines the other coordinates
    p["student"] *= 10
    check(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates(backend: str) -> None:
    for name in ("student", "teacher"):
        p = problem(3, 3, 3, 16)
        p["student_index"] = p["teacher_index"] = torch.arange(3)
        p[name][1, 5] = torch.nan
        assert distillation_loss(**on(backend, p), backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_pairs_are_ignored(backend: str) -> None:
    p = problem(3, 2, 4, 16)
    p["student_index"] = torch.tensor([0, 2, 2, 0])
    p["student"][1] = torch.inf
    loss, gradient, _ = evaluate(p, 0.07, 0.07, backend)
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    assert gradient[[0, 2]].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    p = problem(9, 7, 30, 96, dtype=dtype)
    loss, gradient, _ = evaluate(p, 0.07, 0.07, backend)
    expected, expected_gradient, _ = exact(p, 0.07, 0.07)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
    # Rounded to the input's dtype by the op, and once more by the division in `evaluate`: 2^-8 each in bfloat16.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7, atol=1e-7)


def test_float64_passes_gradcheck() -> None:
    p = problem(4, 3, 9, 11, dtype=torch.float64)
    student = p.pop("student").requires_grad_()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    teacher_temperature = 0.5

    def f(student: Tensor, t: Tensor) -> Tensor:
        return distillation_loss(student, **p, student_temperature=t, teacher_temperature=teacher_temperature)

    assert torch.autograd.gradcheck(f, (student, t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    p = on(backend, problem(4, 3, 9, 11))
    p["student"].requires_grad_()
    t = torch.tensor(0.07, device=p["student"].device, requires_grad=True)
    op = torch.ops.scenarioclip_fast.distillation_forward
    torch.library.opcheck(op, (*p.values(), t, 0.0, 0.07, True, backend))
    p["student"].requires_grad_(False)
    torch.library.opcheck(op, (*p.values(), None, 0.07, 0.07, False, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break_for_any_size(backend: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(student: Tensor, **rest: Tensor) -> Tensor:
        return distillation_loss(student * 2, **rest, backend=backend)

    for sizes in ((5, 4, 11, 32), (6, 3, 17, 32)):
        p = on(backend, problem(*sizes))
        eager = p["student"].clone().requires_grad_()
        student = p.pop("student").requires_grad_()
        loss = compiled(student, **p)
        expected = distillation_loss(eager * 2, **p, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, eager))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    p = problem(6, 5, 12, 40)
    wide = torch.randn(6, 80)
    p["student"] = wide[:, ::2]
    p["weight"] = torch.rand(24)[::2]
    check(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_is_a_number_or_a_tensor(backend: str) -> None:
    p = on(backend, problem(6, 5, 12, 40))
    t = torch.tensor(0.05, device=p["student"].device)
    number, tensor = (distillation_loss(**p, student_temperature=x, backend=backend) for x in (0.05, t))
    # The kernels receive 0.05 in float32 either way; the reference receives a number in float64.
    torch.testing.assert_close(number, tensor, rtol=1e-6, atol=0)


class Dispatched(TorchDispatchMode):
    """Records the names of the operators that run, except views and detach, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view and op is not torch.ops.aten.detach.default:
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("learned", [False, True])
def test_one_operator_forward_and_one_product_backward(learned: bool) -> None:
    p = problem(6, 5, 12, 40)
    student = p.pop("student").requires_grad_()
    t = torch.tensor(0.07, requires_grad=True) if learned else 0.07
    upstream = torch.tensor(2.0)
    with Dispatched() as forward:
        loss = distillation_loss(student, **p, student_temperature=t)
    with Dispatched() as backward:
        torch.autograd.grad(loss, [student, t] if learned else student, upstream)
    assert forward.names == ["scenarioclip_fast::distillation_forward"]
    assert backward.names == ["aten::mul.Tensor"]


@pytest.mark.gpu
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("triton", "cuda")])
def test_one_launch_forward_and_one_backward(backend: str, learned: bool) -> None:
    p = on(backend, problem(70, 9, 300, 512))
    student = p.pop("student").requires_grad_()
    t = torch.tensor(0.07, device="cuda", requires_grad=True) if learned else 0.07
    upstream = torch.tensor(2.0, device="cuda")

    def launches(run: Callable[[], Any]) -> tuple[Any, list[str]]:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = run()
            torch.cuda.synchronize()
        return result, [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    def forward() -> Tensor:
        return distillation_loss(student, **p, student_temperature=t, backend=backend)

    forward()  # compiles, and allocates the stream's counter
    loss, names = launches(forward)
    assert len(names) == 1, names
    _, names = launches(lambda: torch.autograd.grad(loss, [student, t] if learned else student, upstream))
    assert len(names) == 1, names


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("triton", "cuda")])
def test_graphs_and_streams(backend: str) -> None:
    """A graph replays between other launches, and each stream has its own counter."""
    p = on(backend, problem(70, 9, 300, 512))
    expected = distillation_loss(**p, backend=backend)
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(4)]
    with torch.cuda.graph(graph):
        captured = distillation_loss(**p, backend=backend)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(distillation_loss(**p, backend=backend))
        graph.replay()
        results.append(captured.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(dispatch.unavailable_reason("distillation_loss", "cpu", "cpu") is not None, reason="not built")
def test_threads_do_not_change_the_result() -> None:
    p = problem(50, 40, 400, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(evaluate(p, 0.07, 0.07, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": torch.zeros(3)},
            r"student: got torch.float32 \[3\], expected floats of shape \[rows, D\]",
        ),
        ({"teacher": torch.zeros(3, 9)}, "got widths 8 and 9"),
        ({"student_index": torch.zeros(4, dtype=torch.int32)}, "student_index: got torch.int32"),
        ({"weight": torch.zeros(5)}, "expected the same length"),
        (
            {"student_index": torch.tensor([0, 1, 2, 3])},
            "student_index: got indices from 0 to 3, expected 0 to 2",
        ),
        ({"teacher_index": torch.tensor([-1, 0, 0, 0])}, "teacher_index: got indices from -1 to 0"),
        ({"student_temperature": 0.0}, "student_temperature: got 0.0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature: got -1.0"),
        ({"student_temperature": torch.ones(2)}, "expected a 0-d tensor"),
        ({"student_temperature": torch.tensor(-0.5)}, "student_temperature: got -0.5, expected a number above 0"),
        ({"student_temperature": None}, "student_temperature: got NoneType, expected a number or a 0-d tensor"),
        ({"teacher_temperature": "1"}, "teacher_temperature: got str, expected a number"),
        ({"weight": [1.0]}, "weight: got list, expected a tensor"),
        ({"backend": "fast"}, "got 'fast', expected one of auto"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {**problem(3, 3, 4, 8), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        distillation_loss(**arguments)  # type: ignore[arg-type]


def test_second_derivatives_raise() -> None:
    p = problem(3, 3, 4, 8)
    student = p["student"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(**{**p, "student": student}), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.square().sum().backward()


def test_a_named_backend_never_falls_back() -> None:
    p = problem(3, 3, 4, 8)
    with pytest.raises(scf.BackendError, match=r"backend 'cuda' .* cannot run on cpu tensors"):
        distillation_loss(**p, backend="cuda")
    p = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
    with pytest.raises(scf.BackendError, match="float32 only, but the input is float64; usable: reference"):
        distillation_loss(**p, backend="cpu")


def test_triton_in_the_interpreter() -> None:
    """In a separate process: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import torch, test_distillation as t
from scenarioclip_fast.kernels.distillation import distillation_triton
for sizes in ((3, 2, 7, 5), (4, 5, 1030, 33), (5, 4, 0, 8), (0, 4, 0, 8)):
    t.check(t.problem(*sizes), "triton")
t.test_a_temperature_is_a_number_or_a_tensor("triton")
t.test_rows_without_pairs_are_ignored("triton")
# The counter is 0 again after a launch.
p, finished = t.problem(6, 5, 12, 33), torch.zeros((), dtype=torch.int32)
first, second = (distillation_triton.forward(*p.values(), None, 0.07, 0.07, True, finished) for _ in range(2))
assert finished == 0 and torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
p = t.problem(4, 4, 12, 32); p["teacher"] *= 30
t.check(p, "triton", 0.05, 0.1)
p["student"][p["student_index"][0], 3] = float("nan")
assert t.distillation_loss(**p, backend="triton").isnan()
print("checked")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr
