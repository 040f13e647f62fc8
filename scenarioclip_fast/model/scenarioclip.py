"""CLIP at three levels of a scene, with everything that the levels have in common computed once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import ModelConfig, TextConfig
from scenarioclip_fast.model.encoders import Block, Encoder, TextEncoder, VisionBlock, VisionEncoder
from scenarioclip_fast.model.tokens import LEVELS, Distinct, TokenTable, check_level, pack, truncate

if TYPE_CHECKING:
    from scenarioclip_fast.data import Batch, Vocabulary
    from scenarioclip_fast.model.teacher import EMATeacher


@dataclass(slots=True)
class Embeddings:
    """What the losses need of one batch. Lists have one entry per level; nothing is normalised to unit
    length.

    image: 3 x [N_l, D];  text: 3 x [U_l, D], the distinct texts of the batch
    text_index: 3 x [N_l] int64, the text of each image row
    text_id: 3 x [U_l] int64, vocabulary ids, on the CPU
    object_scene [N_o], relation_scene [N_r]: int64, the scene of each row
    teacher_image [B, D], teacher_object_text [U_o, D], teacher_relation_text [U_r, D]: None without a teacher
    """

    image: list[Tensor]
    text: list[Tensor]
    text_index: list[Tensor]
    text_id: list[Tensor]
    object_scene: Tensor
    relation_scene: Tensor
    teacher_image: Tensor | None = None
    teacher_object_text: Tensor | None = None
    teacher_relation_text: Tensor | None = None


@dataclass(slots=True)
class Begun:
    """A batch behind the frozen stages that the levels share: where gradients begin.

    hidden [V, ...]: all views, or the pixels themselves where nothing is frozen;  views: how many of each level
    distinct: the texts to embed;  object_scene [N_o], relation_scene [N_r]: as in Batch
    """

    hidden: Tensor
    views: list[int]
    distinct: Distinct
    object_scene: Tensor
    relation_scene: Tensor


class ScenarioCLIP(nn.Module):
    """One vision and one text encoder per level (one pair for all levels in the variant "pyramidclip").

    Frozen stages are the same modules at every level: stored once, saved once, and run once for all views of
    a batch as far as the frozen stages reach from the input on. The levels' trainable stages start from equal
    weights.

    `vision[level]` and `text[level]` are whole encoders; `tokens` is the TokenTable of `set_vocabulary`, or
    None.

    `torch.compile` takes an encoder whole. Around the whole model it gives the same numbers, but its graph breaks where
    the host counts the distinct texts of a batch and looks up their frozen features: prefer `compile_blocks`.
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
        before = [freeze.embeddings, freeze.pre_layernorm]
        self._vision_shared = _freeze(vision, before, freeze.vision_blocks)
        # The last block leaves one row a text, not one a token, so it is never among the stages that are kept.
        self._text_shared = min(_freeze(text, before[:1], freeze.text_blocks), config.text.layers)
        single = config.variant == "pyramidclip"
        self.vision = nn.ModuleDict({level: vision if single else _sibling(vision, level) for level in LEVELS})
        self.text = nn.ModuleDict({level: text if single else _sibling(text, level) for level in LEVELS})
        # Names of the same parameter beyond its first one, which alone appears in checkpoints.
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
        """Puts the vocabulary's token ids on the model's device; batches speak of its ids from now on."""
        self.tokens = TokenTable(vocabulary, self.config.text).to(self.device)

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Keeps each block's input alone for the backward pass: less memory, one more forward pass."""
        for encoder in self.encoders():
            encoder.checkpointing = enabled

    def compile_blocks(self, cuda_graphs: bool = False, **options: Any) -> None:
        """`torch.compile`s every block in place; the number of rows may change from call to call.

        With `cuda_graphs`, those of vision are replayed as CUDA graphs, and their views padded to one of a few numbers
        (see `VisionEncoder.bucketed`): call `torch.compiler.cudagraph_mark_step_begin()` before each step.
        """
        compile_blocks(self, cuda_graphs, **options)

    def encoders(self) -> Iterator[Encoder]:
        """The distinct encoders: six, or two in the variant "pyramidclip"."""
        modules = dict.fromkeys([*self.vision.values(), *self.text.values()])
        yield from cast(Iterator[Encoder], iter(modules))

    def forward(self, batch: Batch, teacher: EMATeacher | None = None, distinct: Distinct | None = None) -> Embeddings:
        """Embeds a batch's views and distinct texts (None: found here) and, with a teacher, what distillation needs."""
        return self.finish(self.begin(batch, distinct), teacher)

    def begin(self, batch: Batch, distinct: Distinct | None = None) -> Begun:
        """Takes the views through the frozen stages that the levels share.

        Args:
            distinct: the texts to embed; None: those of the batch.
        """
        if self.tokens is None:
            raise ValueError("the model has no vocabulary yet: call set_vocabulary(vocabulary) first")
        distinct = distinct or self.tokens.distinct(batch.host_ids)
        views = [batch.num_scenes, batch.num_objects, batch.num_relations]
        return Begun(self._frozen_vision(batch.pixels), views, distinct, batch.object_scene, batch.relation_scene)

    def finish(self, begun: Begun, teacher: EMATeacher | None = None) -> Embeddings:
        """The rest of `forward`."""
        hidden, views, distinct = begun.hidden, begun.views, begun.distinct
        parts = list(hidden.split(views))
        if self.config.variant == "pyramidclip":
            image = list(self._vision("global").run(hidden, start=self._vision_shared).split(views))
        else:
            image = [
                self._vision(level).run(x, start=self._vision_shared) for level, x in zip(LEVELS, parts, strict=True)
            ]
        out = Embeddings(
            image=image,
            text=[],
            text_index=distinct.index,
            text_id=distinct.id,
            object_scene=begun.object_scene,
            relation_scene=begun.relation_scene,
        )
        if teacher is not None:
            out.teacher_image = teacher.encode_image(parts[0], start=self._vision_shared)

        if self.config.variant == "pyramidclip" and teacher is None:
            together = self._text_inputs(*(torch.cat(x) for x in (distinct.row, distinct.host_row, distinct.lengths)))
            counts = [len(row) for row in distinct.row]
            out.text = list(self._text("global").run(*together, start=self._text_shared).split(counts))
            return out
        texts = zip(LEVELS, distinct.row, distinct.host_row, distinct.lengths, strict=True)
        for level, row, host_row, lengths in texts:
            x, packing = self._text_inputs(row, host_row, lengths)
            out.text.append(self._text(level).run(x, packing, start=self._text_shared))
            if teacher is not None and level == "object":
                out.teacher_object_text = teacher.encode_text(x, packing, level, start=self._text_shared)
            elif teacher is not None and level == "relation":
                out.teacher_relation_text = teacher.encode_text(x, packing, level, start=self._text_shared)
        return out

    def encode_image(self, pixels: Tensor, level: str) -> Tensor:  # [V, 3, S, S]
        """Embeds pixels with the vision encoder of `level`: [V, D], not normalised to unit length."""
        encoder = self._vision(check_level(level))
        return encoder.run(self._frozen_vision(pixels), start=self._vision_shared)

    def encode_text(self, texts: Sequence[str] | Sequence[Sequence[int]] | Tensor, level: str) -> Tensor:
        """Embeds texts with the text encoder of `level`: [n, D], not normalised to unit length.

        Args:
            texts: strings (which needs instant-clip-tokenizer), lists of token ids, or a tensor [n, L] of
                token ids in which whatever follows the first end-of-text is padding. Longer ones than the
                context are cut.
        """
        encoder = self._text(check_level(level))
        ids, _ = truncate(_token_lists(texts, self.config.text), self.config.text)
        # Without gradients nothing is kept, so a whole vocabulary fits when it goes in pieces.
        step = max(len(ids), 1) if torch.is_grad_enabled() else 2048
        parts = []
        for i in range(0, max(len(ids), 1), step):
            tokens, packing = pack(ids[i : i + step], self.device)
            parts.append(encoder.run(tokens, packing))
        return torch.cat(parts)

    def init_towers_from(self, other: ScenarioCLIP) -> None:
        """Starts every level from one pair of encoders: `other`'s only pair, or that of its global level."""
        problems = self.config.differences(other.config, "embed_dim", "vision", "text")
        if problems:
            raise UserError(f"the other model has another architecture (here, there): {'; '.join(problems)}")
        for mine, theirs in ((self.vision, other.vision), (self.text, other.text)):
            state = theirs["global"].state_dict()
            for level in LEVELS:
                mine[level].load_state_dict(state)

    @classmethod
    def from_clip(cls, path: str | Path, **options: Any) -> ScenarioCLIP:
        """All levels started from a CLIP checkpoint: see `weights.from_clip`."""
        from scenarioclip_fast.model import weights

        return weights.from_clip(path, **options)

    @classmethod
    def from_reference(cls, path: str | Path, **options: Any) -> ScenarioCLIP:
        """The model of a checkpoint that the method's published code wrote: see `weights.from_reference`."""
        from scenarioclip_fast.model import weights

        return weights.from_reference(path, **options)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ScenarioCLIP:
        """Reads what `save_pretrained` wrote."""
        from scenarioclip_fast.model import weights

        return weights.from_pretrained(directory)

    def save_pretrained(self, directory: str | Path, scales: Mapping[str, float] | None = None) -> None:
        """Writes `model.safetensors` and `config.json` into `directory`: see `weights.save_pretrained`."""
        from scenarioclip_fast.model import weights

        weights.save_pretrained(self, directory, scales)

    def _vision(self, level: str) -> VisionEncoder:
        return cast(VisionEncoder, self.vision[level])

    def _text(self, level: str) -> TextEncoder:
        return cast(TextEncoder, self.text[level])

    def _frozen_vision(self, pixels: Tensor) -> Tensor:  # [V, 3, S, S]
        """All views through the stages that the levels share; the pixels themselves if there are none."""
        if not self._vision_shared:
            return pixels
        with torch.no_grad():
            return self._vision("global").run(pixels, stop=self._vision_shared)

    def _text_inputs(self, row: Tensor, host_row: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:  # 3 x [n]
        """What the trainable stages start from for the table's strings `row`, and how these are packed.

        `host_row` and `lengths`: on the CPU, the same rows and their strings' numbers of tokens.
        """
        assert self.tokens is not None
        longest = int(lengths.max()) if len(lengths) else 0
        packing, source = self.tokens.packing(row, int(lengths.sum()), longest)
        if not self._text_shared:
            return self.tokens.tokens[source], packing
        return self.tokens.frozen(self._text("global"), self._text_shared, host_row, packing, source), packing


def compile_blocks(module: nn.Module, cuda_graphs: bool = False, **options: Any) -> None:
    """`torch.compile`s every transformer block below `module`, in place: see `ScenarioCLIP.compile_blocks`."""
    import torch._dynamo.config as dynamo

    # Versions of a block, beyond which Dynamo runs it uncompiled: with a graph, without, and without one for the
    # input alone; the student's weights, frozen ones and the teacher's; all tokens or those that are read; 0, 1 or more
    # rows. A step in pieces has more than the 8 that are the default.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for part in module.modules():
        if isinstance(part, VisionEncoder):
            part.bucketed = cuda_graphs
        if isinstance(part, Block):
            graphs = {"options": {"triton.cudagraphs": True}} if cuda_graphs and isinstance(part, VisionBlock) else {}
            part.compile(**{"dynamic": True, **graphs, **options})


def _freeze(encoder: Encoder, before: list[bool], blocks: int) -> int:
    """Freezes the stages asked for; returns how many from the input on are frozen without a gap."""
    frozen = [*before, *(i < blocks for i in range(len(encoder.blocks))), False]
    for stage, is_frozen in zip(encoder.stages, frozen, strict=True):
        stage.requires_grad_(not is_frozen)
    return frozen.index(False)


def _sibling(encoder: Encoder, level: str) -> Encoder:
    """The same encoder for another level: frozen parameters are the very same tensors, the others copies."""
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
