"""The t-SNE map and the sheet of nearest texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scenarioclip_fast.eval.samples import Prediction, SampleScene
from scenarioclip_fast.eval.tsne import EmbeddingMap
from scenarioclip_fast.report.maps import scatter_map
from scenarioclip_fast.report.sheets import nearest_sheet


def size(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_map_and_nearest_texts(tmp_path: Path) -> None:
    label = [i % 35 for i in range(70)]
    places = [float(i) for i in range(70)]
    found = EmbeddingMap("test", "object", [f"a thing {i}" for i in range(35)], [""] * 70, label, places, places, 1, 0)
    assert min(size(scatter_map(found, tmp_path / "deep" / "map.png"))) > 800

    def prediction(rank: int) -> Prediction:
        guesses = [(f"text {i}", 0.9 - i / 3) for i in range(1, 6)]
        return Prediction(torch.full((8, 8, 3), 90, dtype=torch.uint8), f"text {rank}", guesses, False, -0.2, rank)

    whole = SampleScene("a", prediction(1), [prediction(3)], [prediction(40)])
    bare = SampleScene("b", prediction(9))
    wide, narrow = (size(nearest_sheet(s, tmp_path / "n.png")) for s in ([whole, bare], [bare]))
    assert wide[0] > 2 * narrow[0] and wide[1] > 1.5 * narrow[1]
    with pytest.raises(ValueError, match="at least one"):
        nearest_sheet([], tmp_path / "empty.png")
