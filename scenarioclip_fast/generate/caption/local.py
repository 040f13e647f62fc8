"""Captions by a vision-language model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.caption.answer import outcome_of
from scenarioclip_fast.generate.caption.prompt import picture, prompt_text
from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.models import ModelStage, decode_ahead
from scenarioclip_fast.generate.stages import Outcome, Work
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import one_line

_EXPECTED = "expected a path or hub id of a Qwen2.5-VL or Qwen3-VL checkpoint"


class LocalCaptions(ModelStage):
    """The stage `caption` with a model in this process: batched greedy generation.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """

    name: ClassVar[str] = "caption"

    def __init__(self, config: CaptionConfig, device: str) -> None:
        super().__init__(config, device)
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, float]:
        """Tokens."""
        return dict(self._counts)

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield outcomes batch by batch.

        Raises:
            UserError: the model cannot be loaded, or its memory does not suffice for one image.
        """
        size = self._config.batch_size
        batch: list[tuple[Work, Tensor]] = []
        for work, image in decode_ahead(works, lambda work: None, size):
            if isinstance(image, Outcome):
                yield image
                continue
            batch.append((work, image))
            if len(batch) == size:
                yield from self._captions(batch)
                batch = []
        if batch:
            yield from self._captions(batch)

    def _captions(self, batch: Sequence[tuple[Work, Tensor]]) -> list[Outcome]:
        if self._model is None:
            self._model = _Model(self._config, pick_device(self._device))
        try:
            answers = self._batches.run(self._answer, [pixels for _, pixels in batch])
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"caption.batch_size: out of memory even at 1, with caption.image_side={self._config.image_side} and "
                f"caption.max_tokens={self._config.max_tokens} ({str(error).splitlines()[0]}): use a smaller model, or "
                "--vlm-url URL"
            ) from None
        return [self._outcome(work, pixels, answer) for (work, pixels), answer in zip(batch, answers, strict=True)]

    def _answer(self, images: Sequence[Tensor]) -> list[_Answer | ValueError]:
        answers: list[_Answer | ValueError] = self._model.answer([picture(image, self._config) for image in images])
        return answers

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
            raise UserError(f"caption.model: cannot load {config.model} ({one_line(error)}); {_EXPECTED}") from None
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


def check_model(config: CaptionConfig) -> None:
    """Check that the checkpoint exists, without loading it; raises UserError."""
    try:
        require("transformers").AutoConfig.from_pretrained(config.model)
    except Exception as error:
        raise UserError(f"caption.model: cannot load {config.model} ({one_line(error)}); {_EXPECTED}") from None


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
