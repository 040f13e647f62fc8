"""Hostile configs and annotations through every command that reads them, the limit on open files, and huge batches."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign import LONG, generator, trials
from packs import downgrade_index, read_rows, write_rows
from PIL import Image
from vocabularies import use_json_vocabulary

from scenarioclip_fast import ScenarioCLIP
from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Scene, SceneObject, generate_scenes, pack, scene_loader
from scenarioclip_fast.data.samples import SampleDecoder
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import ModelConfig
from scenarioclip_fast.train.config import TrainConfig

SECONDS = 60  # a command on a tiny input takes less than two; a hang takes minutes
LONGEST = 5000  # characters of an error
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def laughs(first: str, later: str) -> bytes:
    """YAML of 20 anchors that each stand for ten of the one before."""
    lines = [f"a{i}: &a{i} " + later.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 20)]
    return "\n".join([f"a0: &a0 {first}", *lines]).encode()


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "text": b'"text"',
    "list": b"[]",
    "lists": b"[[[]]]",
    "object": b"{}",
    "truncated": b'{"data": [',
    "trailing": b"{} {}",
    "two keys": b'{"schema": 2, "schema": 2}',
    "bom": b"\xef\xbb\xbf{}",
    "utf-16": "{}".encode("utf-16"),
    "not utf-8": b'{"data": "\xff\xfe\x80"}',
    "surrogate bytes": b'{"data": "\xed\xa0\x80"}',
    "surrogate": b'{"data": "\\ud800", "\\udfff": 1}',
    "nul": b'{"data": "\x00"}',
    "nul escape": b'{"data\\u0000": "\\u0000"}',
    "nan": b'{"data": NaN, "schema": NaN}',
    "infinity": b'{"data": [Infinity, -Infinity], "schema": 1e999}',
    "digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "integer": b'{"schema": ' + b"9" * 4000 + b"}",
    "exponent": b'{"schema": 1e-99999999999}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "closed lists": b'{"schema": ' + b"[" * 500 + b"]" * 500 + b"}",
    "closed objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "long text": b'{"schema": "' + b"x" * (1 << 20) + b'"}',
    "escape": b'{"schema": "\\u001b[2J\\u202e\\u009b"}',
    "laughs": laughs("[x]", "[{}]"),
    "merged laughs": laughs("{x: 1}", "{{<<: [{}]}}"),
    "key laughs": laughs("[x]", "[{}]") + b"\n? *a19\n: 1",
    "alias chain": "\n".join(
        ["a0: &a0 [x]", *(f"a{i}: &a{i} {'[' * 50}*a{i - 1}{']' * 50}" for i in range(1, 100))]
    ).encode(),
    "own alias": b"run: &a {seed: *a}",
    "unknown alias": b"run: *a",
    "python tag": b"run: !!python/object/apply:os.system [exit]",
    "tag": b"run: !!timestamp x",
    "number tag": b"run: !!int [1]",
    "mapping tag": b"run: !!map x",
    "set": b"run: !!set {a, b}",
    "binary": b"run: {dir: !!binary aGVsbG8=}",
    "sexagesimal": b"run: {seed: 1" + b":59" * 50_000 + b"}",
    "sexagesimal float": b"run: {timeout_s: 1" + b":59" * 300 + b".5}",
    "hexadecimal": b"run: {seed: 0x" + b"f" * 5000 + b"}",
    "date": b"run: {seed: 2015-13-45}",
    "list key": b"{[1]: 2}",
    "mapping key": b"? {a: 1}\n: 2",
    "number key": b"run: {1: 2}",
    "tabs": b"run:\n\tseed: 1",
    "documents": b"--- {}\n--- {}",
    "equals": b"run: {=: 1}",
    "many": b"run: [" + b"a," * 200_000 + b"]",
    "inf": b"optim: {lr: .inf}",
    "not a number": b"optim: {lr: .nan}",
}  # fmt: skip

VALUES: list[Any] = [
    None,
    True,
    -1,
    1e308,
    10**40,
    10**4000,
    float("inf"),
    float("nan"),
    "",
    "\x1b[2J\u202e\n",
    "\ud800",
    "\0",
    "../../x",
    "x" * 100_000,
    [],
    {},
    [None],
    {"size": [1, 1]},
    eval("[" * 60 + "]" * 60),
]


def json_bytes(document: Any) -> bytes:
    return json.dumps(document).encode()


def mutate(document: Any, rng: random.Random) -> Any:
    """A copy in which a value somewhere is replaced or removed, or a key has another name."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []
    rest = [document]
    while rest:
        item = rest.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += [(item, key) for key in keys]
        rest += [item[key] for key in keys]
    item, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.1:
        del item[key]
    elif kind < 0.15 and isinstance(item, dict):
        item[str(rng.choice(VALUES))[:1000] if rng.random() < 0.5 else f"{key}\x1b"] = item.pop(key)
    else:
        item[key] = rng.choice(VALUES)
    return document


