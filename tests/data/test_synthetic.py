from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from scenarioclip_fast.data import Scene, generate_scenes, load_reference, write_published_layout
from scenarioclip_fast.data.synthetic import (
    ACTIONS,
    COLOURS,
    HELD_OUT,
    KINDS,
    TEMPLATES,
    Template,
    action_of,
    vocabulary,
)
from scenarioclip_fast.data.synthetic.events import RELATED
from scenarioclip_fast.data.synthetic.scenes import split_of
from scenarioclip_fast.data.synthetic.write import generate_published_layout
from scenarioclip_fast.errors import UserError

N = 700


@cache
def scenes() -> list[Scene]:
    return list(generate_scenes(N, seed=3))


def words(scene: Scene, i: int) -> tuple[str, str]:
    colour, kind = scene.objects[i].name.split()
    return colour, kind


def template(scene: Scene, k: int) -> tuple[Template, str, str]:
    r = scene.relations[k]
    (c1, k1), (c2, k2) = words(scene, r.subject), words(scene, r.object)
    return Template(k1, r.predicate, k2), c1, c2


def mask(scene: Scene, i: int) -> Tensor:
    found = scene.objects[i].mask
    assert isinstance(found, Tensor)
    return found


def image(scene: Scene) -> Tensor:
    assert isinstance(scene.image, Tensor)
    return scene.image


def same(a: Scene, b: Scene) -> bool:
    return (
        (a.key, a.action, a.split, a.relations) == (b.key, b.action, b.split, b.relations)
        and torch.equal(image(a), image(b))
        and [(o.name, o.box) for o in a.objects] == [(o.name, o.box) for o in b.objects]
        and all(torch.equal(mask(a, i), mask(b, i)) for i in range(len(a.objects)))
    )


def test_scenes_depend_only_on_seed_and_index() -> None:
    again = list(generate_scenes(5, seed=3, start=100))
    assert all(same(a, b) for a, b in zip(scenes()[100:105], again, strict=True))
    other = list(generate_scenes(5, seed=4, start=100))
    assert not any(torch.equal(image(a)[:100, :100], image(b)[:100, :100]) for a, b in zip(again, other, strict=True))


def test_variety() -> None:
    words_ = vocabulary()
    assert len(KINDS) >= 24 and len(COLOURS) >= 4 and len(ACTIONS) == 10
    assert len({t.predicate for t in TEMPLATES}) >= 8
    assert 200 <= len(words_["relations"]) <= 600
    sizes = {image(s).shape[:2] for s in scenes()}
    assert len(sizes) > N / 4
    assert all(100 <= min(h, w) <= 192 and max(h, w) <= 260 for h, w in sizes)
    assert {len(s.objects) for s in scenes()} >= {2, 3, 4, 5}
    assert {len(s.relations) for s in scenes()} == {0, 1, 2}
    assert {n for s in scenes() for n in (o.name.split()[1] for o in s.objects)} == set(KINDS)
    assert {template(s, k)[0] for s in scenes() for k in range(len(s.relations))} == set(TEMPLATES)


def test_the_vocabulary_contains_every_text() -> None:
    known = {level: set(texts) for level, texts in vocabulary().items()}
    for scene in scenes():
        assert scene.action in known["actions"]
        assert {o.name for o in scene.objects} <= known["objects"]
        assert {scene.relation_text(k) for k in range(len(scene.relations))} <= known["relations"]


def test_boxes_bound_the_visible_masks() -> None:
    for scene in scenes():
        height, width = image(scene).shape[:2]
        covered = torch.zeros(height, width, dtype=torch.int32)
        for i, item in enumerate(scene.objects):
            m = mask(scene, i)
            assert m.shape == (height, width) and m.dtype == torch.bool
            rows, columns = np.nonzero(m.numpy())
            assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert m.sum() >= 100, f"{item.name} is hardly visible"
            covered += m
        assert covered.max() <= 1, "each pixel belongs to at most one object"


