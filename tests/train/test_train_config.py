from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from scenarioclip_fast.config_parse import dotted_keys, packaged_configs
from scenarioclip_fast.data import ShardSource
from scenarioclip_fast.data.decode import MAX_PIXELS
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import ModelConfig
from scenarioclip_fast.train import config_reference
from scenarioclip_fast.train.config import ModelSection, TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def test_defaults_are_the_papers_model() -> None:
    assert TrainConfig().data.max_pixels == MAX_PIXELS
    assert TrainConfig().model.architecture == ModelConfig()
    assert TrainConfig.of() == TrainConfig()


def test_overrides_are_typed_by_their_key() -> None:
    config = TrainConfig.of(
        {},
        [
            "optim.lr=1e-3",
            "train.steps=3e2",
            "run.dir=12",
            "data.augment=no",
            "model.init=null",
            "optim.betas=[0.8, 0.9]",
        ],
    )
    assert config.optim.lr == 1e-3
    assert config.train.steps == 300 and isinstance(config.train.steps, int)
    assert config.run.dir == "12"
    assert config.data.augment is False
    assert config.model.init is None
    assert config.optim.betas == (0.8, 0.9)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("on", True), ("false", False)])
def test_compile_is_a_bool_or_auto(text: str, value: bool | str, tmp_path: Path) -> None:
    config = TrainConfig.of({}, [f"train.compile={text}"])
    assert config.train.compile == value and type(config.train.compile) is type(value)
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config
    (tmp_path / "other.yaml").write_text(f"train: {{compile: {text}}}")
    assert TrainConfig.load(tmp_path / "other.yaml") == config
    assert config.train.compiles_on("cuda") == (value is not False)
    assert config.train.compiles_on("cpu") == (value is True)
    assert TrainConfig.of({}, ["train.cuda_graphs=true", f"train.compile={text}"]).train.cuda_graphs


def test_only_fast_compiles_the_blocks_by_default() -> None:
    compiles = {path.stem: TrainConfig.load(path).train.compile for path in CONFIGS.glob("*.yaml")}
    assert compiles == {"fast": "auto", "reference": False, "tiny": False}
    assert TrainConfig().train.compile is False


def test_a_preset_is_the_base_of_the_other_model_keys() -> None:
    config = TrainConfig.of({"model": {"preset": "tiny", "vision": {"layers": 2}}}, ["model.variant=scenarioclip0"])
    tiny = ModelConfig.preset("tiny")
    assert config.model.vision.layers == 2
    assert config.model.vision.width == tiny.vision.width
    assert config.model.text == tiny.text
    assert config.model.variant == "scenarioclip0"
    assert ModelSection.preset("tiny").architecture == tiny


def test_a_budget_override_replaces_the_budget_of_the_file() -> None:
    config = TrainConfig.of({"train": {"epochs": 12}}, ["train.steps=5"])
    assert (config.train.steps, config.train.epochs) == (5, None)
    with pytest.raises(UserError, match=r"train\.steps and train\.epochs"):
        TrainConfig.of({"train": {"epochs": 12, "steps": 5}})


