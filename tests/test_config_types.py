"""Field types of config dataclasses: wrong ones are named, NumPy scalars and paths become plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest

from scenarioclip_fast.config_types import check_types
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import ModelConfig
from scenarioclip_fast.train.config import DataSection, OptimSection, RunSection, TrainConfig


@dataclass(frozen=True)
class Circle:
    radius: float = 1.0
    segments: int = 8
    filled: bool = True
    name: str = "circle"
    fill: Literal["solid", True] = "solid"
    centre: tuple[float, float] = (0.0, 0.0)
    layer: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "circle.")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("radius", "1", "a finite number"),
        ("radius", True, "a finite number"),
        ("radius", float("nan"), "a finite number"),
        ("segments", 8.0, "an integer"),
        ("segments", True, "an integer"),
        ("segments", None, "an integer"),
        ("filled", "false", "true or false"),
        ("filled", 0, "true or false"),
        ("name", b"circle", "text"),
        ("fill", 1, "one of solid, true"),
        ("fill", "empty", "one of solid, true"),
        ("centre", (1.0,), "2 numbers"),
        ("centre", ("a", 1.0), "a finite number"),
        ("layer", "2", "an integer, or null"),
    ],
)
def test_a_wrong_type_is_named(field: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Circle(**{field: value})
    assert str(caught.value) == f"circle.{field}: got {value!r}, expected {expected}"


def test_numpy_scalars_paths_and_lists_become_plain_values() -> None:
    circle = Circle(np.float32(0.5), np.int64(3), np.True_, Path("a/b"), True, [1, np.float64(2)], np.int32(4))  # type: ignore[arg-type]
    assert circle == Circle(0.5, 3, True, "a/b", True, (1, 2.0), 4)
    kinds = [type(getattr(circle, f.name)) for f in fields(circle)]
    assert kinds == [float, int, bool, str, bool, tuple, int] and type(circle.centre[1]) is float


class Name(StrEnum):
    CIRCLE = "circle"
    SOLID = "solid"


class Count(IntEnum):
    THREE = 3


def test_subclasses_become_plain_values_too() -> None:
    circle = Circle(segments=Count.THREE, name=np.str_("a"), fill=Name.SOLID, layer=Count.THREE)  # type: ignore[arg-type]
    assert circle == Circle(segments=3, name="a", fill="solid", layer=3)
    assert [type(getattr(circle, f.name)) for f in fields(circle)] == [float, int, bool, str, str, tuple, int]
    with pytest.raises(UserError, match=r"circle\.radius: got 1000.*, expected a finite number"):
        Circle(radius=10**400)


def test_paths() -> None:
    @dataclass(frozen=True)
    class Source:
        path: Path | None = None

        def __post_init__(self) -> None:
            check_types(self, "source.")

    assert Source("a/b") == Source(Path("a/b")) and isinstance(Source("a").path, Path)  # type: ignore[arg-type]
    assert Source().path is None
    for value in ("", 3, b"a"):
        with pytest.raises(UserError, match=r"source\.path: got .*, expected a path, or null"):
            Source(value)  # type: ignore[arg-type]


def sections(config: Any) -> list[Any]:
    return [config, *(part for f in fields(config) if is_dataclass(part := getattr(config, f.name)))]


@pytest.mark.parametrize("config", [*sections(TrainConfig()), *sections(ModelConfig())], ids=lambda c: type(c).__name__)
def test_every_config_checks_its_types(config: Any) -> None:
    for name in get_type_hints(type(config)):
        with pytest.raises(UserError, match=rf"{name}: got "):
            type(config)(**{name: object()})


def test_a_config_built_in_python_survives_a_file(tmp_path: Path) -> None:
    config = TrainConfig(
        run=RunSection(dir=tmp_path / "run", seed=np.int64(3)),  # type: ignore[arg-type]
        data=DataSection(shards=tmp_path),  # type: ignore[arg-type]
        optim=OptimSection(lr=np.float64(1e-3), betas=[0.8, 0.9]),  # type: ignore[arg-type]
    )
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config
