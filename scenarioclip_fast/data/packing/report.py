"""What a pack contains: the summary that `pack` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.packing.diagnosis import Cause
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.shard_writer import COUNTS
from scenarioclip_fast.terminal import printable


@dataclass
class PackReport:
    """Summary of a pack: per split, the counts of `shard_writer.COUNTS`; and rejections by reason and by cause.

    `ignored` counts tar members that belong to no scene, by suffix. `up_to_date`: an up-to-date pack existed, so
    nothing was written.
    """

    directory: Path | str  # str: a URL
    splits: dict[str, dict[str, int]]
    vocabulary: dict[str, int]
    rejected: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    up_to_date: bool = False
    causes: list[Cause] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'':<6}  {'scenes':>8}  {'objects':>8}  {'relations':>9}"]
        lines += [
            f"{split:<6}  {n['scenes']:>8}  {n['objects']:>8}  {n['relations']:>9}" for split, n in self.splits.items()
        ]
        sizes = self.vocabulary
        lines.append(f"texts   {sizes['global']} actions, {sizes['object']} objects, {sizes['relation']} relations")
        total = {name: sum(n[name] for n in self.splits.values()) for name in COUNTS}
        if missing := total["scenes"] - total["actions"]:
            lines.append(f"{missing} of {total['scenes']} scenes have no action: they have no text at the global level")
        if missing := total["relations"] - total["masked_relations"]:
            lines.append(
                f"{missing} of {total['relations']} relations have no masks: only data.relation_view=box and scene "
                "use them"
            )
        if self.causes:
            lines.append("rejected (details in rejected.jsonl):")
            lines += [f"  {cause.count:>8}  {cause.reason}: {cause.explanation}" for cause in self.causes]
        lines += [printable(f"warning: {warning}") for warning in self.warnings]
        if self.ignored:
            lines.append(printable("ignored: " + ", ".join(f"{n} {suffix}" for suffix, n in self.ignored.items())))
        return "\n".join(lines)


def report_of(out: Path | RemoteFolder, manifest: dict[str, Any], up_to_date: bool = False) -> PackReport:
    """The report of a complete pack."""
    splits = {split: {name: found[name] for name in COUNTS} for split, found in manifest["splits"].items()}
    causes = [Cause(**cause) for cause in manifest["causes"]]
    return PackReport(
        out if isinstance(out, Path) else str(out),
        splits,
        manifest["vocabulary"],
        manifest["rejected"],
        manifest["ignored"],
        up_to_date,
        causes,
        manifest["warnings"],
    )
