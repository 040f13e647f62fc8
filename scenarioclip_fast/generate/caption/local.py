"""Captions by a vision-language model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.caption.answer import outcome_of
from scenarioclip_fast.generate.caption.prompt import picture, prompt_text
from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.stages import Images, Outcome, Work
from scenarioclip_fast.requirements import require

_EXPECTED = "expected a path or hub id of a Qwen2.5-VL or Qwen3-VL checkpoint"


class LocalCaptions:
    """The stage `caption` with a model in this process: batched greedy generation.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """

    name: ClassVar[str] = "caption"

    def __init__(self, config: CaptionConfig, device: str) -> None:
        self._config, self._device = config, device
        self._batch_size = config.batch_size
        self._counts: Counter[str] = Counter()
        self._model: _Model | None = None

    @property
    def counts(self) -> dict[str, float]:
        """Tokens."""
        return dict(self._counts)

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield outcomes batch by batch.

        Raises:
            UserError: the model cannot be loaded, or its memory does not suffice for one image.
        """
        images = Images()
        works = iter(works)
        while batch := list(islice(works, self._batch_size)):
            usable: list[tuple[Work, Tensor]] = []
            for work in batch:
                found = images.decoded(work)
                if isinstance(found, Outcome):
                    yield found
                else:
                    usable.append((work, found))
            while usable:
                part = usable[: self._batch_size]
                outcomes = self._captions(part)
                if outcomes is not None:
                    yield from outcomes
                    usable = usable[len(part) :]

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _captions(self, part: list[tuple[Work, Tensor]]) -> list[Outcome] | None:
        """The outcomes of a batch; None if it was too large, in which case the batch size was halved."""
        if self._model is None:
            self._model = _Model(self._config, pick_device(self._device))
        pictures = [picture(pixels, self._config) for _, pixels in part]
        try:
            answers = self._model.answer(pictures)
        except torch.OutOfMemoryError as error:
            problem = str(error).splitlines()[0]
        else:
            return [self._outcome(work, pixels, answer) for (work, pixels), answer in zip(part, answers, strict=True)]
        # Outside of the handler, whose exception keeps the tensors of the failed batch alive.
        if len(part) == 1:
            raise UserError(
                f"caption.batch_size: out of memory even at 1, with caption.image_side={self._config.image_side} and "
                f"caption.max_tokens={self._config.max_tokens} ({problem}): use a smaller model, or --vlm-url URL"
            )
        torch.cuda.empty_cache()
        self._batch_size = max(1, len(part) // 2)
        return None

    def _outcome(self, work: Work, pixels: Tensor, answer: _Answer | ValueError) -> Outcome:
        if isinstance(answer, ValueError):
            return Outcome(work.key, reason="request_refused", detail=" ".join(str(answer).split())[:300])
        text, truncated, prompt, tokens = answer
        self._counts.update({"prompt tokens": prompt, "answer tokens": tokens})
        height, width = pixels.shape[:2]
        return outcome_of(work.key, (height, width), text, self._config, truncated=truncated)


_Answer = tuple[str, bool, int, int]
"""Text, whether it was cut off, tokens of the prompt, tokens of the text."""


class _Model:
    """A model and what prepares its inputs."""

    def __init__(self, config: CaptionConfig, device: torch.device) -> None:
        if config.temperature:
            raise UserError(
                f"caption.temperature: got {config.temperature:g}, expected 0: a model in this process decodes "
                "greedily; use a server (--vlm-url) to sample"
            )
        self._config, self._device = config, device
        transformers = require("transformers")
        transformers.utils.logging.disable_progress_bar()
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = default if config.dtype == "auto" else getattr(torch, config.dtype)
        try:
            model = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype)
            self._processor = _make_processor(transformers, config.model, model.config)
            self._prompt = self._chat(prompt_text(config))
            self._model = model.to(device).eval()
        except torch.OutOfMemoryError:
            raise UserError(f"caption.model: {config.model} does not fit into the memory of {device}") from None
        except Exception as error:  # of many types: no such path, another architecture, missing files, a GPU needed
            line = " ".join(str(error).split())
            line = line if len(line) <= 300 else f"{line[:297]}..."
            raise UserError(f"caption.model: cannot load {config.model} ({line}); {_EXPECTED}") from None
        self._processor.tokenizer.padding_side = "left"  # answers begin where prompts end
        ends = model.generation_config.eos_token_id
        self._ends = torch.tensor([end for end in (ends if isinstance(ends, list) else [ends]) if end is not None])

    def _chat(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(
            self._processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=getattr(self._processor, "chat_template", None),
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    @torch.inference_mode()
    def answer(self, pictures: list[Any]) -> list[_Answer | ValueError]:
        """Answer about Pillow images; ValueError in place of an answer: the image is unsuitable for the model.

        Raises:
            torch.OutOfMemoryError: on a GPU.
        """
        try:
            texts = [self._prompt] * len(pictures)
            inputs = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        except ValueError as error:  # such as an image that is too narrow
            return [error] if len(pictures) == 1 else [one for image in pictures for one in self.answer([image])]
        moved = {
            name: value.to(self._device, self._model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        found = self._model.generate(
            **moved,
            max_new_tokens=self._config.max_tokens,
            do_sample=False,
            # Checkpoints come with settings for sampling, of which `generate` would warn.
            **dict.fromkeys(("temperature", "top_p", "top_k")),
        ).cpu()
        prompts = inputs["attention_mask"].sum(1).tolist()
        return [
            self._read(row, prompt)
            for row, prompt in zip(found[:, inputs["input_ids"].shape[1] :], prompts, strict=True)
        ]

    def _read(self, row: Tensor, prompt: int) -> _Answer:  # int64 [tokens]
        ends = torch.isin(row, self._ends).nonzero()
        tokens = int(ends[0]) if len(ends) else len(row)
        text: str = self._processor.tokenizer.decode(row[:tokens], skip_special_tokens=True)
        return text, not len(ends), prompt, tokens


def _make_processor(transformers: Any, path: str, config: Any) -> Any:
    try:
        return transformers.AutoProcessor.from_pretrained(path)
    except ImportError:  # the part for videos needs torchvision
        if not config.model_type.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")):
            raise
    images = transformers.AutoImageProcessor.from_pretrained(path)
    return _ImageTextProcessor(images, transformers.AutoTokenizer.from_pretrained(path), config.image_token_id)


class _ImageTextProcessor:
    """The processor of a Qwen-VL model without its part for videos, for one image per text.

    Args:
        image_token: the id of the token that stands for a group of patches.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, image_token: int) -> None:
        self.image_processor, self.tokenizer, self._image_token = image_processor, tokenizer, image_token

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Tensor]:
        found = dict(self.image_processor(images=images, return_tensors="pt"))
        mark = self.tokenizer.convert_ids_to_tokens(self._image_token)
        groups = found["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        expanded = [one.replace(mark, mark * n) for one, n in zip(text, groups.tolist(), strict=True)]
        found |= self.tokenizer(expanded, **options)
        return found | {"mm_token_type_ids": (found["input_ids"] == self._image_token).int()}
