"""What was rejected while packing, grouped by cause, and what that leaves of each level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scenarioclip_fast.data.check import (
    CONSEQUENCES,
    KEEP_SCENE,
    OBJECT_REASONS,
    REASONS,
    RELATION_REASONS,
    Rejection,
)

_MANY = 0.2  # of a level's entries are lost: worth a warning
_SHOWN = 2  # causes in a warning


@dataclass(frozen=True)
class Cause:
    """Rejections with the same reason and hint: how many, and the first of them."""

    reason: str
    hint: str
    count: int
    example: str

    @property
    def explanation(self) -> str:
        """The remedy if it is known, else what the reason means."""
        if self.reason in CONSEQUENCES:
            return "follows from other rejections"
        return self.hint or REASONS[self.reason]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Loss:
    """Entries of a level: how many were found, and how many of them rejected."""

    level: str  # "scenes", "objects" or "relations"
    found: int
    rejected: int
    causes: str

    @property
    def is_total(self) -> bool:
        return 0 < self.found == self.rejected

    @property
    def is_large(self) -> bool:
        return self.rejected > _MANY * self.found

    def __str__(self) -> str:
        if self.is_total:
            return f"all {self.found} {self.level} were rejected: {self.causes}"
        share = f"{100 * self.rejected / self.found:.0f} %"
        return f"{self.rejected} of {self.found} {self.level} ({share}) were rejected: {self.causes}"


class Diagnosis:
    """Counts rejections by cause."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], str] = {}

    def add(self, rejections: Iterable[Rejection]) -> None:
        for one in rejections:
            cause = (one.reason, one.hint)
            self._counts[cause] += 1
            if cause not in self._examples:
                self._examples[cause] = f"{one.entry}: {one.reason}: {one.detail}"

    def reasons(self) -> dict[str, int]:
        """Rejections by reason, sorted by name."""
        found: Counter[str] = Counter()
        for (reason, _), count in self._counts.items():
            found[reason] += count
        return dict(sorted(found.items()))

    def causes(self) -> list[Cause]:
        """The causes, the most frequent first, then what follows from them."""
        found = [Cause(*cause, count, self._examples[cause]) for cause, count in self._counts.items()]
        return sorted(found, key=lambda cause: (cause.reason in CONSEQUENCES, -cause.count, cause.reason, cause.hint))

    def losses(self, kept: Mapping[str, int]) -> list[Loss]:
        """The losses of each level, of which `kept` entries are left."""
        reasons = self.reasons()
        lost = {
            "scenes": {reason for reason in reasons if reason not in KEEP_SCENE},
            "objects": OBJECT_REASONS,
            "relations": RELATION_REASONS,
        }
        return [
            Loss(level, kept[level] + rejected, rejected, self._summary(of_level))
            for level, of_level in lost.items()
            if (rejected := sum(reasons.get(reason, 0) for reason in of_level))
        ]

    def _summary(self, reasons: Iterable[str]) -> str:
        """The main causes of rejections with these reasons; if they follow from others, those of the others."""
        causes = self.causes()
        found = [cause for cause in causes if cause.reason in reasons]
        if found and found[0].reason in CONSEQUENCES:
            found = [cause for cause in causes if cause.reason in KEEP_SCENE - RELATION_REASONS] or found
        return "; ".join(f"{cause.count} {cause.reason} ({cause.explanation})" for cause in found[:_SHOWN])
