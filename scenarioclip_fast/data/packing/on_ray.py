"""Pack a data set on a Ray cluster: a task per part, and the merge in this process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.packing.merging import merge_parts
from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.packing.parts import DONE, part_name, part_names
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.remote_parts import is_complete
from scenarioclip_fast.data.packing.report import PackReport
from scenarioclip_fast.data.packing.staging import PARTS
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_url
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.ray_connection import RayConnection, await_files, dump_error

_RETRIES = 3  # of a part whose worker or node died


def pack_on_ray(
    source: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    address: str = "",
    *,
    parts: int | None = None,
    progress: bool = True,
    **options: Any,
) -> PackReport:
    """Pack a data set in parts on a Ray cluster, and merge them. Repeat the call to resume.

    Args:
        source, options: as of `pack`; all nodes must see the files at the same paths, or reach the URLs.
        out_dir: as of `pack`, on storage that all nodes see, or a URL that they reach.
        address: HOST:6379, auto (the running cluster of this machine), local (a new one), or empty (the running one,
            else a new one).
        parts: how many; None: those that `out_dir` has of an earlier run, or one per node.
        progress: report progress.

    Raises:
        MissingDependencyError: Ray is not installed.
        UserError: as of `pack` and `merging.merge_parts`, or the cluster cannot be used. Finished shards are kept.
    """
    if parts is not None and parts < 1:
        raise UserError(f"parts: got {parts}, expected at least 1")
    named = [source] if isinstance(source, str | Path) else source
    out = RemoteFolder.of(str(out_dir)) if is_url(out_dir) else Path(out_dir).absolute()
    paths = [str(path) if is_url(path) else os.path.abspath(path) for path in named]
    options |= {name: os.path.abspath(options[name]) for name in ("images", "actions") if options.get(name)}
    allow_empty_level = options.get("allow_empty_level", False)
    if not is_complete(out):
        if isinstance(out, Path):
            out.mkdir(parents=True, exist_ok=True)
        with _PackingCluster(address, out if isinstance(out, Path) else None, paths, "SOURCE") as cluster:
            earlier = next((n for _, n in part_names(out)), None)
            with closing(cluster.pack(paths, str(out), parts or earlier, options)) as done:  # while there is a cluster
                for error in show_progress(done, cluster.parts, "packing", "parts") if progress else done:
                    if error is not None:
                        raise error
            if isinstance(out, Path):
                await_files(out / PARTS / part_name((i, cluster.parts)) / DONE for i in range(1, cluster.parts + 1))
        return merge_parts(
            str(out),
            boxes="xyxy" if options.get("boxes") == "xyxy" else None,
            allow_empty_level=allow_empty_level,
            progress=progress,
        )
    return pack(paths, str(out), part=(1, parts or 1), progress=progress, **options)  # up to date, or of something else


class _PackingCluster(RayConnection):
    """A Ray cluster that packs parts. `parts` is their number."""

    parts = 0

    def pack(
        self, paths: list[str], out: str, parts: int | None, options: dict[str, Any]
    ) -> Generator[Exception | None, None, None]:
        """Start all parts; returns what they raise, in the order in which they end."""
        cpus = [max(1, int(node["Resources"].get("CPU", 0))) for node in self.nodes()]
        self.parts = parts or len(cpus)
        each = max(1, min(*cpus, sum(cpus) // self.parts))
        task = self._ray.remote(num_cpus=each, max_retries=_RETRIES)(_pack_part)
        options = options | {"workers": options.get("workers") or each}
        with self.one_line():
            left = [task.remote(paths, out, (i, self.parts), options) for i in range(1, self.parts + 1)]
        return self._results(left)

    def _results(self, left: list[Any]) -> Generator[Exception | None, None, None]:
        with self.one_line():
            try:
                while left:
                    done, left = self._ray.wait(left)
                    for data in self._ray.get(done):
                        yield pickle.loads(data) if data else None
            finally:
                for task in left:  # an error ends the run
                    self._ray.cancel(task, force=True)


def _pack_part(paths: list[str], out: str, part: tuple[int, int], options: dict[str, Any]) -> bytes:
    """On a node: pack a part; returns the pickled error."""
    try:
        pack(paths, out, part=part, progress=False, **options)
    except Exception as error:
        return dump_error(error)
    return b""
