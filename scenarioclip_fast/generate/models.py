"""What the stages with vision models share: loading checkpoints, decoding images ahead of a model, batches that fit."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.generate.config import Dtype
from scenarioclip_fast.generate.stages import Images, Outcome, Work, load_class
from scenarioclip_fast.requirements import import_problem, require
from scenarioclip_fast.terminal import get_logger, one_line

_log = get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 2  # that decode: models take longer than that
_MAX_ASPECT = 16


def load_custom(model: str, setting: str, method: str, config: Any, device: torch.device) -> Any:
    """Create the class named by MODULE:CLASS; None if `model` is not of this form.

    Args:
        setting: the config key, for errors.
        method: that the class must have.

    Raises:
        UserError: it cannot be imported, is no class, or lacks the method.
    """
    found = find_custom(model, setting, method)
    if found is None:
        return None
    with own_errors(model, setting, "its constructor"):
        return found(config, device)


def find_custom(model: str, setting: str, method: str) -> Any:
    """The class named by MODULE:CLASS, see `load_custom`; None if `model` is not of this form."""
    found = load_class(model, setting)
    if found is None:
        return None
    if not isinstance(found, type) or not callable(getattr(found, method, None)):
        what = "has no method" if isinstance(found, type) else "is no class with a method"
        raise UserError(
            f"{setting}: {model} {what} {method}; see the heading 'Models of your own' of docs/generation.md"
        )
    return found


def check_model(model: str, setting: str, method: str, kinds: Mapping[str, tuple[str, str, str]]) -> None:
    """Check, without loading it, that a model can be loaded: a class of one's own, or a checkpoint of transformers.

    Args: see `load_custom` and `load_checkpoint`.

    Raises:
        UserError: there is no such class or checkpoint, or it is of another kind.
        MissingDependencyError: transformers is not installed.
    """
    if find_custom(model, setting, method) is None:
        read_config(model, setting, kinds)


@contextmanager
def own_errors(model: str, setting: str, what: str) -> Iterator[None]:
    """Turn what a class of the user's own raises into one line.

    Args:
        model: MODULE:CLASS.
        setting: the config key.
        what: method that is called.

    Raises:
        UserError: any exception, but those that the package reports itself.
        torch.OutOfMemoryError: as it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, UserError, MissingDependencyError):
        raise
    except Exception as error:
        module = sys.modules.get(model.partition(":")[0])
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)] or frames
        at = f"{Path(theirs[-1].filename).name}, line {theirs[-1].lineno}"
        what = f"{what} raised {type(error).__name__}{': ' if str(error) else ''}{one_line(error)}"
        raise UserError(
            f"{setting}: {model}: {what} ({at}); for the traceback, call scenarioclip_fast.generate.generate in Python"
        ) from error


def load_checkpoint(
    name: str, setting: str, kinds: Mapping[str, tuple[str, str, str]], dtype: Dtype, device: torch.device
) -> tuple[str, Any, Any]:
    """Load a checkpoint of transformers for inference.

    Args:
        name: path or hub id.
        setting: the config key, for errors.
        kinds: name of the kind, and classes of the model and the processor, by `model_type`.

    Returns:
        model_type, processor and model.

    Raises:
        UserError: no such checkpoint, it is damaged or of another kind, or the model does not fit into the memory.
        MissingDependencyError: transformers is not installed.
    """
    transformers = require("transformers")
    config = read_config(name, setting, kinds)
    try:
        _, model_class, processor_class = kinds[config.model_type]
        processor = getattr(transformers, processor_class).from_pretrained(name)
        loader = getattr(transformers, model_class).from_pretrained
        model, info = loader(name, dtype=pick_dtype(dtype), output_loading_info=True)
        model = model.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError:
        raise UserError(f"{setting}: {name} does not fit into the memory of {device}; choose a smaller one") from None
    except Exception as error:  # of the packages that read it: anything
        if "torchvision" in str(error) and import_problem("torchvision"):
            raise UserError(
                f"{setting}: the image processor of {name} needs torchvision, which is not installed or does not load: "
                "pip install 'scenarioclip-fast[torchvision]'"
            ) from error
        raise UserError(f"{setting}: cannot load {name} ({_first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        _log.warning(f"{setting}: {name} lacks {len(missing)} weights, which are random now: {', '.join(missing[:3])}")
    return config.model_type, processor, model


def read_config(name: str, setting: str, kinds: Mapping[str, tuple[str, str, str]]) -> Any:
    """The transformers config of a checkpoint, see `load_checkpoint`."""
    transformers = require("transformers")
    known = ", ".join(dict.fromkeys(kind for kind, _, _ in kinds.values()))
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise UserError(f"{setting}: got {name}, but there is no such directory; expected a checkpoint of {known}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"{setting}: cannot load {name} ({_first_line(error)}); expected the directory or hub id of a checkpoint "
            f"of {known}, and a network to download from a hub"
        ) from error
    if config.model_type not in kinds:
        raise UserError(f"{setting}: {name} is a checkpoint of {config.model_type}, expected {known}")
    return config


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":") if lines else type(error).__name__