@dataclass
class Reader:
    """A command that reads a foreign text: where the text is put, a valid document, and the command line."""

    put: Callable[[bytes], object]
    valid: Any
    arguments: list[str]
    outputs: list[Path]


class World:
    """A small data set in each format, a pack, a model and a run, with the readers of their texts."""

    def __init__(self, root: Path) -> None:
        self.root, self.readers = root, {}
        self._published()
        self._tars()
        self._annotations()
        self._packs_and_models()
        self._runs()

    def add(self, name: str, file: Path, valid: Any, *arguments: str | Path, out: Path | None = None) -> None:
        content = json_bytes(valid) if isinstance(valid, dict | list) else valid
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        outputs = [] if out is None else [out]
        self.readers[name] = Reader(file.write_bytes, valid, list(map(str, arguments)), outputs)

    def add_pack(self, name: str, file: Path, valid: Any, *arguments: str | Path) -> None:
        out = self.root / "packed"
        self.add(name, file, valid, "pack", *arguments, "--out", out, "--workers", "1", out=out)

    def image(self, path: Path, grey: int = 128) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), grey, np.uint8)).save(path)

    def _published(self) -> None:
        folder = self.root / "set"
        write_published_layout(list(generate_scenes(6, seed=1)), folder)
        for file in (*sorted(folder.glob("metadata*.json"))[:1], folder / "classes.json"):
            self.add_pack(f"published {file.stem.partition('_')[0]}", file, json.loads(file.read_text()), folder)

    def _tars(self) -> None:
        folder = self.root / "tars"
        folder.mkdir()
        image = BytesIO()
        Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(image, "JPEG")
        objects = [{"name": f"o{i}", "box": [0, 0, 20 + i, 30], "mask": None} for i in range(3)]
        valid = {
            "schema": 2,
            "size": [40, 60],
            "action": "running",
            "caption": "A caption.",
            "scores": {"a": 0.5},
            "objects": objects,
            "relations": [{"subject": 0, "predicate": "on", "object": 1, "negatives": ["o1 on o0"]}],
        }

        def write(content: bytes) -> None:
            with tarfile.open(folder / "a.tar", "w") as tar:
                for key, record in (("a", json_bytes(valid)), ("b", content)):
                    for name, data in ((f"{key}.jpg", image.getvalue()), (f"{key}.json", record)):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, BytesIO(data))

        out = self.root / "packed"
        write(json_bytes(valid))
        arguments = ["pack", str(folder), "--out", str(out), "--allow-empty-level"]
        self.readers["webdataset"] = Reader(write, valid, arguments, [out])

    def _annotations(self) -> None:
        root = self.root
        for name in ("1", "2"):
            self.image(root / "images" / f"{name}.jpg")
        ids = np.zeros((40, 60, 3), np.uint8)
        ids[:20, :, 0], ids[20:, :, 0] = 1, 2
        (root / "images" / "panoptic").mkdir()
        for folder in (root / "images", root / "images" / "panoptic", root / "coco" / "panoptic_train2017"):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("1", "2"):
                Image.fromarray(ids).save(folder / f"{name}.png")
        segments = [{"id": i, "category_id": i - 1, "iscrowd": 0, "isthing": 1, "area": 1200} for i in (1, 2)]
        boxes = [[0, 0, 60, 20], [0, 20, 60, 40]]
        psg = {
            "data": [
                {
                    "file_name": f"{name}.jpg",
                    "height": 40,
                    "width": 60,
                    "image_id": name,
                    "pan_seg_file_name": f"{name}.png",
                    "segments_info": segments,
                    "relations": [[0, 1, 1]],
                    "annotations": [{"bbox": box, "bbox_mode": 0, "category_id": i} for i, box in enumerate(boxes)],
                }
                for name in ("1", "2")
            ],
            "thing_classes": ["person", "bike"],
            "stuff_classes": ["floor"],
            "predicate_classes": ["on", "riding"],
            "test_image_ids": [],
        }
        images = ["--images", root / "images", "--allow-empty-level"]
        self.add_pack("psg", root / "psg" / "psg.json", psg, root / "psg" / "psg.json", *images)
        actions = root / "actions.json"
        self.add_pack(
            "actions",
            actions,
            {"1": "running", "2.jpg": "riding"},
            root / "psg" / "psg.json",
            "--actions",
            actions,
            *images,
        )
        captions = {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"id": 7, "image_id": 1, "caption": "A person."}],
        }
        self.add_pack(
            "captions",
            root / "captions.json",
            captions,
            root / "psg" / "psg.json",
            "--actions",
            root / "captions.json",
            *images,
        )
        coco = {
            "images": [{"file_name": f"{i}.jpg", "height": 40, "width": 60, "id": i} for i in (1, 2)],
            "annotations": [
                {
                    "segments_info": [
                        {"id": k, "category_id": k, "iscrowd": 0, "bbox": box, "area": 1200}
                        for k, box in ((1, [0, 0, 60, 20]), (2, [0, 20, 60, 20]))
                    ],
                    "file_name": f"{i}.png",
                    "image_id": i,
                }
                for i in (1, 2)
            ],
            "categories": [{"id": k, "name": f"thing {k}", "isthing": 1} for k in (1, 2)],
        }
        file = root / "coco" / "panoptic_train2017.json"
        self.add_pack("coco-panoptic", file, coco, file, "--format", "coco-panoptic", *images)
        genome = root / "genome"
        things = [
            {"object_id": k, "names": [f"thing {k}"], "x": 1, "y": 2, "w": 30, "h": 20, "synsets": []} for k in (1, 2)
        ]
        objects = [{"image_id": i, "objects": things} for i in (1, 2)]
        relations = [
            {
                "image_id": i,
                "relationships": [{"relationship_id": 5, "predicate": "on", "subject": things[0], "object": things[1]}],
            }
            for i in (1, 2)
        ]
        data = [{"image_id": i, "width": 60, "height": 40} for i in (1, 2)]
        for name, valid in (("objects", objects), ("relationships", relations), ("image_data", data)):
            self.add_pack(f"visual-genome {name}", genome / f"{name}.json", valid, genome, *images)
        swig = root / "swig" / "SWiG_jsons"
        space = {
            "nouns": {"n1": {"gloss": ["person"], "def": "x"}, "n2": {"gloss": ["cup"], "def": "y"}},
            "verbs": {
                "stirring": {
                    "abstract": "the AGENT stirs with a TOOL",
                    "order": ["agent", "tool"],
                    "roles": {"agent": {"framenet": "agent"}},
                }
            },
        }
        entry = {
            "verb": "stirring",
            "height": 40,
            "width": 60,
            "bb": {"agent": [0, 0, 30, 20], "tool": [5, 6, 50, 30]},
            "frames": [{"agent": "n1", "tool": "n2"}] * 3,
        }
        for name, valid in (("imsitu_space", space), ("train", {"1.jpg": entry, "2.jpg": entry})):
            self.add_pack(f"swig {name}", swig / f"{name}.json", valid, swig, *images)

    def _packs_and_models(self) -> None:
        root = self.root
        directory = root / "pack"
        pack(generate_scenes(8, seed=0, val=0.0, test=0.25), directory, progress=False)
        use_json_vocabulary(directory)
        downgrade_index(directory)
        drawn = ["--split", "train", "--scenes", "1", "--size", "32", "--out", root / "inspected"]
        for name in ("manifest", "index", "vocabulary"):
            file = directory / f"{name}.json"
            valid = json.loads(file.read_text())
            self.add(f"pack {name}", file, valid, "inspect", directory, *drawn)
        config = ModelConfig.preset("tiny").to_dict()
        config["embed_dim"] = config["vision"]["width"] = config["text"]["width"] = 32
        config["vision"] |= {"layers": 1, "image_size": 32}
        config["text"]["layers"] = 1
        ScenarioCLIP(ModelConfig.from_dict(config)).save_pretrained(root / "model")
        (root / "model" / "SHA256SUMS").unlink()  # which would detect every change
        file = root / "model" / "config.json"
        valid = json.loads(file.read_text())
        exported = root / "exported"
        self.add("model export", file, valid, "export", root / "model", "--to", "safetensors", "--out", exported)
        self.add("model eval", file, valid, "eval", "retrieval", root / "model", directory, "--split", "train")
        self.add("model embed", file, valid, "embed", root / "model", root / "images", "--out", root / "embedded.npz")

    def _runs(self) -> None:
        root = self.root
        config = TrainConfig.of({}, ["model.preset=tiny", "train.steps=3"]).to_dict()
        self.add("train -c", root / "config.yaml", config, "train", "-c", root / "config.yaml", "--print-config")
        shards = root / "pack"
        self.add(
            "ablate -c",
            root / "study.yaml",
            {"data": {"shards": "no such directory"}},
            "ablate",
            "-c",
            root / "study.yaml",
        )
        run = root / "run"
        row = {"step": 1, "loss": 4.0, "contrastive/global": 1.0, "temperature/global": 0.07, "grad_norm": None}
        row |= {"skipped": 0, "lr": 1e-3, "views": 50, "scenes_per_s": 10.0, "views_per_s": 100.0, "data_wait": 0.25}
        row |= {"tflop_per_s": 0.1, "bad_samples": 0, "distillation": 0.0, "memory_gib": 1.0}
        accuracy = {"level": "global", "match": "own", "subset": "all", "views": 8, "classes": 8}
        result = {"split": "test", "scenes": 8, "topk": [1, 5]}
        result["rows"] = [accuracy | {"top": {"1": 0.5, "5": 0.7}, "chance": {"1": 0.1, "5": 0.6}}]
        report = ["report", run, "--out", root / "reported"]
        (root / "run").mkdir()
        self.add("run config", run / "config.yaml", config, *report)
        self.add("run result", run / "zeroshot.json", result, *report)
        self.add("run metrics", run / "metrics.jsonl", row, *report)
        put = self.readers["run metrics"].put
        line = json_bytes(row) + b"\n"
        put(line)
        self.readers["run metrics"].put = lambda content: put(line + content.replace(b"\n", b" ") + b"\n" + line)
        part = {"name": "ema", "command": "x", "commit": "y", "started": "z", "note": "", "before": {}, "after": {}}
        part |= {"results": [], "left_out": [], "failed": [], "seconds": 1.0, "exit": 0}
        machine = {"versions": {"torch": "2"}, "kind": "cpu", "device": "a CPU"}
        record = {"format": 1, "machine": machine, "parts": [part]}
        self.add(
            "record", root / "record.json", record, "bench", "--report", root / "record.json", "--out", root / "pages"
        )
        self.shards = shards


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@contextmanager
def alarm() -> Iterator[None]:
    def expire(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], codes: tuple[int, ...] = (0, 2)) -> str:
    """Run a command; check its exit code and what it prints; return its standard error."""
    capsys.readouterr()
    with alarm():
        try:
            code = main(arguments)
        except SystemExit as exit_:  # of argparse
            code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code in codes, err[:1000]
    assert not CONTROL.search(out + err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2), err[:1000]
    assert max(map(len, errors), default=0) < LONGEST
    assert "Traceback" not in err
    return err


