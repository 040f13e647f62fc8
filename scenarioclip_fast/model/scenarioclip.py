"""CLIP at three levels of a scene; stages shared by the levels run once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS, check_level
from scenarioclip_fast.model import pretrained
from scenarioclip_fast.model.compile import compile_blocks
from scenarioclip_fast.model.config import Activation, FreezeConfig, ModelConfig, TextConfig, Variant
from scenarioclip_fast.model.convert import EncoderWeights
from scenarioclip_fast.model.encoders import Encoder, Packing, TextEncoder, VisionEncoder
from scenarioclip_fast.model.tokens import TokenTable, UniqueTexts, pack, truncate

if TYPE_CHECKING:
    from scenarioclip_fast.data import Batch, Vocabulary
    from scenarioclip_fast.ops.contrastive import ExchangePlan


class Teacher(Protocol):
    """The encoders that distillation needs, callable from a stage on: `EMATeacher` implements it."""

    def encode_image(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Embed with the global vision encoder: [n, D]."""

    def encode_text(self, x: Tensor, packing: Packing, level: str, *, start: int = 0) -> Tensor:
        """Embed with the text encoder of `level`: [n, D]."""


@dataclass(slots=True)
class Embeddings:
    """The inputs of the losses for one batch. Lists have one entry per level; embeddings are not normalised.

    image: 3 x [N_l, D];  text: 3 x [U_l, D], the unique texts of the batch
    text_index: 3 x [N_l] int64, the text of each image row
    text_id: 3 x [U_l] int64, vocabulary ids, on the CPU
    object_scene [N_o], relation_scene [N_r]: int64, the scene of each row
    action_scene: int64 [N_a], the scenes of the global level's rows, those with an action; None: all B
    teacher_image [B, D], teacher_object_text [U_o, D], teacher_relation_text [U_r, D]: None without a teacher
    plan: of the exchange of the texts between ranks, if it has begun
    """

    image: list[Tensor]
    text: list[Tensor]
    text_index: list[Tensor]
    text_id: list[Tensor]
    object_scene: Tensor
    relation_scene: Tensor
    action_scene: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_object_text: Tensor | None = None
    teacher_relation_text: Tensor | None = None
    plan: ExchangePlan | None = None


@dataclass(slots=True)
class TrunkOutput:
    """A batch after the frozen trunk that the levels share; gradients start here.

    hidden [V, ...]: all views, or the pixels if nothing is frozen;  views: their numbers per level
    texts: the unique texts to embed;  object_scene [N_o], relation_scene [N_r], action_scene: as in Batch
    """

    hidden: Tensor
    views: list[int]
    texts: UniqueTexts
    object_scene: Tensor
    relation_scene: Tensor
    action_scene: Tensor | None = None


