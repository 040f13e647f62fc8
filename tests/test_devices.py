"""`pick_device`: one parser and one error for the names of devices."""

from __future__ import annotations

import pytest
import torch

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.distributed import join_world
from scenarioclip_fast.errors import UserError


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match=r"^device: got 'cuda', but torch sees no CUDA device; use cpu or auto$"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"^run\.device: got 'cuda:2', but torch sees 2 GPUs$"):
        pick_device("cuda:2", "run.device")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "", "cuda:x", None, 1.5])
def test_other_names_are_refused(name: str) -> None:
    expected = "got '.*', expected auto, cpu, cuda or cuda:N$"
    with pytest.raises(UserError, match=f"^device: {expected}"):
        pick_device(name)
    with pytest.raises(UserError, match=f"^run.device: {expected}"), join_world(name, setting="run.device"):
        pass