def feed(world: World, name: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    reader = world.readers[name]
    reader.put(content)
    for out in reader.outputs:
        shutil.rmtree(out, ignore_errors=True)
    try:
        run(reader.arguments, capsys)
    finally:
        reader.put(json_bytes(reader.valid))


READERS = [
    "published metadata",
    "published classes",
    "webdataset",
    "psg",
    "actions",
    "captions",
    "coco-panoptic",
    "visual-genome objects",
    "visual-genome relationships",
    "visual-genome image_data",
    "swig imsitu_space",
    "swig train",
    "pack manifest",
    "pack index",
    "pack vocabulary",
    "model export",
    "model eval",
    "model embed",
    "train -c",
    "ablate -c",
    "run config",
    "run result",
    "run metrics",
    "record",
]


SLOW = ("pack", "model", "run")  # these draw figures or load a model


def test_the_readers_read_what_is_valid(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(world.readers) == sorted(READERS)
    for name, reader in world.readers.items():
        if name.startswith(SLOW) and not LONG:
            continue
        for out in reader.outputs:
            shutil.rmtree(out, ignore_errors=True)
        reader.put(json_bytes(reader.valid))
        err = run(reader.arguments, capsys)
        assert "error: " not in err or name == "ablate -c", f"{name}: {err}"


@pytest.mark.parametrize("name", READERS)
def test_hostile_texts_are_one_error(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rng = generator(name)
    texts = list(TEXTS)
    for text in rng.sample(texts, trials(1 if name.startswith(SLOW) else 5, len(texts))):
        try:
            feed(world, name, TEXTS[text], capsys)
        except BaseException as error:
            raise AssertionError(f"{name}: text {text!r}") from error


@pytest.mark.parametrize("name", READERS)
def test_hostile_values_are_one_error(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rng = generator(f"{name} values")
    for _ in range(trials(1 if name.startswith(SLOW) else 3, 100)):
        document = mutate(world.readers[name].valid, rng)
        try:
            content = json_bytes(document)
        except ValueError:  # an integer of too many digits
            content = json_bytes(mutate(world.readers[name].valid, rng))
        try:
            feed(world, name, content, capsys)
        except BaseException as error:
            raise AssertionError(f"{name}: {content[:3000]!r}") from error


def run_limited(code: str, soft: int, hard: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that may have so many open files."""
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
    command = [sys.executable, "-c", limit + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs of 600 scenes each, one scene per shard: 20 scenes, whose shards have several names."""
    few = tmp_path_factory.mktemp("few")
    pack(generate_scenes(20, seed=3, val=0.0, test=0.0), few, shard_size=1, progress=False)
    root = tmp_path_factory.mktemp("many")
    manifest, index = json.loads((few / "manifest.json").read_text()), read_rows(few)
    shards = manifest["splits"]["train"]["shards"]
    for part in range(2):
        folder = root / str(part)
        folder.mkdir()
        found = {"shards": [], "index": {}}
        for i in range(SHARDS // 2):
            shard = shards[i % 20]
            name = f"train-{i:06d}.tar"
            os.link(few / shard["name"], folder / name)
            found["shards"].append(shard | {"name": name})
            found["index"][name] = [[f"{part}-{i}", *row[1:]] for row in index[shard["name"]]]
        content = copy.deepcopy(manifest)
        content["splits"]["train"] |= {"shards": found["shards"], "scenes": SHARDS // 2}
        (folder / "manifest.json").write_text(json.dumps(content))
        write_rows(folder, found["index"])
        shutil.copy(few / "vocabulary.bin", folder)
    return root


SHARDS = 2000
EPOCH = """
from scenarioclip_fast.data import LoaderConfig, SceneLoader
paths, decoder = sys.argv[1:-1], sys.argv[-1]
config = LoaderConfig(augment=False, decoder=decoder, threads=8, relation_view="scene", prefetch=2)
loaders = [SceneLoader(paths, 50, config, size=8, epochs=1, seed=i) for i in range(2)]
keys = [set(), set()]
for batches in zip(*loaders):
    for seen, batch in zip(keys, batches):
        seen.update(batch.keys)
print(*map(len, keys), *(sum(loader.bad.values()) for loader in loaders), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(64, 64, 64), (64, 100_000, 4096)][: trials(1, 2)])
def test_a_mix_of_2000_shards_with_64_open_files(many_shards: Path, soft: int, hard: int, raised: int) -> None:
    """Two loaders of a process share the limit."""
    hard = min(hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    done = run_limited(EPOCH, soft, hard, many_shards / "0", many_shards / "1", "torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(SHARDS), str(SHARDS), "0", "0", str(raised)]


EXHAUSTED = """
import os
from scenarioclip_fast.data import ShardSet
shards = ShardSet(sys.argv[1])
shards.read(0)
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
shards.read(1)  # closes the first shard
shards.close()
taken.append(os.open(os.devnull, os.O_RDONLY))
shards.read(1)
"""


def test_no_file_can_be_opened(many_shards: Path) -> None:
    done = run_limited(EXHAUSTED, 64, 64, many_shards / "0")
    line = done.stderr.splitlines()[-1]
    assert "UserError" in line and "too many open files, the limit of this process is 64" in line
    assert "ulimit -n 4096" in line and "line 16" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven scenes of 64 x 64 pixels and one of 4096 x 1024."""
    scenes = []
    for i in range(8):
        stream = BytesIO()
        shape = (1024, 4096, 3) if i == 5 else (64, 64, 3)
        Image.fromarray(np.zeros(shape, np.uint8)).save(stream, "JPEG")
        objects = [SceneObject("thing", (0, 0, 60, 60))]
        key = "panorama" if i == 5 else f"scene{i}"
        scenes.append(Scene(key, stream.getvalue(), "standing", objects, split="train"))
    directory = tmp_path_factory.mktemp("large")
    pack(scenes, directory, progress=False, allow_empty_level=True)
    return directory


@pytest.mark.parametrize("cached", [0.0, 0.1])
def test_a_batch_that_exceeds_its_limit_is_not_decoded(
    large_images: Path, cached: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (7 * 64 * 64 + 4096 * 1024) * 3
    options: dict[str, Any] = {"augment": False, "size": 16, "shuffle": False, "cache_gib": cached}
    options["relation_view"] = "scene"
    with scene_loader(large_images, 8, max_batch_gib=size / 2**30, **options) as loader:
        assert sum(len(batch.keys) for batch in loader) == 8
        assert sum(len(batch.keys) for batch in loader) == 8, "also from the cache"
    decoded: list[int] = []

    def decode(self: SampleDecoder, images: list[bytes]) -> list[Any]:
        decoded.append(len(images))
        return [torch.zeros(64, 64, 3, dtype=torch.uint8) for _ in images]

    monkeypatch.setattr(SampleDecoder, "_decode", decode)  # the check needs no decoder
    with (
        scene_loader(large_images, 8, max_batch_gib=(size - 1) / 2**30, **options) as loader,
        pytest.raises(UserError, match=r"8 scenes take 0\.0118 GiB, .* panorama, has 4096 x 1024"),
    ):
        next(iter(loader))
    assert not decoded


def test_replacements_of_bad_scenes_count(large_images: Path, tmp_path: Path) -> None:
    """The rest of a batch is decoded after the first scenes of it turned out to be bad."""
    broken = tmp_path / "broken"
    shutil.copytree(large_images, broken)
    ((name, entries),) = read_rows(broken).items()
    order = [entry[0] for entry in entries]
    offset, count = entries[0][1:3]
    with (broken / name).open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * count)
    assert order[0] != "panorama"
    options: dict[str, Any] = {"augment": False, "size": 16, "shuffle": False, "max_bad_fraction": 1.0}
    options["relation_view"] = "scene"
    ahead = order.index("panorama")  # the batch is full with the panorama in place of the broken scene
    limit = ((ahead - 1) * 64 * 64 + 4096 * 1024) * 3
    with scene_loader(broken, ahead, max_batch_gib=limit / 2**30, **options) as loader:
        assert len(next(iter(loader)).keys) == ahead
    with (
        scene_loader(broken, ahead, max_batch_gib=(limit - 1) / 2**30, **options) as loader,
        pytest.raises(UserError, match="panorama"),
    ):
        next(iter(loader))


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
@pytest.mark.parametrize("section", ["run", "data"])
def test_a_path_that_no_file_can_have(section: str, path: str) -> None:
    key = {"run": "dir", "data": "shard_cache_dir"}[section]
    with pytest.raises(UserError, match=rf"^{section}\.{key}: got .*, expected text"):
        TrainConfig.of({section: {key: path}})
    assert TrainConfig.of({section: {key: "\udcff"}}), "a byte that is not UTF-8"
