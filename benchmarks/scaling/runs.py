"""Real training steps of several gloo ranks on a small model, with this package's loss and as open_clip gathers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scenarioclip_fast.benchmarks.bench_step import FixedVocabulary
from scenarioclip_fast.benchmarks.scaling.counting import CallCounter, tcp_bytes_sent
from scenarioclip_fast.benchmarks.scaling.model import SMALL, Workload
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.multiprocessing.spawn import spawn

from scenarioclip_fast.data import Batch
from scenarioclip_fast.distributed import World
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.losses import MultiLevelContrastiveLoss, ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig
from scenarioclip_fast.model.config import FreezeConfig
from scenarioclip_fast.model.scenarioclip import Embeddings
from scenarioclip_fast.train.build import wrap
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.precision import autocast
from scenarioclip_fast.train.step import Phase, StepModule, plan_texts

try:
    from open_clip.loss import ClipLoss as open_clip_loss
except ImportError:
    open_clip_loss = None

BATCHES = 4  # that counts are means of: the largest share of a few ranks varies by several percent
FORMS = ("ours", "open_clip", "open_clip, local loss")


def small_model() -> ModelConfig:
    """Two blocks in each encoder, the first one frozen, as wide as the exchanged embeddings of SMALL."""
    return ModelConfig(
        embed_dim=SMALL.width,
        vision=VisionConfig(16, 8, 32, 2, 2),
        text=TextConfig(16, 49408, 32, 2, 2),
        freeze=FreezeConfig(1, 1),
    )


class OpenClipLevels(MultiLevelContrastiveLoss):
    """open_clip's loss at each level, with gradients through its gathers; every row has its own text.

    Runs open_clip's ClipLoss where it is installed, else the same formulas.

    local_loss: a rank compares its own rows with all ranks'; otherwise every rank computes the logits of all ranks.
    """

    def __init__(self, local_loss: bool) -> None:
        super().__init__(group=dist.group.WORLD)
        self.local_loss, self.ranks = local_loss, dist.get_world_size()

    def terms(self, embeddings: Any) -> Tensor:  # [levels]
        e = embeddings
        rows = zip(e.image, e.text, e.text_index, self.scales, strict=True)
        return torch.stack([self._level(image, text[index], scale) for image, text, index, scale in rows])

    def _level(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        # In bfloat16, as this package gathers: in open_clip the dtype depends on the precision.
        image, text = (F.normalize(x, dim=-1).bfloat16() for x in (image, text))
        if open_clip_loss is not None:
            loss = open_clip_loss(self.local_loss, gather_with_grad=True, rank=dist.get_rank(), world_size=self.ranks)
            return torch.as_tensor(loss(image, text, scale))
        images, texts = (torch.cat(all_gather(x)) for x in (image, text))
        labels = torch.arange(len(image))
        if self.local_loss:
            labels = labels + dist.get_rank() * len(image)
            logits = scale * image @ texts.T, scale * text @ images.T
        else:
            labels = torch.arange(len(images))
            logits = (whole := scale * images @ texts.T), whole.T
        return (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2


def small_workload() -> Workload:
    """SMALL with the parameters of its model and the loss's three temperatures."""
    trained = sum(p.numel() for p in ScenarioCLIP(small_model()).parameters() if p.requires_grad)
    return replace(SMALL, parameters=trained + len(LEVELS))


@dataclass(frozen=True)
class Counts:
    """Of one step of one rank, in the mean over batches.

    calls, bytes: per collective, as `CallCounter` counts them;  sent: bytes over TCP
    operations: of the matrix products of the loss, forward and backward
    loss: the contrastive loss, averaged over the ranks
    """

    calls: dict[str, int]
    bytes: dict[str, int]
    sent: int
    operations: int
    loss: float


def batch(workload: Workload, rank: int, number: int) -> Batch:
    """A rank's scenes: random pixels, and texts drawn from the workload's vocabularies."""
    g = torch.Generator().manual_seed(1000 * number + rank)
    n, ids = workload.scenes, []
    for level in workload.levels:
        weights = torch.from_numpy(level.probabilities())
        ids.append(torch.multinomial(weights, n * level.per_scene, replacement=True, generator=g))
    scene = torch.arange(n)
    objects, relations = (scene.repeat_interleave(level.per_scene) for level in workload.levels[1:])
    pixels = torch.randn(sum(map(len, ids)), 3, 16, 16, generator=g)
    return Batch(pixels, [f"{rank}/{i}" for i in range(n)], objects, relations, *ids)


