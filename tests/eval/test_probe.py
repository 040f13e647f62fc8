"""Linear probes: accuracy, baselines, checkpoint selection and determinism."""

from __future__ import annotations

import pytest
import torch

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import probe as module
from scenarioclip_fast.eval.features import Features, LevelFeatures
from scenarioclip_fast.eval.probe import ProbeSettings, linear_probe

VOCABULARY = Vocabulary([f"action {i}" for i in range(5)], [f"thing {i}" for i in range(12)], [], {})
QUICK = ProbeSettings(steps=150, batch_size=64, seeds=(0, 1))


def make(views: int, seed: int, noise: float = 0.6, classes: int = 12, labels: str = "true") -> Features:
    """Object views around one fixed direction per class."""
    centres = torch.randn(12, 16, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(classes, (views,), generator=generator)
    image = centres[ids] + noise * torch.randn(views, 16, generator=generator)
    if labels == "random":
        ids = ids[torch.randperm(views, generator=generator)]
    return Features([str(i) for i in range(views)], {"object": LevelFeatures(image, ids, torch.arange(views))})


def test_learns_true_labels_and_not_random_ones() -> None:
    result = linear_probe(make(600, 0), make(300, 1), VOCABULARY, settings=QUICK, show_progress=False)
    assert [row.level for row in result.rows] == ["object"]
    row = result.rows[0]
    assert (row.views, row.classes, row.train_views, row.unseen) == (300, 12, 600, 0)
    assert 0.9 < row.top[1] < row.top[5]
    assert row.step == [150, 150] and not result.chosen_on_val
    noise = linear_probe(
        make(600, 0, labels="random"), make(300, 1), VOCABULARY, settings=QUICK, show_progress=False
    ).rows[0]
    # Chance among twelve classes is 8 %; the bound is six standard deviations of 300 guesses higher.
    assert noise.top[1] < 1 / 12 + 6 * 0.016


def test_baseline_and_unseen_classes_are_counted() -> None:
    train, test = make(400, 0, classes=9), make(200, 1)
    row = linear_probe(train, test, VOCABULARY, topk=(1, 3), settings=QUICK, show_progress=False).rows[0]
    seen, tested = train.levels["object"].text_id.tolist(), test.levels["object"].text_id.tolist()
    frequent = sorted(set(seen), key=lambda i: (-seen.count(i), i))
    assert row.unseen == sum(i >= 9 for i in tested) > 0
    assert row.baseline == {k: sum(i in frequent[:k] for i in tested) / 200 for k in (1, 3)}


def test_same_seed_same_weights() -> None:
    rows = make(200, 0).levels["object"]
    first, second, third = (module._fit(rows, None, 12, QUICK, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)


def test_val_selects_the_step() -> None:
    settings = ProbeSettings(steps=400, batch_size=64, lr=0.03, seeds=(0,))
    train, val, test = make(60, 0, noise=2.5), make(400, 1, noise=2.5), make(400, 2, noise=2.5)
    rows = [f.levels["object"] for f in (train, val)]
    chosen, step = module._fit(rows[0], rows[1], 12, settings, 0)
    last, end = module._fit(rows[0], None, 12, settings, 0)
    assert step < end == 400 and step % (400 // module.CHECKS) == 0
    # The probe overfits to so few noisy views.
    assert accuracy(chosen, val) > accuracy(last, val)
    result = linear_probe(train, test, VOCABULARY, val=val, settings=settings, show_progress=False)
    assert result.chosen_on_val and result.rows[0].step == [step]
    assert result.rows[0].top[1] == accuracy(chosen, test)


def accuracy(head: torch.nn.Linear, features: Features) -> float:
    rows = features.levels["object"]
    return float((head(rows.image).argmax(1) == rows.text_id).double().mean())


@pytest.mark.parametrize("block", [1, 40, 1 << 24])
def test_scores_are_computed_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rows, head = make(50, 0).levels["object"], torch.nn.Linear(16, 12)
    scores = head(rows.image)
    own = scores[torch.arange(50), rows.text_id][:, None]
    assert torch.equal(module._ranks(head, rows), (scores > own).sum(1))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    assert module._ranks(head, rows).tolist() == [11] * 50, "ties count against the true class"


def test_every_view_occurs_once_per_epoch() -> None:
    batches = module._batches(50, ProbeSettings(steps=13, batch_size=12), torch.Generator().manual_seed(0))
    assert [len(rows) for rows in batches] == [12] * 13
    for epoch in range(3):
        seen = torch.cat(batches[4 * epoch : 4 * epoch + 4])
        assert len(seen.unique()) == 48
    assert [len(rows) for rows in module._batches(5, ProbeSettings(steps=2), torch.Generator())] == [5, 5]


def test_invalid_settings_and_splits() -> None:
    for wrong, message in (({"steps": 0}, "steps"), ({"batch_size": 0}, "batch size"), ({"lr": 0.0}, "lr")):
        with pytest.raises(UserError, match=f"{message}: got 0"):
            ProbeSettings(**wrong)
    with pytest.raises(UserError, match="seeds: got none"):
        ProbeSettings(seeds=())
    with pytest.raises(UserError, match="no level has views in both"):
        linear_probe(make(10, 0), Features([], {}), VOCABULARY, show_progress=False)


def test_table_shows_the_spread_of_several_seeds() -> None:
    result = linear_probe(make(100, 0), make(50, 1), VOCABULARY, topk=(1,), settings=QUICK, show_progress=False)
    row = result.rows[0]
    assert f"{100 * row.top[1]:.1f} ± {100 * row.spread[1]:.1f} % ({100 * row.baseline[1]:.1f})" in str(result)
