from __future__ import annotations

from pathlib import Path

import pytest

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import open_session


def test_unknown_arguments_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="weights: got 'studnet', expected one of student, teacher"),
        open_session(tmp_path, tmp_path, weights="studnet", device="cpu"),  # type: ignore[arg-type]
    ):
        pass
    with (
        pytest.raises(
            TypeError, match=r"open_session\(\) got an unexpected keyword argument 'blurr': did you mean blur\?"
        ),
        open_session(tmp_path, tmp_path, blurr="rgb"),
    ):
        pass