def test_masks_show_the_colour_of_their_object() -> None:
    # An object's colour is the most frequent palette colour within its mask: a mask that is off by a few pixels or
    # a name swapped with a neighbour would fail. Compared by hue, because tints and shades occur as well.
    names = sorted(COLOURS)
    palette = torch.tensor([COLOURS[n] for n in names], dtype=torch.float32)
    palette = torch.nn.functional.normalize(palette - palette.mean(1, keepdim=True), dim=1)
    right = total = 0
    for scene in scenes()[:200]:
        for i in range(len(scene.objects)):
            pixels = image(scene)[mask(scene, i)].float()
            pixels = pixels - pixels.mean(1, keepdim=True)
            strong = pixels[pixels.norm(dim=1) > 60]
            votes = (torch.nn.functional.normalize(strong, dim=1) @ palette.T).argmax(1)
            right += names[int(votes.mode().values)] == words(scene, i)[0]
            total += 1
    assert right / total > 0.97


def test_predicates_hold_in_the_image() -> None:
    seen = Counter[str]()
    for scene in scenes():
        for relation in scene.relations:
            s, o = scene.objects[relation.subject], scene.objects[relation.object]
            seen[relation.predicate] += 1
            assert HOLDS[relation.predicate](scene, relation.subject, relation.object), (
                scene.key,
                s.name,
                relation.predicate,
                o.name,
                s.box,
                o.box,
            )
    assert set(seen) == set(HOLDS) and min(seen.values()) >= 15


def _centre(scene: Scene, i: int) -> tuple[float, float]:
    x1, y1, x2, y2 = scene.objects[i].box
    return (x1 + x2) / 2, (y1 + y2) / 2


