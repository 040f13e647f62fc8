from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model import ModelConfig, ScenarioCLIP, TokenTable
from scenarioclip_fast.model.tokens import truncate

CONFIG = replace(ModelConfig.preset("tiny").text, context_length=8)


def lists(*levels: list[list[int]]) -> Any:
    """A vocabulary with these token ids."""
    return SimpleNamespace(tokens=dict(zip(LEVELS, levels, strict=True)).__getitem__)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    texts = [
        [f"{'very ' * (i % 9)}tall {name} {i}" for i in range(n)] for name, n in (("man", 30), ("dog", 0), ("cat", 7))
    ]
    Vocabulary(*texts).save(tmp_path / "vocabulary.bin")
    return Vocabulary.load(tmp_path / "vocabulary.bin")


def test_ids_on_demand_equal_those_on_the_device(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scenarioclip_fast.model.tokens._CHECKED", 4)
    whole, demand = TokenTable(vocabulary, CONFIG), TokenTable(vocabulary, CONFIG, device_bytes=0)
    plain = TokenTable(lists(*(vocabulary.tokens(level)[:] for level in LEVELS)), CONFIG, device_bytes=0)
    assert (whole.on_demand, demand.on_demand, plain.on_demand) == (False, True, True)
    assert len(demand.tokens) == len(demand._filled) == 0
    kept = [ids for level in LEVELS for ids in truncate(vocabulary.tokens(level), CONFIG)[0]]
    assert whole.tokens.tolist() == [token for ids in kept for token in ids]
    assert whole.describe_truncated() == demand.describe_truncated() == plain.describe_truncated()
    assert whole.truncated == {level: truncate(vocabulary.tokens(level), CONFIG)[1] for level in LEVELS}
    assert 0 < whole.truncated["global"] < 30
    rng = np.random.default_rng(0)
    for n in (0, 1, 5, 60):
        row = rng.integers(0, 37, n)
        expected = [token for i in row for token in kept[i]]
        first, *others = (table.packing(row) for table in (whole, demand, plain))
        for table, (packing, source) in zip((whole, demand, plain), (first, *others), strict=True):
            assert table.ids(source).tolist() == expected
            for name in ("slot", "cell", "position", "last", "starts", "longest"):
                assert torch.equal(*(torch.as_tensor(getattr(p, name)) for p in (packing, first[0]))), name
    ids = [torch.tensor(i) for i in ([3, 29, 3], [], [6])]
    for table in (whole, demand, plain):
        unique = table.unique_texts([i.long() for i in ids])
        assert [r.tolist() for r in unique.row] == [[3, 29], [], [36]]
        assert [n.tolist() for n in unique.lengths] == [[len(kept[3]), len(kept[29])], [], [len(kept[36])]]


@pytest.mark.parametrize("device_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "got a text that ends in nothing, expected 49407"),
        ([49406, 5], "got a text that ends in 5, expected 49407"),
        ([49408, 49407], "got ids from 49407 to 49408, expected 0 to 49407"),
        ([-1, 49407], "got ids from -1 to 49407, expected 0 to 49407"),
    ],
)
def test_ids_that_do_not_fit_the_model(bad: list[int], message: str, device_bytes: int) -> None:
    good = [[49406, 1, 49407]] * 3
    config = ModelConfig.preset("vit-b-32").text
    with pytest.raises(UserError, match=f"the vocabulary's object texts do not fit the model: tokens: {message}"):
        TokenTable(lists(good, [*good, bad, *good], good), config, device_bytes=device_bytes)


def test_frozen_features_of_ids_on_demand(vocabulary: Vocabulary) -> None:
    model = ScenarioCLIP(ModelConfig.preset("tiny"))
    encoder = model.text["global"]
    row = np.array([3, 35, 20])
    for device_bytes in (0, 1 << 20):
        table = TokenTable(vocabulary, model.config.text, device_bytes=device_bytes)
        packing, source = table.packing(row)
        with torch.no_grad():
            expected = encoder.run(table.ids(source), packing, stop=2)
        found = table.frozen_features(encoder, 2, row, packing, source)
        # Other shapes of matrix products, since the table on the device caches whole chunks.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