class ScenarioCLIP(nn.Module):
    """One vision and one text encoder per level (one pair for all levels in the variant "pyramidclip").

    Frozen stages are the same modules at every level: stored and saved once. Those at the start of the vision encoder
    run once for all views of a batch. The levels' trainable stages start from equal weights.

    `torch.compile` works on a single encoder. On the whole model it gives the same numbers, but its graph breaks where
    the host finds the unique texts of a batch and looks up their frozen features: prefer `compile_blocks`.

    Attributes:
        vision, text: level -> encoder.
        tokens: the TokenTable that `set_vocabulary` made, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens: TokenTable | None = None
        freeze = config.freeze
        vision, text = (
            VisionEncoder(config.vision, config.embed_dim),
            TextEncoder(config.text, config.embed_dim),
        )
        embeddings = [freeze.embeddings, freeze.pre_layernorm]
        self._vision_shared = _freeze(vision, embeddings, freeze.vision_blocks)
        # The last block outputs one row per text instead of one per token, so its output cannot be cached per token.
        self._text_shared = min(_freeze(text, embeddings[:1], freeze.text_blocks), config.text.layers)
        single = config.variant == "pyramidclip"
        self.vision = nn.ModuleDict({level: vision if single else _sibling(vision, level) for level in LEVELS})
        self.text = nn.ModuleDict({level: text if single else _sibling(text, level) for level in LEVELS})
        # Shared parameters have several names; checkpoints contain only the first.
        first: dict[int, str] = {}
        self._aliases = {
            name: original
            for name, p in self.named_parameters(remove_duplicate=False)
            if (original := first.setdefault(id(p), name)) != name
        }
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_add_aliases)

    @property
    def device(self) -> torch.device:
        return self._text("global").head.norm.weight.device

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Put the vocabulary's token ids on the model's device; the text ids of batches index this vocabulary."""
        self.tokens = TokenTable(vocabulary, self.config.text).to(self.device)

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass from its input: less memory, one more forward pass."""
        for encoder in self.encoders():
            encoder.checkpointing = enabled

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` every block in place: see `model.compile.compile_blocks`."""
        compile_blocks(self, **options)

    def encoders(self) -> Iterator[Encoder]:
        """Yield each encoder once: six, or two in the variant "pyramidclip"."""
        modules = dict.fromkeys([*self.vision.values(), *self.text.values()])
        yield from cast(Iterator[Encoder], iter(modules))

    def forward(self, batch: Batch, teacher: Teacher | None = None, texts: UniqueTexts | None = None) -> Embeddings:
        """Embed a batch's views and unique texts and, with a teacher, what distillation needs.

        Args:
            batch: views and text ids; requires `set_vocabulary`.
            teacher: embeds whole images, object texts and relation texts; None: no distillation.
            texts: the unique texts of the batch; None: computed here.
        """
        return self.run_levels(self.run_trunk(batch, texts), teacher)

    def run_trunk(self, batch: Batch, texts: UniqueTexts | None = None) -> TrunkOutput:
        """Run the views through the frozen trunk that the levels share. Arguments as in `forward`."""
        if self.tokens is None:
            raise ValueError("the model has no vocabulary: call set_vocabulary(vocabulary) first")
        texts = texts or self.tokens.unique_texts(batch.host_ids)
        views = [batch.num_scenes, batch.num_objects, batch.num_relations]
        scenes = (batch.object_scene, batch.relation_scene, batch.action_scene)
        return TrunkOutput(self._frozen_vision(batch.pixels), views, texts, *scenes)

    def run_levels(self, trunk: TrunkOutput, teacher: Teacher | None = None) -> Embeddings:
        """Run the stages after the trunk: the levels' encoders, and the teacher's."""
        single = self.config.variant == "pyramidclip"
        out = Embeddings(
            image=[],
            text=[],
            text_index=trunk.texts.index,
            text_id=trunk.texts.id,
            object_scene=trunk.object_scene,
            relation_scene=trunk.relation_scene,
            action_scene=trunk.action_scene,
            plan=trunk.texts.plan,
        )
        # Between ranks, texts travel beside the last vision encoder. The others run before: the host needs the ids of
        # the other ranks' texts, which it has planned to exchange just before it launched the trunk.
        *before, last = LEVELS
        if not single:
            out.image = self._images_of_levels(trunk, before)
        if single and teacher is None:
            out.text = self._texts_of_one_encoder(trunk.texts)
        else:
            self._add_texts_of_levels(out, trunk.texts, teacher)
        if out.plan is not None:
            out.plan.start_gather(out.text)
        if teacher is not None:
            out.teacher_image = teacher.encode_image(trunk.hidden[: trunk.views[0]], start=self._vision_shared)
        out.image += self._images_of_one_encoder(trunk) if single else self._images_of_levels(trunk, [last])
        return out

    def encode_image(self, pixels: Tensor, level: str) -> Tensor:  # [V, 3, S, S]
        """Embed images with the vision encoder of `level`: [V, D], not normalised.

        Args:
            pixels: float [V, 3, S, S] with S = config.vision.image_size, normalised with CLIP's mean and standard
                deviation, as `scenarioclip_fast.preprocess` returns them.
            level: "global", "object" or "relation".
        """
        encoder = self._vision(check_level(level))
        return encoder.run(self._frozen_vision(pixels), start=self._vision_shared)

    def encode_text(self, texts: Sequence[str] | Sequence[Sequence[int]] | Tensor, level: str) -> Tensor:
        """Embed texts with the text encoder of `level`: [n, D], not normalised.

        Args:
            texts: strings (requires instant-clip-tokenizer), lists of token ids, or a tensor [n, L] of token ids,
                in which everything after the first end-of-text is padding. Texts that exceed the context are truncated.
            level: "global", "object" or "relation".
        """
        encoder = self._text(check_level(level))
        ids, _ = truncate(_token_lists(texts, self.config.text), self.config.text)
        # Without gradients no activations are kept, so chunks bound the memory that a whole vocabulary needs.
        step = max(len(ids), 1) if torch.is_grad_enabled() else 2048
        parts = []
        for i in range(0, max(len(ids), 1), step):
            tokens, packing = pack(ids[i : i + step], self.device)
            parts.append(encoder.run(tokens, packing))
        return torch.cat(parts)

    def init_towers_from(self, other: ScenarioCLIP) -> None:
        """Initialise every level from one pair of encoders of `other`: its only pair, or its global level's."""
        problems = self.config.differences(other.config, "embed_dim", "vision", "text")
        if problems:
            raise UserError(
                f"the other model has another architecture (this model, other model): {'; '.join(problems)}"
            )
        for encoders, source in ((self.vision, other.vision), (self.text, other.text)):
            state = source["global"].state_dict()
            for level in LEVELS:
                encoders[level].load_state_dict(state)

    @classmethod
    def from_clip(
        cls,
        path: str | Path,
        *,
        variant: Variant = "scenarioclip1",
        freeze: FreezeConfig | None = None,
        config: ModelConfig | None = None,
        activation: Activation | None = None,
    ) -> Self:
        """Build a model with every level initialised from one CLIP checkpoint.

        The projections are CLIP's, with zero biases; the layernorms after them are new.

        Args:
            path: a Hugging Face directory of a CLIPModel (config.json and model.safetensors or pytorch_model.bin,
                possibly sharded), or an open_clip state dict (a directory with open_clip_model.safetensors or
                open_clip_pytorch_model.bin, or the file itself).
            variant: as in ModelConfig; the sizes come from the checkpoint.
            freeze: as in ModelConfig; None: the published freezing, limited to the blocks that an encoder has.
            config: replaces `variant` and `freeze`; its sizes must match the checkpoint's.
            activation: for state dicts without an open_clip_config.json: "quick_gelu" (OpenAI's weights; the default)
                or "gelu" (most others).

        Raises:
            UserError: unreadable or unsafe files, or tensors of another architecture.
        """
        path = Path(path)
        weights = pretrained.read_clip(path, activation)
        if config is None:
            default = FreezeConfig()
            layers = weights.config.vision.layers, weights.config.text.layers
            blocks = min(default.vision_blocks, layers[0]), min(default.text_blocks, layers[1])
            config = replace(weights.config, variant=variant, freeze=freeze or FreezeConfig(*blocks))
        problems = config.differences(weights.config, "embed_dim", "vision", "text")
        if problems:
            raise UserError(f"{path}: architecture differs (config, checkpoint): {'; '.join(problems)}")
        model = cls(config)
        model._load_encoders(weights, path)
        return model

    @classmethod
    def from_reference(
        cls,
        path: str | Path,
        *,
        teacher: bool = False,
        freeze: FreezeConfig | None = None,
        heads: tuple[int, int] | None = None,
    ) -> Self:
        """Build the model of a Lightning checkpoint (or state dict) of the published code, of any variant.

        Args:
            path: the `.ckpt`, or the teacher's own `*_ema_teacher.pt`.
            teacher: load the EMA teacher's weights instead of the student's.
            freeze: as in ModelConfig; None: the published freezing. Frozen parts must be equal at all levels.
            heads: attention heads of the vision and the text encoder; None: one per 64 of width, as in CLIP.

        Raises:
            UserError: unreadable or unsafe files, mismatched tensors, or frozen parts that differ between levels.
        """
        path = Path(path)
        weights = pretrained.read_reference(path, teacher, heads)
        model = cls(replace(weights.config, freeze=freeze or FreezeConfig(pre_layernorm=False)))
        model._load_encoders(weights, path)
        return model

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Build the model that `save_pretrained` wrote into `directory`.

        Raises:
            UserError: there is none, or a file differs from its checksum in SHA256SUMS. A directory without SHA256SUMS
                is loaded with a warning.
        """
        config = pretrained.read_config(directory)
        pretrained.verify(directory)
        model = cls(config)
        pretrained.load_saved(model, directory)
        return model

    def save_pretrained(self, directory: str | Path, scales: Mapping[str, float] | None = None) -> None:
        """Write `model.safetensors`, every parameter once, `config.json` and `SHA256SUMS` into `directory`.

        scales: the learned logit scale of each level; stored in config.json for exports.
        """
        pretrained.save_pretrained(self.state_dict(), self.config, directory, scales)

    def _load_encoders(self, weights: EncoderWeights, path: Path) -> None:
        for kind, states in weights.encoders.items():
            pretrained.load_encoders(kind, getattr(self, kind), states, path)

    def _images_of_levels(self, trunk: TrunkOutput, levels: Sequence[str]) -> list[Tensor]:
        hidden = dict(zip(LEVELS, trunk.hidden.split(trunk.views), strict=True))
        if LEVELS[0] in levels:
            hidden[LEVELS[0]] = _rows(hidden[LEVELS[0]], trunk.action_scene)
        return [self._vision(level).run(hidden[level], start=self._vision_shared) for level in levels]

    def _images_of_one_encoder(self, trunk: TrunkOutput) -> list[Tensor]:
        image = self._vision("global").run(trunk.hidden, start=self._vision_shared)
        whole, *parts = image.split(trunk.views)
        return [_rows(whole, trunk.action_scene), *parts]

    def _texts_of_one_encoder(self, texts: UniqueTexts) -> list[Tensor]:
        x, packing = self._text_inputs(np.concatenate(texts.row))
        counts = [len(row) for row in texts.row]
        return list(self._text("global").run(x, packing, start=self._text_shared).split(counts))

    def _add_texts_of_levels(self, out: Embeddings, texts: UniqueTexts, teacher: Teacher | None) -> None:
        for level, row in zip(LEVELS, texts.row, strict=True):
            x, packing = self._text_inputs(row)
            out.text.append(self._text(level).run(x, packing, start=self._text_shared))
            if teacher is not None and level == "object":
                out.teacher_object_text = teacher.encode_text(x, packing, level, start=self._text_shared)
            elif teacher is not None and level == "relation":
                out.teacher_relation_text = teacher.encode_text(x, packing, level, start=self._text_shared)

    def _vision(self, level: str) -> VisionEncoder:
        return cast(VisionEncoder, self.vision[level])

    def _text(self, level: str) -> TextEncoder:
        return cast(TextEncoder, self.text[level])

    def _frozen_vision(self, pixels: Tensor) -> Tensor:  # [V, 3, S, S]
        """Run the shared trunk on all views; return the pixels themselves if nothing is shared."""
        if not self._vision_shared:
            return pixels
        with torch.no_grad():
            return self._vision("global").run(pixels, stop=self._vision_shared)

    def _text_inputs(self, row: NDArray[np.int64]) -> tuple[Tensor, Packing]:
        """Return the input of the trainable stages for the table's strings `row` [n], and its packing."""
        assert self.tokens is not None
        packing, source = self.tokens.packing(row)
        if not self._text_shared:
            return self.tokens.ids(source), packing
        return self.tokens.frozen_features(self._text("global"), self._text_shared, row, packing, source), packing


