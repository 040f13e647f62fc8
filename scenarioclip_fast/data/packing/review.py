"""Checks of what is packed: whether the data set was misunderstood, and what its rejections leave of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scenarioclip_fast.data.boxes import BoxTally
from scenarioclip_fast.data.check import Rejection
from scenarioclip_fast.data.packing.diagnosis import Diagnosis, Loss
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.shard_writer import PackedItem, rejection_lines
from scenarioclip_fast.data.sources.base import Scan
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory
from scenarioclip_fast.terminal import warn

# A data set that was misunderstood is recognised after this many scenes, of at least this many objects or relations.
_EARLY, _EARLY_ENTRIES = 512, 100


@dataclass(frozen=True)
class Review:
    """The checks of a run of `pack`, or of a merge, that writes to `out`.

    Attributes:
        progress: whether the run reports what it does.
        allow_empty_level: accept that all objects or all relations were rejected.
        part: of the pack that is reviewed, "2-of-7"; "": all of it.
    """

    out: Path | RemoteFolder
    progress: bool
    allow_empty_level: bool
    part: str = ""

    def log(self, message: str) -> None:
        if self.progress:
            warn(message)

    def complete(
        self,
        scan: Scan,
        tally: BoxTally,
        rejections: Callable[[], bytes],
        kept: Mapping[str, int],
        diagnosis: Diagnosis,
    ) -> list[str]:
        """Review a complete pack; returns warnings.

        Args:
            tally: the evidence of its boxes.
            rejections: reads rejected.jsonl.
            kept: the counts of all splits.
            diagnosis: of all rejections.

        Raises:
            UserError: the boxes are in another convention, or a level lost all of its entries.
        """
        self.check_boxes(tally)
        losses = self.check_losses(diagnosis.losses(kept), rejections)
        doubt = tally.doubt()
        large = [str(loss) for loss in losses if loss.is_large]
        return [*scan.warnings, *([] if doubt is None else [doubt]), *large]

    def check_boxes(self, tally: BoxTally) -> None:
        """Raise UserError if the boxes are in another convention."""
        if (verdict := tally.verdict()) is not None:
            raise UserError(f"{verdict}; --boxes xyxy packs them as they are")

    def check_losses(self, losses: list[Loss], rejections: Callable[[], bytes]) -> list[Loss]:
        """Return losses; raise UserError if one is total, which lists the rejections."""
        for loss in losses:
            if loss.is_total and not self.allow_empty_level:
                listing = self._list(rejections())
                raise UserError(f"{loss}; see {listing}; --allow-empty-level packs what is left")
        return losses

    @property
    def listing(self) -> Path:
        """Where a run that fails lists its rejections: next to `out`, which may hold an older pack.

        For a URL, it is the current directory.
        """
        out = self.out.absolute() if isinstance(self.out, Path) else Path(self.out.name).absolute()
        part = f".{self.part}" if self.part else ""
        return out.with_name(f"{out.name}{part}.rejected.jsonl")

    def _list(self, lines: bytes) -> Path:
        with Directory(self.listing.parent.resolve()) as parent, parent.open(self.listing.name, "wb") as file:
            file.write(lines)
        return self.listing

    def no_scenes(self, rejected: list[Rejection], ignored: Mapping[str, int]) -> UserError:
        """The error that there are no valid scenes."""
        listing = self._list(_listing(rejected))
        diagnosis = Diagnosis()
        diagnosis.add(rejected)
        found = [f"{c.count} {c.reason}{f' ({c.hint})' if c.hint else ''}" for c in diagnosis.causes()]
        found += [f"{n} {suffix} ignored" for suffix, n in ignored.items()]
        reasons = ", ".join(found) or "the source is empty"
        return UserError(f"{self.out}: no valid scenes to pack: {reasons}; see {listing}")


class Watch:
    """Ends a run early if its first items show that the data set was misunderstood.

    Args:
        review: of the run.
        tally: to which the evidence of the items' boxes is added.
    """

    def __init__(self, review: Review, tally: BoxTally) -> None:
        self._review, self._tally = review, tally
        self._seen = 0
        self._rejected: list[Rejection] = []  # of the first items
        self._kept = Counter[str]()

    def watched(self, packed: Iterable[PackedItem]) -> Iterator[PackedItem]:
        """Pass items on; raises UserError."""
        for item in packed:
            if not self._tally.add(item.boxes):
                item.boxes = None  # not needed in the journal
            elif self._tally.is_full:
                self._review.check_boxes(self._tally)
            self._seen += 1
            if self._seen <= _EARLY:
                self._rejected += item.rejected
                self._kept.update(
                    scenes=1, objects=len(item.texts.get("object", ())), relations=len(item.texts.get("relation", ()))
                )
            if self._seen == _EARLY:
                diagnosis = Diagnosis()
                diagnosis.add(self._rejected)
                losses = [loss for loss in diagnosis.losses(self._kept) if loss.found >= _EARLY_ENTRIES]
                self._review.check_losses(losses, partial(_listing, self._rejected))
            yield item


def _listing(rejected: list[Rejection]) -> bytes:
    return b"".join(rejection_lines(rejected))