class Rank:
    """A rank's model, loss and batches; `step` runs the forward and backward passes of the trainer's step."""

    def __init__(self, form: str, workload: Workload) -> None:
        group = dist.group.WORLD
        self.form, self.scenes = form, workload.scenes
        torch.manual_seed(0)
        self.world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)
        self.model = ScenarioCLIP(small_model())
        tokens = [[[49406, 1 + i % 49000, 49407] for i in range(level.vocabulary)] for level in workload.levels]
        self.model.set_vocabulary(FixedVocabulary(dict(zip(LEVELS, tokens, strict=True))))
        self.teacher = EMATeacher(self.model)
        own = ScenarioLoss(group=group)
        self.loss = own if form == "ours" else ScenarioLoss(contrastive=OpenClipLevels(form.endswith("local loss")))
        self.module = StepModule(self.model, self.loss).train()
        self.parallel = wrap(self.module, self.teacher, TrainConfig(), self.world)
        self.batches = [batch(workload, self.world.rank, k) for k in range(BATCHES)]

    def step(self, k: int) -> float:
        batch = self.batches[k]
        texts = self.model.tokens.unique_texts(batch.host_ids)  # type: ignore[union-attr]
        if self.form == "ours":
            texts = replace(texts, plan=plan_texts(self.loss, texts, self.scenes, SMALL.width, "bf16"))
        with autocast("bf16", self.world.device):
            terms: dict[str, Tensor] = self.parallel(Phase.LOSS, batch, texts, self.teacher)
        terms["loss"].backward()
        mean = self.world.mean_(torch.stack([term.detach().float() for term in terms.values()]))
        values = dict(zip(terms, mean.tolist(), strict=True))
        return sum(values[f"contrastive/{level}"] for level in LEVELS)

    def embed(self, k: int) -> Embeddings:
        """Return embeddings without a graph, which require gradients."""
        batch = self.batches[k]
        texts = self.model.tokens.unique_texts(batch.host_ids)  # type: ignore[union-attr]
        with torch.no_grad(), autocast("bf16", self.world.device):
            _, embeddings = self.module(Phase.EMBED, batch, texts, None)
        for part in (embeddings.image, embeddings.text):
            part[:] = [x.requires_grad_() for x in part]
        return embeddings

    def backpropagate_loss(self, embeddings: Embeddings) -> None:
        """Run the loss alone, forward and backward."""
        with autocast("bf16", self.world.device):
            loss = self.loss(embeddings)["loss"]
        loss.backward()


def count(form: str, workload: Workload = SMALL) -> Counts:
    """Count steps of this rank, after two others: DistributedDataParallel lays out its buckets anew in the second."""
    rank = Rank(form, workload)
    for k in range(2):
        rank.step(k)
    dist.barrier()
    before = tcp_bytes_sent()
    with CallCounter() as steps:
        losses = [rank.step(k) for k in range(BATCHES)]
    dist.barrier()  # until all that this rank has sent is received
    sent = tcp_bytes_sent() - before
    embeddings = [rank.embed(k) for k in range(BATCHES)]
    with CallCounter() as products:
        for of_batch in embeddings:
            rank.backpropagate_loss(of_batch)
    calls, sizes = ({op: round(n / BATCHES) for op, n in found.items()} for found in (steps.calls, steps.bytes))
    return Counts(calls, sizes, round(sent / BATCHES), round(products.operations / BATCHES), sum(losses) / BATCHES)


def _worker(rank: int, ranks: int, forms: tuple[str, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    counts = {form: vars(count(form)) for form in forms}
    Path(folder, f"{rank}.json").write_text(json.dumps(counts), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, forms: tuple[str, ...] = FORMS) -> dict[str, list[Counts]]:
    """Run `ranks` processes on this machine; return each rank's counts of each form."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (ranks, forms, folder), nprocs=ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return {form: [Counts(**counts[form]) for counts in found] for form in forms}