def _freeze(encoder: Encoder, embeddings: list[bool], blocks: int) -> int:
    """Freeze the stages before the blocks as `embeddings` flags them, and the first `blocks` blocks.

    Returns the length of the contiguous run of frozen stages at the input.
    """
    frozen = [*embeddings, *(i < blocks for i in range(len(encoder.blocks))), False]
    for stage, is_frozen in zip(encoder.stages, frozen, strict=True):
        stage.requires_grad_(not is_frozen)
    return frozen.index(False)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _sibling(encoder: Encoder, level: str) -> Encoder:
    """A copy of the encoder for another level that shares its frozen parameters."""
    if level == LEVELS[0]:
        return encoder
    return copy.deepcopy(encoder, {id(p): p for p in encoder.parameters() if not p.requires_grad})


def _token_lists(texts: Sequence[str] | Sequence[Sequence[int]] | Tensor, config: TextConfig) -> list[list[int]]:
    if isinstance(texts, Tensor):
        if texts.ndim != 2:
            raise ValueError(f"tokens: got shape {list(texts.shape)}, expected [n, L]")
        texts = texts.tolist()
        return [ids[: ids.index(config.end_of_text) + 1] if config.end_of_text in ids else ids for ids in texts]
    if isinstance(texts, str):
        raise TypeError(f"texts: got the string {texts!r}, expected a list of strings")
    if texts and isinstance(texts[0], str):
        from scenarioclip_fast.data.vocabulary import tokenize

        return [tokenize(text, config.context_length) for text in texts]  # type: ignore[arg-type]
    return [list(ids) for ids in texts]  # type: ignore[arg-type]


def _drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, ScenarioCLIP)
    for name in module._aliases:
        state.pop(prefix + name, None)


def _add_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, ScenarioCLIP)
    for name, original in module._aliases.items():
        if prefix + original in state:
            state.setdefault(prefix + name, state[prefix + original])
