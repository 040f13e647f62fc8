"""The stage curate: what the models found becomes a scene, or is rejected.

Its record is {"scene": the scene, "rejected": [{"part", "reason", "detail"}, ...]}. Objects and relations have the ids
of their positions in the records of ground and caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import CurateConfig, GenerateConfig
from scenarioclip_fast.generate.curate.decisions import apply_all, read_all_decisions
from scenarioclip_fast.generate.curate.merge import Embedder, merge_texts
from scenarioclip_fast.generate.curate.negatives import read_antonyms
from scenarioclip_fast.generate.curate.rules import Renaming, Rules
from scenarioclip_fast.generate.images import read_list
from scenarioclip_fast.generate.records import all_outcomes, hash_of
from scenarioclip_fast.generate.stages import Outcome, Work

# Increment it when the same records give other scenes, so that earlier ones are made anew.
_VERSION = 2


def prepare(config: GenerateConfig, directory: Path) -> dict[str, Any]:
    """What curation depends on besides its settings and the records of a unit.

    Returns:
        "merged": replacements of texts by kind, see `Renaming`; "antonyms" and "decisions": hashes of their contents.

    Raises:
        UserError: the file of antonyms or decisions is unusable, or the encoder cannot be loaded.
    """
    options = config.curate
    context: dict[str, Any] = {"version": _VERSION, "merged": _merged(options, directory)}
    if options.negatives != "none":
        context["antonyms"] = hash_of([read_antonyms(options.antonyms)])
    if decisions := read_all_decisions(options):
        keys = {item.key for unit in read_list(directory / "images.jsonl") for item in unit.items}
        for one in decisions:
            one.check_keys(keys)
        context["decisions"] = [one.digest for one in decisions]
    return context


def _merged(options: CurateConfig, directory: Path) -> dict[str, dict[str, str]]:
    thresholds = {
        "actions": options.merge_actions,
        "objects": options.merge_objects,
        "predicates": options.merge_predicates,
    }
    if not any(thresholds.values()):
        return {}
    renaming = Renaming(options)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in thresholds}
    for outcome in all_outcomes(directory / "caption"):
        if not outcome.reason:
            counts["actions"][renaming.unmerged_action(outcome.result["action"]) or ""] += 1
            for subject, predicate, object_ in outcome.result["relations"]:
                counts["predicates"][normalise(predicate)] += 1
                for end in (subject, object_):  # also those that are no object's name, without counting them
                    counts["objects"][renaming.unmerged_object(end)] += 0
    for outcome in all_outcomes(directory / "ground"):
        for item in outcome.result.get("objects", []):
            counts["objects"][renaming.unmerged_object(item["name"])] += 1
    embedder = Embedder(options.embedder)
    for found in counts.values():
        found.pop("", None)
    return {
        kind: merge_texts(counts[kind], embedder, threshold) for kind, threshold in thresholds.items() if threshold > 0
    }


class Curate:
    """The stage.

    Args:
        context: of `prepare`.
    """

    name: ClassVar[str] = "curate"

    def __init__(self, options: CurateConfig, context: dict[str, Any]) -> None:
        self._options, self._context = options, context
        self._rules: Rules | None = None
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, float]:
        return dict(self._counts)

    def _load(self) -> Rules:
        """Read the files in this process."""
        options = self._options
        antonyms = read_antonyms(options.antonyms) if options.negatives != "none" else {}
        decisions = read_all_decisions(options)
        for one, digest in zip(decisions, self._context.get("decisions", ()), strict=True):
            if one.digest != digest:
                raise UserError(f"{one.path}: it has changed since the stage began; re-run the command")
        decide = partial(apply_all, decisions, min_agreement=options.min_agreement) if decisions else None
        return Rules(options, Renaming(options, self._context["merged"]), antonyms, decide)

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield the outcome of each work."""
        if self._rules is None:
            self._rules = self._load()
        for work in works:
            try:
                outcome = self._rules.curate(work.key, work.records)
            except UserError:
                raise
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # records of another's model
                detail = f"{type(error).__name__}: {error}"
                outcome = Outcome(work.key, reason="malformed_entry", detail=detail)
            self._count(outcome)
            yield outcome

    def _count(self, outcome: Outcome) -> None:
        if outcome.reason:
            return
        scene = outcome.result["scene"]
        self._counts["objects"] += len(scene["objects"])
        self._counts["relations"] += len(scene["relations"])
        self._counts["negatives"] += sum(len(relation["negatives"]) for relation in scene["relations"])
        self._counts["parts dropped"] += len(outcome.result["rejected"])

    def close(self) -> None:
        """Forget the decisions."""
        self._rules = None


def make(config: GenerateConfig, device: str, context: Any = None) -> Curate:
    """Create the stage; it needs no device."""
    return Curate(config.curate, context or {"merged": {}})