def pick_dtype(name: Dtype) -> torch.dtype:
    """The precision called `name`; auto is float32."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def decode_ahead(
    works: Iterator[Work], early: Callable[[Work], Outcome | None], ahead: int
) -> Iterator[tuple[Work, Tensor | Outcome]]:  # uint8 [H, W, 3]
    """Decode images in threads, in order, up to `ahead` images before they are needed.

    Args:
        works: read in the calling thread.
        early: the outcome of an image that need not be decoded.
    """
    thread = threading.local()  # a decoder per thread
    waiting: deque[tuple[Work, Future[Tensor | Outcome]]] = deque()

    def start() -> None:
        thread.images = Images()

    def decode(work: Work) -> Tensor | Outcome:
        found: Tensor | Outcome | None = early(work)
        return thread.images.decoded(work) if found is None else found

    pool = ThreadPoolExecutor(_THREADS, "decode", start)
    try:
        for work in works:
            waiting.append((work, pool.submit(decode, work)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class FittingBatches:
    """Calls a function on parts of a sequence, and halves the parts when the memory of the GPU is exhausted.

    Args:
        setting: the config key of the size, for messages.
        size: of the parts, at most.
    """

    def __init__(self, setting: str, size: int) -> None:
        self.size = size
        self._setting = setting

    def run(self, function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
        """The concatenated results of the function, one per item.

        Raises:
            torch.OutOfMemoryError: a part of one item does not fit.
        """
        results: list[R] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.size]
            found = self._try(function, part)
            if found is None:  # the traceback, which holds the tensors of the attempt, is gone
                torch.cuda.empty_cache()
                self.size = (len(part) + 1) // 2
                _log.warning(f"{self._setting}: {len(part)} do not fit into the memory; continuing with {self.size}")
            else:
                results += found
        return results

    @staticmethod
    def _try(function: Callable[[Sequence[T]], Sequence[R]], part: Sequence[T]) -> Sequence[R] | None:
        try:
            return function(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            return None


class ModelStage:
    """What the stages with a model in this process share: the model is loaded when they first run.

    Args:
        config: the section of the stage.
        device: auto, cpu, cuda or cuda:N.
    """

    name: ClassVar[str]

    def __init__(self, config: Any, device: str) -> None:
        self._config, self._device = config, device
        self._model: Any = None
        self._batches = FittingBatches(f"{self.name}.batch_size", config.batch_size)

    def close(self) -> None:
        """Free the model."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class VisionStage(ModelStage):
    """A stage with a detector or segmenter: a class of the user's own, or one of transformers."""

    _is_custom = False

    def _load(self, method: str, standard: Callable[[Any, torch.device], Any]) -> None:
        """Load the model, if that was not done; a class of the user's own must have the method."""
        if self._model is None:
            device = pick_device(self._device)
            setting = f"{self.name}.model"
            try:
                custom = load_custom(self._config.model, setting, method, self._config, device)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{setting}: {self._config.model} does not fit into the memory of {device}; choose a smaller one"
                ) from None
            self._is_custom = custom is not None
            self._model = standard(self._config, device) if custom is None else custom

    def _calling(self, method: str) -> AbstractContextManager[None]:
        """The context in which the method of a class of the user's own is called, see `own_errors`."""
        return own_errors(self._config.model, f"{self.name}.model", method) if self._is_custom else nullcontext()

    def _score(self, score: Any) -> float:
        """A score to 4 digits; of a class of the user's own, it must be from 0 to 1. SAM predicts IoUs above 1."""
        rounded = round(float(score), 4) if math.isfinite(float(score)) else float(score)
        if self._is_custom and not 0 <= rounded <= 1:
            raise ValueError(f"got a score of {float(score):.6g}, expected 0 to 1")
        return rounded

    def _run_batch(self, function: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T], image: Tensor) -> list[R]:
        """The results of a batch, whose first image is `image` [H, W, 3].

        Raises:
            UserError: one image does not fit into the memory.
        """
        try:
            return self._batches.run(function, batch)
        except torch.OutOfMemoryError:
            height, width = image.shape[:2]
            raise UserError(
                f"{self.name}.model: {self._config.model} does not fit into the memory with one image of "
                f"{width} x {height}; choose a smaller one, or {self.name}.dtype=bfloat16"
            ) from None


def limit_aspect(image: Tensor) -> Tensor:  # uint8 [H, W, 3]
    """Pad an image at its right or bottom in black if a side is more than 16 times the other.

    The image processors would resize it to no pixels, or to fewer positions than a detector has queries.
    """
    height, width = image.shape[:2]
    right, bottom = max(0, -(-height // _MAX_ASPECT) - width), max(0, -(-width // _MAX_ASPECT) - height)
    return functional.pad(image, (0, 0, 0, right, 0, bottom)) if right or bottom else image
