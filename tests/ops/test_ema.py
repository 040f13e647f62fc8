"""ema_update_: arithmetic, dtypes, and errors that leave the teacher unchanged."""

from __future__ import annotations

import pytest
import torch

from scenarioclip_fast.ops import ema_update_


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9995, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_follows_the_formula(device: str, decay: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (1,), (0,), (2, 5, 7)]
    teacher = [torch.randn(s, generator=g).to(device, dtype) for s in shapes]
    student = [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]
    expected = [decay * t.double() + (1 - decay) * s.detach().double() for t, s in zip(teacher, student, strict=True)]
    pointers = [t.data_ptr() for t in teacher]
    ema_update_(teacher, student, decay)
    for found, target in zip(teacher, expected, strict=True):
        # One multiplication and one addition: a few units in the last place.
        torch.testing.assert_close(found.double(), target, rtol=3e-7, atol=3e-7)
    assert pointers == [t.data_ptr() for t in teacher]


def test_a_float32_teacher_follows_a_bfloat16_student() -> None:
    teacher = [torch.zeros(1000)]
    for _ in range(3):
        ema_update_(teacher, [torch.ones(1000, dtype=torch.bfloat16)], 0.999)
    # In bfloat16 the second step of 0.001 would round to nothing.
    torch.testing.assert_close(teacher[0], torch.full((1000,), 1 - 0.999**3), rtol=1e-5, atol=0)


def test_parameters_are_updated_without_a_graph() -> None:
    teacher = torch.nn.Parameter(torch.zeros(3))
    student = torch.nn.Parameter(torch.ones(3))
    ema_update_([teacher], [student], 0.5)
    assert teacher.grad_fn is None
    assert torch.equal(teacher.detach(), torch.full((3,), 0.5))
    ema_update_([], [], 0.5)


@pytest.mark.parametrize(
    ("teacher", "student", "decay", "message"),
    [
        ([torch.zeros(2)], [torch.ones(2)], 1.5, "decay: got 1.5, expected 0 to 1"),
        ([torch.zeros(2)], [], 0.5, "got 1 teacher and 0 student tensors"),
        (
            [torch.zeros(2), torch.zeros(3)],
            [torch.ones(2), torch.ones(2)],
            0.5,
            r"tensor 1: got a teacher of \[3\]",
        ),
        (
            [torch.zeros(2), torch.zeros(2).int()],
            [torch.ones(2), torch.ones(2).int()],
            0.5,
            "tensor 1: got torch.int32",
        ),
        ([torch.zeros(2)], [torch.ones(2).to(torch.complex64)], 0.5, "tensor 0: got torch.complex64"),
        ([torch.zeros(2)], [2.0], 0.5, "student: got list, expected a list of tensors"),
        (torch.zeros(2), [torch.ones(2)] * 2, 0.5, "teacher: got Tensor, expected a list of tensors"),
    ],
)
def test_bad_input_changes_nothing(
    teacher: list[torch.Tensor], student: list[torch.Tensor], decay: float, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ema_update_(teacher, student, decay)
    assert all((t == 0).all() for t in teacher)
