"""Merging of texts by the similarity of their embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.requirements import require

_BLOCK = 1024  # texts whose similarities are in memory at once, squared
_BATCH = 128  # texts per call of the encoder


def merge_embeddings(
    texts: Sequence[str], counts: Sequence[int], vectors: NDArray[Any], threshold: float
) -> dict[str, str]:
    """Map the texts that are merged into another one to that text, their representative.

    In the order of decreasing counts, and alphabetically among equal ones, each text joins the representative that is
    most similar to it, or becomes one itself if none is similar enough. Memory: a block of similarities.

    Args:
        texts: n distinct texts.
        counts: n occurrences.
        vectors: [n, d], of any length above 0; a vector of zeros is similar to none.
        threshold: cosine similarity, above 0.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(texts) == len(counts) == len(vectors):
        raise ValueError(f"got {len(texts)} texts, {len(counts)} counts and {len(vectors)} vectors, expected as many")
    order = sorted(range(len(texts)), key=lambda i: (-counts[i], texts[i]))
    found: dict[str, str] = {}
    chosen: list[int] = []  # representatives
    unit = np.empty((len(texts), vectors.shape[1] if len(vectors) else 0))  # of the representatives, in their order
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        mine = _unit(np.asarray(vectors[block], np.float64))
        best, nearest = np.full(len(block), -np.inf), np.zeros(len(block), np.int64)
        for first in range(0, len(chosen), _BLOCK):
            similar = mine @ unit[first : min(first + _BLOCK, len(chosen))].T
            better = similar.max(1) > best
            nearest[better] = first + similar.argmax(1)[better]
            best = np.maximum(best, similar.max(1))
        inner = mine @ mine.T
        new: list[int] = []  # positions in the block of its representatives
        for row, i in enumerate(block):
            top = inner[row, new].max() if new else -np.inf
            if max(top, best[row]) < threshold:
                unit[len(chosen)] = mine[row]
                chosen.append(i)
                new.append(row)
            elif top > best[row]:
                found[texts[i]] = texts[block[new[int(inner[row, new].argmax())]]]
            else:
                found[texts[i]] = texts[chosen[nearest[row]]]
    return found


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:  # [n, d]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


class Embedder:
    """A text encoder of transformers: the mean of the last hidden states over a text's tokens.

    Args:
        name: path or hub id.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        transformers = require("transformers")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise UserError(f"curate.embedder: cannot load {name}: {detail}; expected a text encoder") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = model.eval()
        # Of two-tower models such as CLIP, the text encoder; of encoder-decoders, the encoder.
        self._model = getattr(model, "text_model", None) or (
            model.get_encoder() if model.config.is_encoder_decoder else model
        )
        self._device = pick_device("auto")
        self._model.to(self._device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:  # [n, d]
        """Embed texts; the vectors have length 1."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))  # little padding
        parts = []
        for start in range(0, len(order), _BATCH):
            batch = [texts[i] for i in order[start : start + _BATCH]]
            tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt")
            mask = tokens["attention_mask"].to(self._device)
            states = self._model(input_ids=tokens["input_ids"].to(self._device), attention_mask=mask).last_hidden_state
            states = states.float() * mask[..., None]
            mean = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        vectors = torch.cat(parts)
        found = torch.empty_like(vectors)
        found[torch.tensor(order)] = vectors
        return np.asarray(found.numpy())


def merge_texts(counts: Mapping[str, int], embedder: Embedder, threshold: float) -> dict[str, str]:
    """`merge_embeddings` of the texts of `counts`."""
    texts = sorted(counts)
    if not texts:
        return {}
    return merge_embeddings(texts, [counts[text] for text in texts], embedder(texts), threshold)