def test_a_saved_config_loads_unchanged(tmp_path: Path) -> None:
    overrides = ["optim.lr=3e-4", "train.views=1000", "train.profile=[3, 5]", "data.shards=x"]
    config = TrainConfig.of({"model": {"preset": "tiny"}}, overrides)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.weigth_decay=1", r"unknown config key optim\.weigth_decay: did you mean optim\.weight_decay\?"),
        ("train.lr=1", r"unknown config key train\.lr: did you mean optim\.lr\?"),
        ("optim.learning_rate=1", r"did you mean optim\.lr\?"),
        ("model.vision.widht=1", r"did you mean model\.vision\.width\?"),
        ("model.prest=tiny", r"did you mean model\.preset\?"),
        ("zzz=1", r"unknown config key zzz: the nearest is \w+; expected one of run, data, model"),
        ("optim.lr=fast", r"optim\.lr: got 'fast', expected a finite number"),
        ("optim.lr=nan", r"optim\.lr: got 'nan', expected a finite number"),
        ("run.seed=9223372036854775808", r"run\.seed: got 9223372036854775808, expected from 0 to 2\*\*63 - 1"),
        ("optim.lr=0", r"optim\.lr: got 0.0, expected above 0"),
        ("data.batch_size=1.5", r"data\.batch_size: got 1\.5 \(float\), expected an integer"),
        ("data.batch_size=true", r"data\.batch_size: got True \(bool\), expected an integer"),
        ("data.augment=1", r"data\.augment: got 1 \(int\), expected true or false"),
        ("data.prefetch=-1", r"^data\.prefetch: got -1, expected at least 0"),
        ("data.batch_size=0", r"^data\.batch_size: got 0, expected at least 1"),
        ("data=x", r"data: got 'x', expected a section"),
        ("run.precision=fp8", r"run\.precision: got 'fp8', expected one of float32, tf32, bf16"),
        ("optim.betas=0.9", r"optim\.betas: got 0\.9 \(float\), expected a list of 2 numbers"),
        ("model.vision.width=100", r"model\.vision\.width: got 100, expected a multiple of"),
        ("model.freeze.text_blocks=13", r"model\.freeze\.text_blocks: got 13, expected at most"),
        ("model.preset=huge", r"model\.preset: got 'huge', expected one of vit-b-32, tiny"),
        ("optim.lr", r"got 'optim\.lr', expected key=value"),
        ("tiny.yaml", r"got 'tiny\.yaml', expected key=value: did you mean -c tiny\.yaml\?"),
        ("optim.lr=[", r"optim\.lr: got '\[', which is not a YAML value"),
        (
            "loss.init_temperature=0.005",
            r"loss\.init_temperature: got 0\.005, expected at least 1 / loss\.max_scale = 0\.01",
        ),
        ("train.steps=0", r"train\.steps: got 0, expected above 0"),
        ("train.accumulate=0", r"train\.accumulate: got 0, expected above 0"),
        ("train.accum_freq=2", r"did you mean train\.accumulate\?"),
        ("train.profile=[5, 4]", r"train\.profile: got \(5, 4\), expected the first and the last step"),
        ("train.profile=[0, 4]", r"train\.profile: got \(0, 4\), expected the first and the last step"),
        ("train.profile=5", r"train\.profile: got 5 \(int\), expected a list of 2 numbers"),
        ("train.compile=maybe", r"train\.compile: got 'maybe', expected one of true, false, auto"),
        ("train.compile=1", r"train\.compile: got 1 \(int\), expected one of true, false, auto"),
        ("train.compile=null", r"train\.compile: got None \(null\), expected one of true, false, auto"),
        ("data.shards=[]", r"^data\.shards: got an empty list, expected at least one data set"),
        ("data.shards=[a, b", r"^data\.shards: got '\[a, b', which is not a YAML value"),
        ("data.shards={path: a}", r"^data\.shards: got a mapping, expected a path, or a list such as"),
        ("data.shards=[{path: a, weight: 0}]", r"^data\.shards\[0\]\.weight: got 0, expected above 0"),
        ("data.shards=[{path: a, weight: nan}]", r"^data\.shards\[0\]\.weight: got nan, expected a finite number"),
        (
            "data.shards=[{path: a, weight: 1, weight: 2}]",
            r"^data\.shards: got .*: key 'weight' occurs in line 1",
        ),
        ("data.shards=[b, {path: a, wieght: 2}]", r"^data\.shards\[1\]: unknown key 'wieght': did you mean weight\?"),
        ("a,", r"got 'a,', expected key=value: quote a list that contains spaces"),  # of data.shards=[a, b], unquoted
        ("train.compile=[", r"train\.compile: got '\[', which is not a YAML value"),
    ],
)
def test_an_error_names_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig.of({}, [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "a"),
        ("[a]", "a"),
        ("[a, ./b]", (ShardSource("a"), ShardSource("./b"))),
        (
            "[{path: a, weight: 2}, {path: 's3://b/c', weight: 5e-1}]",
            (ShardSource("a", 2), ShardSource("s3://b/c", 0.5)),
        ),
        ("[{path: a, weight: 2}, b]", (ShardSource("a", 2), ShardSource("b"))),
    ],
)
def test_data_sets_of_a_file_and_of_an_override(text: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{shards: {text}}}")
    config = TrainConfig.load(tmp_path / "config.yaml")
    assert config.data.shards == expected
    assert TrainConfig.of({"data": {"shards": "x"}}, [f"data.shards={text}"]) == config
    assert TrainConfig.load(tmp_path / "config.yaml", ["data.shards=x"]).data.shards == "x"
    config.save(tmp_path / "saved.yaml")
    assert TrainConfig.load(tmp_path / "saved.yaml") == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize("value", ["'[a, b]'", "null", "7", "[a, a]", "[{path: a, weight: two}]"])
def test_malformed_data_sets_of_a_file(value: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{shards: {value}}}")
    with pytest.raises(UserError, match=r"^data\.shards.*: got ") as caught:
        TrainConfig.load(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "optim: 3", "optim: {lr: x}", "{", "optim: {1: 2}"])