def _left_of(scene: Scene, a: int, b: int) -> bool:
    """Whether the objects are side by side, with at most a small overlap."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = scene.objects[a].box, scene.objects[b].box
    overlap = ax2 - bx1
    return overlap < 0.25 * min(ax2 - ax1, bx2 - bx1) and _centre(scene, a)[0] < bx1 and min(ay2, by2) > max(ay1, by1)


def _touch(scene: Scene, a: int, b: int, reach: int = 2) -> bool:
    grown = max_pool2d(mask(scene, a)[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0
    return bool((grown & mask(scene, b)).any())


def _within(scene: Scene, a: int, b: int, axis: int) -> bool:
    """Whether the box of `a` is inside that of `b` along an axis, within 2 pixels."""
    box_a, box_b = scene.objects[a].box, scene.objects[b].box
    return box_b[axis] - 2 <= box_a[axis] and box_a[axis + 2] <= box_b[axis + 2] + 2


def _on(scene: Scene, a: int, b: int) -> bool:
    return _touch(scene, a, b) and _within(scene, a, b, 0) and _centre(scene, a)[1] < _centre(scene, b)[1]


def _under(scene: Scene, a: int, b: int) -> bool:
    return _within(scene, a, b, 0) and _centre(scene, a)[1] > _centre(scene, b)[1] and not _on(scene, a, b)


def _inside(scene: Scene, a: int, b: int) -> bool:
    # The near wall of the container hides the foot of its content, which is visible above that wall.
    rows = np.nonzero(mask(scene, a).numpy())[0]
    below = mask(scene, b)[rows.max() + 1 :].sum()
    return _touch(scene, a, b) and _within(scene, a, b, 0) and bool(below > 0.3 * mask(scene, b).sum())


def _in_front_of(scene: Scene, a: int, b: int) -> bool:
    """`a` covers part of `b` and stands lower in the picture."""
    a_box, b_box = scene.objects[a].box, scene.objects[b].box
    return _touch(scene, a, b) and a_box[3] > b_box[3] - 1 and a_box[1] > b_box[1] + 0.3 * (b_box[3] - b_box[1])


def _behind(scene: Scene, a: int, b: int) -> bool:
    """`b` covers part of `a`, which shows above or beside it."""
    return _touch(scene, a, b) and scene.objects[a].box[3] < scene.objects[b].box[3]


def _riding(scene: Scene, a: int, b: int) -> bool:
    a_box, b_box = scene.objects[a].box, scene.objects[b].box
    return _touch(scene, a, b) and _within(scene, a, b, 0) and a_box[1] < b_box[1] + 5 and a_box[3] < b_box[3]


def _holding(scene: Scene, a: int, b: int) -> bool:
    # The toy is on a string above the head; the hand holds the lower end.
    return _touch(scene, a, b) and scene.objects[b].box[1] < scene.objects[a].box[1]


HOLDS = {
    "left of": _left_of,
    "right of": lambda scene, a, b: _left_of(scene, b, a),
    "on": _on,
    "under": _under,
    "inside": _inside,
    "in front of": _in_front_of,
    "behind": _behind,
    "riding": _riding,
    "holding": _holding,
}


def test_relations_are_inside_the_centre_crop() -> None:
    """Relation views show only the centre crop."""
    for scene in scenes():
        height, width = image(scene).shape[:2]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        for relation in scene.relations:
            for i in (relation.subject, relation.object):
                x1, y1, x2, y2 = scene.objects[i].box
                assert left - 4 <= x1 and x2 <= left + side + 4 and top - 4 <= y1 and y2 <= top + side + 4


def test_relations_determine_the_action() -> None:
    for scene in scenes():
        assert scene.action == action_of(template(scene, k)[0] for k in range(len(scene.relations)))
        assert (scene.action == "waiting") == (not scene.relations)
    counts = Counter(s.action for s in scenes())
    # 700 samples of ten actions: a standard deviation of 8 around 70.
    assert all(35 < counts[action] < 105 for action in ACTIONS)


def test_kinds_are_related_in_one_order_only() -> None:
    assert len({frozenset((t.subject, t.object)) for t in TEMPLATES}) == len({(t.subject, t.object) for t in TEMPLATES})


def test_relation_texts_are_unambiguous() -> None:
    """The text of a relation matches no other pair of the scene, and bystanders have no relations."""
    for scene in scenes():
        names = [o.name for o in scene.objects]
        related = {frozenset((r.subject, r.object)) for r in scene.relations}
        for r in scene.relations:
            assert names.count(names[r.subject]) == names.count(names[r.object]) == 1
        for i in range(len(names)):
            for j in range(i):
                if frozenset((words(scene, i)[1], words(scene, j)[1])) in RELATED:
                    assert frozenset((i, j)) in related


def test_held_out_relations_are_absent_from_the_train_split() -> None:
    pairs = defaultdict(set)
    for t, subject, object_ in HELD_OUT:
        pairs[t].add((subject, object_))
    assert {len(pairs[t]) for t in TEMPLATES} == {2}
    met: dict[str, int] = Counter()
    for scene in scenes():
        for k in range(len(scene.relations)):
            met[f"{scene.split}, held out: {template(scene, k) in HELD_OUT}"] += 1
    assert met["train, held out: True"] == 0
    evaluated = [template(s, k) for s in generate_scenes(300, 5, val=0, test=1) for k in range(len(s.relations))]
    share = sum(t in HELD_OUT for t in evaluated) / len(evaluated)
    assert 0.15 < share < 0.35


def test_each_colour_of_a_held_out_relation_is_trained_in_its_role() -> None:
    for t in TEMPLATES:
        shown = {(s, o) for s in COLOURS for o in COLOURS if s != o and (t, s, o) not in HELD_OUT}
        assert {s for s, _ in shown} == {o for _, o in shown} == set(COLOURS)


def test_split_fractions() -> None:
    for n in (100, 2500):
        counts = Counter(split_of(i) for i in range(n))
        assert abs(counts["val"] - 0.05 * n) <= 2 and abs(counts["test"] - 0.15 * n) <= 2


def test_only_the_image_reveals_the_action() -> None:
    """Key, size and listing order are independent of the action (and of the roles of the objects)."""
    by_action = defaultdict(list)
    for scene in scenes():
        by_action[scene.action].append(scene)
    heights = np.array([image(s).shape[0] for s in scenes()])
    for group in by_action.values():
        group_heights = np.array([image(s).shape[0] for s in group])
        # Four standard errors of a group's mean.
        assert abs(group_heights.mean() - heights.mean()) < 4 * heights.std() / len(group) ** 0.5
        digits = np.array([int(s.key[-1]) for s in group])
        assert abs(digits.mean() - 4.5) < 4 * 2.9 / len(group) ** 0.5
    firsts = [s.relations[0].subject < s.relations[0].object for s in scenes() if s.relations]
    assert 0.4 < np.mean(firsts) < 0.6
    places = Counter(words(s, i)[1] for s in scenes() if s.action == "riding" for i in (0,))
    assert len(places) > 3, "the first object listed is not always of the same kind"


def test_the_background_does_not_reveal_the_action() -> None:
    means = defaultdict(list)
    for scene in scenes():
        outside = ~torch.stack([mask(scene, i) for i in range(len(scene.objects))]).any(0)
        means[scene.action].append(float(image(scene)[outside].float().mean()))
    everything = np.concatenate([np.array(v) for v in means.values()])
    for values in means.values():
        assert abs(np.mean(values) - everything.mean()) < 4 * everything.std() / len(values) ** 0.5


@pytest.mark.parametrize(
    "bad", [{"n": -1}, {"n": 1, "seed": -1}, {"n": 1, "val": 0.6, "test": 0.6}, {"n": 1, "val": -1.0}]
)
def test_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"got .* expected"):
        list(generate_scenes(**bad))  # type: ignore[arg-type]
    assert list(generate_scenes(0)) == []


def test_published_layout_round_trip(tmp_path: Path) -> None:
    written = scenes()[:40]
    counts = write_published_layout(written, tmp_path / "set")
    assert counts == {f"metadata_{s}.json": n for s, n in sorted(Counter(s.split for s in written).items())}
    rejected: list[object] = []
    back = {s.key: s for s in load_reference(tmp_path / "set", rejected.append)}
    assert not rejected and len(back) == len(written)
    for scene in written:
        other = back[scene.key]
        assert (
            isinstance(other.image, bytes)
            and other.image == (tmp_path / "set/images" / f"{scene.key}.jpg").read_bytes()
        )
        assert (other.action, other.split, other.relations) == (scene.action, scene.split, scene.relations)
        assert [(o.name, o.box) for o in other.objects] == [(o.name, o.box) for o in scene.objects]
        assert all(torch.equal(mask(scene, i), mask(other, i)) for i in range(len(scene.objects)))


def test_jpegs_match_the_scenes_and_have_no_metadata(tmp_path: Path) -> None:
    import simplejpeg

    write_published_layout(scenes()[:10], tmp_path)
    for scene in scenes()[:10]:
        data = (tmp_path / "images" / f"{scene.key}.jpg").read_bytes()
        decoded = simplejpeg.decode_jpeg(data).astype(np.int16)
        assert np.abs(decoded - image(scene).numpy()).mean() < 3
        assert b"Exif" not in data and b"\xff\xfe" not in data[:200], "no metadata, no comment"


def test_files_are_independent_of_the_number_of_processes(tmp_path: Path) -> None:
    for workers in (1, 2):
        generate_published_layout(24, tmp_path / str(workers), seed=1, workers=workers)
    one, two = ({p.relative_to(r): p.read_bytes() for p in r.rglob("*.*")} for r in (tmp_path / "1", tmp_path / "2"))
    assert one == two and len(one) > 48
    classes = json.loads((tmp_path / "1" / "classes.json").read_text())
    assert classes == vocabulary()


def test_nonempty_directories_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        generate_published_layout(1, tmp_path)
    with pytest.raises(UserError, match="at least one"):
        generate_published_layout(0, tmp_path / "new")
    with pytest.raises(UserError, match="seed: got -1"):
        generate_published_layout(1, tmp_path / "new", seed=-1)
    with pytest.raises(UserError, match=r"val=0\.6 and test=0\.6"):
        generate_published_layout(1, tmp_path / "new", val=0.6, test=0.6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.txt"]