def test_a_malformed_file_gives_a_one_line_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        TrainConfig.load(path)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        TrainConfig.load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        TrainConfig.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {dir: é}".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: byte 11 is not UTF-8 text"):
        TrainConfig.load(tmp_path / "latin.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configs_are_valid_and_name_every_key_they_set(path: Path) -> None:
    config = TrainConfig.load(path)
    assert TrainConfig.of(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert [config.train.steps, config.train.epochs, config.train.views].count(None) == 2


def test_only_the_reference_config_keeps_the_quirks_of_the_published_run() -> None:
    reference, fast = (TrainConfig.load(CONFIGS / f"{name}.yaml") for name in ("reference", "fast"))
    assert (reference.optim.decay_logit_scale, fast.optim.decay_logit_scale) == (True, False)
    assert (reference.model.freeze.pre_layernorm, fast.model.freeze.pre_layernorm) == (False, True)
    assert (reference.data.blur, fast.data.blur) == ("reference", "rgb")
    assert (reference.loss.distillation_scale, fast.loss.distillation_scale) == (1, fast.model.embed_dim)
    assert replace(fast.loss, distillation_scale=1.0) == reference.loss
    assert (reference.optim.lr, reference.data.batch_size, reference.train.epochs) == (2e-5, 128, 12)


def test_every_key_and_section_has_a_meaning() -> None:
    """A meaning is the string literal below a dataclass field."""
    sections = config_reference.sections()
    keys = [key for section in sections for key in section.keys]
    assert [key.name for key in keys if not key.meaning] == []
    assert [section.name for section in sections if not section.description] == []
    names = {key.name for key in keys} | {section.name for section in sections}
    assert names == {*dotted_keys(TrainConfig), "model.preset"}


def test_the_reference_shows_types_and_defaults_in_yaml_notation() -> None:
    keys = {key.name: key for section in config_reference.sections() for key in section.keys}
    assert [keys["train.compile"].type, keys["train.compile"].default] == ["true | false | auto", "false"]
    assert [keys["optim.betas"].type, keys["optim.betas"].default] == ["[float, float]", "[0.9, 0.999]"]
    assert [keys["train.epochs"].type, keys["train.epochs"].default] == ["float | null", "null"]
    assert keys["model.preset"].type == "vit-b-32 | tiny"
    assert keys["data.shards"].type == "str | [{path: str, weight: float}, ...]"
    overrides = [f"{key.name}={key.default}" for key in keys.values()]
    assert TrainConfig.of({}, [text for text in overrides if text != 'data.shards=""']) == TrainConfig()


def test_the_reference_as_text_and_as_a_page() -> None:
    text = config_reference.text(width=80)
    assert max(map(len, text.splitlines())) <= 100  # the longest list of choices
    page = config_reference.markdown()
    for section in config_reference.sections():
        assert f"\n{section.name}: " in text
        assert f"\n## {section.name}\n" in page
        for key in section.keys:
            assert f"\n  {key.name} " in text
            assert f"\n| `{key.name}` |" in page
    assert "| `model.vision.image_size` | `224` | `64` |" in page


def test_configs_of_the_package_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in packaged_configs().items():
        assert TrainConfig.load(name) == TrainConfig.load(file)
    (tmp_path / "tiny").write_text("optim: {lr: 0.5}")
    assert TrainConfig.load("tiny").optim.lr == 0.5  # a file takes precedence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\ntrain:\n  steps: 2\noptim:\n  eps: 1\n", "'optim' occurs in line 1 and again in line 5"),
        ("optim:\n  lr: 1\n  lr: 2\n", "'lr' occurs in line 2 and again in line 3"),
        ("optim: {lr: 1, lr: 2}\n", "'lr' occurs in line 1 and again in line 1"),
    ],
)
def test_a_repeated_key_of_a_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=f"config\\.yaml: key {message}"):
        TrainConfig.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["run: &a {seed: *a}\n", "optim: {lr: 2015-13-45}\n", "optim: " + 3000 * "["])
def test_yaml_that_cannot_be_read_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: (not YAML|nested|month)"):
        TrainConfig.load(tmp_path / "config.yaml")


def test_values_of_python_code() -> None:
    config = TrainConfig.of({"run": {"dir": Path("x"), "seed": np.int64(4)}, "optim": {"lr": np.float32(0.5)}})
    assert config == TrainConfig.of({"run": {"dir": "x", "seed": 4}, "optim": {"lr": 0.5}})
    assert TrainConfig.of({"run": {"seed": "12345678901234567"}}).run.seed == 12345678901234567
    with pytest.raises(UserError, match=r"overrides: got the text 'run\.seed=3', expected a list"):
        TrainConfig.of(None, "run.seed=3")


def test_a_dotted_key_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run.seed: 7\n")
    with pytest.raises(UserError, match=r"unknown config key 'run\.seed': write it as seed in the section run"):
        TrainConfig.load(tmp_path / "config.yaml")
