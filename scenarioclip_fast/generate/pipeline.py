"""Runs the stages over units of images, in this process or in worker processes, and resumes.

DIR/generate.json, images.jsonl: see `run_directory`
DIR/STAGE/*.jsonl       records, see `records`
DIR/runs.jsonl          per run and stage: images, seconds and counts
DIR/rejected.jsonl      {"stage", "key", "part", "reason", "detail"} per rejected image, object or relation
DIR/shards/             the packed data set
DIR/published/          the same in the published layout, on request
DIR/report.html, review.html
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.data.packing.options import PackOptions
from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.packing.report import PackReport
from scenarioclip_fast.data.parallel import Workers
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import kind_of, open_regular, status_of
from scenarioclip_fast.generate.coco import write_coco
from scenarioclip_fast.generate.config import EXPENSIVE, GIVEN, RECORDED, STAGES, GenerateConfig, fingerprint
from scenarioclip_fast.generate.images import Unit
from scenarioclip_fast.generate.ray_run import RayCluster
from scenarioclip_fast.generate.records import (
    UnitFile,
    clear,
    content_hash,
    has_results,
    hash_of,
    is_finished,
    rejections,
    results,
)
from scenarioclip_fast.generate.review import write_review
from scenarioclip_fast.generate.run_directory import RunDirectory
from scenarioclip_fast.generate.run_report import write_run_report
from scenarioclip_fast.generate.source import CuratedSource, published_scenes
from scenarioclip_fast.generate.stages import Outcome, Stage, Work
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.requirements import require
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.terminal import printable, warn

FACTORY = "scenarioclip_fast.generate.factory"
_LARGE = {"curate": 10_000}  # images that take longer than starting a worker
_PUBLISHED = re.compile(r"metadata(_\w+)?\.json|classes\.json|images|sam_results|\..*\.partial")
_EARLY = 32  # outcomes after which a stage that rejects all images for one reason ends


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to run a stage on a unit. Picklable.

    Attributes:
        directory: of the run.
        name: of the stage.
        device: auto, cpu, cuda or cuda:N.
        context: what the stage found in the records of all units, see `factory.prepare_context`.
        factory: the module whose functions create the stages, see `factory`.
        attempt: see `records.UnitFile`.
    """

    directory: Path
    name: str
    config: GenerateConfig
    device: str
    context: Any = None
    factory: str = FACTORY
    attempt: str = ""

    @property
    def uses_gpu(self) -> bool:
        """Whether the stage runs a model, on a GPU if there is one."""
        section = getattr(self.config, self.name)
        model_here = section.model != GIVEN and not self.is_remote if self.name in EXPENSIVE else False
        return model_here and self.device != "cpu"

    @property
    def is_remote(self) -> bool:
        """Whether the work is done by a server, which one process keeps busy."""
        return self.name == "caption" and bool(self.config.caption.url) and self.config.caption.model != GIVEN

    @property
    def records(self) -> Path:
        return self.directory / self.name

    def make_stage(self) -> Stage:
        """Create the stage; the model is loaded when it runs."""
        factory = importlib.import_module(self.factory)
        stage: Stage = factory.make_stage(self.name, self.config, self.device, self.context)
        return stage

    def file(self, unit: Unit) -> tuple[UnitFile, dict[str, dict[str, Any]]]:
        """The file of a unit, and the records of the stages before, by key and stage.

        Raises:
            UserError: the stage before has not finished the unit.
        """
        inputs = self._inputs(unit)
        before = RECORDED[: RECORDED.index(self.name)]
        records: dict[str, dict[str, Any]] = {}
        found: dict[str, Outcome] = {item.key: Outcome(item.key) for item in unit.items}
        for stage in before:
            found = results(self.directory / stage / unit.file_name)
            for key, outcome in found.items():
                records.setdefault(key, {})[stage] = outcome.result
        keys = [item.key for item in unit.items if item.key in found and not found[item.key].reason]
        return UnitFile(self.records, unit.number, inputs, keys, self.attempt), records

    def outcomes(self, unit: Unit, *, retried: bool) -> Iterable[Outcome]:
        """The outcomes of a unit so far, see `UnitFile.found`; raises UserError like `file`."""
        keys = [item.key for item in unit.items]
        return UnitFile(self.records, unit.number, self._inputs(unit), keys).found(retried=retried).values()

    def _inputs(self, unit: Unit) -> str:
        """A hash of what the records of a unit depend on."""
        settings = fingerprint(getattr(self.config, self.name))
        at = RECORDED.index(self.name)
        if at == 0:
            return hash_of([settings, self.context, [item.key for item in unit.items]])
        stage = RECORDED[at - 1]
        path = self.directory / stage / unit.file_name
        if not path.is_file():
            raise UserError(f"{self.name}: {path} does not exist; finish the stage {stage} first (--stages)")
        before = replace(self, name=stage, context=None)  # of the stages, only curate has a context
        if not is_finished(path, before._inputs(unit), retried=True):
            raise UserError(
                f"{self.name}: the inputs of the records of {stage} have changed; run the stage {stage} again first "
                "(--stages)"
            )
        return hash_of([settings, self.context, content_hash(path)])

    def is_finished(self, unit: Unit) -> bool:
        """Whether nothing is left to do for a unit; raises UserError like `file`."""
        return is_finished(self.records / unit.file_name, self._inputs(unit))


def process(job: Job, stage: Stage, units: Iterable[Unit]) -> Iterator[Outcome]:
    """Run a stage on units, skipping finished images; yields the outcomes as they come.

    Raises:
        UserError: the first images were all rejected for one reason, or see `Stage.run`.
    """
    store = _Store(job.name)

    def works() -> Iterator[Work]:
        for unit in units:
            if job.is_finished(unit):
                store.trust()
                continue
            file, records = job.file(unit)
            missing = set(file.resume())
            if not missing:
                file.finish()
                continue
            store.open(file, missing)
            for item in unit.items:
                if item.key in missing:
                    yield Work(item, records.get(item.key, {}))

    try:
        for outcome in stage.run(works()):
            store.add(outcome)
            yield outcome
        store.end()
    finally:
        store.close()


class _Store:
    """Appends outcomes to the files of their units.

    Rejections before the first image that is not rejected are held back: if there are only these, something else is
    wrong, and the next run tries the images again.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._file_of: dict[str, UnitFile] = {}  # by the key of an unfinished image
        self._held: list[Outcome] = []
        self._trusted = False

    def open(self, file: UnitFile, missing: Iterable[str]) -> None:
        """Expect the outcomes of the missing images of a unit."""
        self._file_of |= dict.fromkeys(missing, file)
        if file.has_results:
            self.trust()

    def add(self, outcome: Outcome) -> None:
        """Store an outcome."""
        if not outcome.reason:
            self.trust()
        if self._trusted:
            self._keep(outcome)
            return
        self._held.append(outcome)
        reasons = {one.reason for one in self._held}
        if len(self._held) == _EARLY and len(reasons) == 1:
            raise UserError(
                f"{self._name}: the first {_EARLY} images were all rejected: {outcome.reason}: {outcome.detail}; "
                "correct the cause and re-run the command"
            )

    def trust(self) -> None:
        """Keep rejections from here on: an image was not rejected."""
        self._trusted = True
        for outcome in self._held:
            self._keep(outcome)
        self._held.clear()

    def end(self) -> None:
        """Keep what was held back, to be tried again."""
        for outcome in self._held:
            self._keep(replace(outcome, retry=True))
        self._held.clear()

    def _keep(self, outcome: Outcome) -> None:
        file = self._file_of.pop(outcome.key)
        if file.append(outcome):
            file.finish()

    def close(self) -> None:
        """Close the files of unfinished units."""
        for file in self._file_of.values():
            file.close()


@dataclass
class StageReport:
    """What a stage did in this run.

    Attributes:
        images: that it processed in this run.
        rejected: of these, by reason.
        counts: see `stages.Stage`.
    """

    name: str
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.images += 1
        if outcome.reason:
            self.rejected[outcome.reason] += 1

    def merge(self, part: StageReport) -> None:
        """Add what another process did."""
        self.images += part.images
        self.rejected += part.rejected
        self.counts += part.counts

    def __str__(self) -> str:
        rate = f"{self.images / self.seconds:.1f} images/s" if self.images and self.seconds else ""
        parts = [f"{self.images} images", rate]
        parts += [f"{_number(value)} {name}" for name, value in self.counts.items() if value]
        parts += [f"{n} {reason}" for reason, n in self.rejected.most_common()]
        return f"{self.name:<8} {', '.join(part for part in parts if part)}"


_of_process: tuple[Job, Stage] | None = None


def _stage_of_process(job: Job) -> Stage:
    """The stage of the last unit if it was of the same job, so that a model is loaded once."""
    global _of_process
    if _of_process is None or _of_process[0] != job:
        if _of_process is not None:
            _of_process[1].close()
        _of_process = job, job.make_stage()
    return _of_process[1]


def process_unit(job: Job, unit: Unit) -> StageReport:
    """Run a stage on one unit in a worker process, which keeps the stage for the next one."""
    numbers = multiprocessing.current_process()._identity
    if job.device == "auto" and numbers and (count := torch.cuda.device_count()):
        job = replace(job, device=f"cuda:{(numbers[-1] - 1) % count}")
    report, error = attempt_unit(job, unit)
    if error is not None:
        raise error
    return report


def attempt_unit(job: Job, unit: Unit) -> tuple[StageReport, Exception | None]:
    """Like `process_unit`, and return the error that ended it."""
    report = StageReport(job.name)
    try:
        stage = _stage_of_process(job)
        before = Counter(stage.counts)
        try:
            for outcome in process(job, stage, [unit]):
                report.add(outcome)
        finally:
            report.counts = Counter(stage.counts)
            report.counts.subtract(before)
    except Exception as error:
        return report, error
    return report, None


@dataclass
class GenerateReport:
    """The stages that ran, the packed data set, and other files that were written."""

    directory: Path
    stages: list[StageReport] = field(default_factory=list)
    packed: PackReport | None = None
    written: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(stage) for stage in self.stages]
        lines += [str(self.packed)] if self.packed else []
        lines += [printable(f"wrote {path}") for path in self.written]
        return "\n".join(lines)


def generate(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    config: GenerateConfig | None = None,
    *,
    stages: Sequence[str] = STAGES,
    device: str = "auto",
    workers: int = 1,
    unit_size: int = 128,
    redo: Sequence[str] = (),
    review: int = 50,
    coco: str | Path | None = None,
    progress: bool = True,
    ray: str | None = None,
    factory: str = FACTORY,
) -> GenerateReport:
    """Turn images into a packed data set of scenes. Repeat the call to resume.

    Args:
        images: folders, image files, tars, lists of paths and packed data sets; none: those of an earlier run.
        out: created; must be empty or of an earlier run.
        config: models and settings; None: those of the last run in `out`, or the defaults, which name models on a hub
            but no vision-language model. Relative paths of files and directories that exist become absolute.
        stages: which stages to run, in the order of STAGES.
        device: auto, cpu, cuda or cuda:N; with several workers, auto gives each a GPU in turn.
        workers: processes; each loads the models. The results do not depend on their number, except for the rounding
            of models on GPUs.
        unit_size: images that are stored together, a multiple of the batch sizes.
        redo: stages whose records are discarded first.
        review: scenes on the review page; 0: no page.
        coco: COCO file to write.
        progress: show progress.
        ray: run the stages on a Ray cluster, whose machines must all see `out` and the images at the same paths:
            HOST:6379, auto (the running cluster of this machine), local (a new one), or empty (the running one, else
            a new one). Packing stays in this process.
        factory: module that creates the stages instead of `generate.factory`, with the same functions; every process
            must be able to import it.

    Raises:
        MissingDependencyError: `ray` is given, and Ray is not installed.
        UserError: no images, a setting is invalid or differs from that of the records in `out`, a stage cannot go on,
            or no image is left. Finished records are kept.
    """
    directory = RunDirectory(Path(out))
    sources = [images] if isinstance(images, str | Path) else images
    if not sources and not directory.exists:
        raise UserError(f"{directory.path}: holds no earlier run; name the images: generate IMAGES --out DIR")
    config = (config or GenerateConfig.of(directory.settings())).with_absolute_paths()
    with Workers(workers) as pool:
        run = _Run(directory, config, device, pool, progress, ray, factory)
        run.check(stages, redo, unit_size, review, coco)
        with directory.opened():
            units = directory.list_units(sources, unit_size, progress=progress)
            run.check_models(stages, redo, units)
            directory.settle(config, stages, redo)
            for name in redo:
                clear(run.out / name)
            return run.run(stages, units, review, coco)


@dataclass(frozen=True)
class _Run:
    directory: RunDirectory
    config: GenerateConfig
    device: str
    workers: Workers
    progress: bool
    ray: str | None
    factory: str

    @property
    def out(self) -> Path:
        return self.directory.path

    def run(self, stages: Sequence[str], units: list[Unit], review: int, coco: str | Path | None) -> GenerateReport:
        """Run the stages, and write the lists and pages."""
        report = GenerateReport(self.out)
        names = [name for name in RECORDED if name in stages]
        source = CuratedSource(self.out, units)
        try:
            if self.ray is None:
                report.stages += [self.stage(name, units) for name in names]
            elif names:
                report.stages += self.stages_on_ray(self.ray, names, units)
        except UserError:
            with suppress(OSError, UserError):  # records that cannot be read, for one: the first error is to be seen
                source.write_rejections(self.out / "rejected.jsonl")
            raise
        source.write_rejections(self.out / "rejected.jsonl")
        if "pack" in stages:
            if source.scenes and "curate" not in stages:
                self._check_curated(units)
            report.packed = self.pack(source)
        self.directory.save(self.config, stages)
        if coco is not None and not source.scenes:
            raise UserError(
                f"{coco}: not written, because {self.out} has no curated scenes; run the stage curate first"
            )
        if source.scenes:
            if coco is not None:
                write_coco(self.out, coco)
                report.written.append(Path(coco))
            if review:
                try:
                    report.written.append(write_review(self.out, units, self.out / "review.html", scenes=review))
                except UserError as error:  # the images cannot be read, and the data set is complete
                    warn(f"warning: no review page: {error}")
            report.written.append(write_run_report(self.out, self.out / "report.html"))
        return report

    def check(
        self, stages: Sequence[str], redo: Sequence[str], unit_size: int, review: int, coco: str | Path | None
    ) -> None:
        """Check the arguments before anything is read."""
        for name in (*stages, *redo):
            if name not in STAGES:
                near = nearest(name, STAGES)
                hint = f"did you mean {near}?" if near else f"expected {', '.join(STAGES)}"
                raise UserError(f"stage {name!r}: {hint}")
        if unused := [name for name in redo if name not in stages]:
            raise UserError(f"redo: got {unused[0]}, which is not among the stages to run ({', '.join(stages)})")
        if self.workers.count < 1:
            raise UserError(f"workers: got {self.workers.count}, expected at least 1")
        if coco is not None:
            self._check_coco(Path(coco))
        if review < 0:
            raise UserError(f"review: got {review}, expected at least 0 scenes")
        if unit_size < 1:
            raise UserError(f"unit size: got {unit_size}, expected at least 1")
        if self.ray is not None:
            if self.device not in ("auto", "cpu", "cuda"):
                raise UserError(f"device: got {self.device!r}, expected auto, cpu or cuda: Ray assigns the GPUs")
        elif self.device != "auto":
            pick_device(self.device)
        if "caption" in stages and not self.config.caption.model:
            raise UserError(
                "caption.model: got nothing, expected a vision-language model: --vlm-url URL --vlm-model NAME for one "
                "on a server, or --vlm-model PATH for one in this process"
            )
        if self.ray is not None:
            require("ray")

    def _check_coco(self, path: Path) -> None:
        if path.is_dir():
            raise UserError(f"coco: got the directory {path}, expected a file to write")
        own, out = path.resolve(), self.out.resolve()
        if own.parent == out and (own.suffix in (".jsonl", ".html") or own.name in ("generate.json", "lock")):
            raise UserError(f"coco: {path} is a file of the run; choose another name")
        if any((out / name) in own.parents for name in (*RECORDED, "shards", "published")):
            raise UserError(f"coco: {path} is in a directory that the run writes; choose another one")

    def check_models(self, stages: Sequence[str], redo: Sequence[str], units: Iterable[Unit]) -> None:
        """Check the models of later stages before the first one runs, which may take days, and those of stages whose
        records are to be discarded."""
        check = importlib.import_module(self.factory).check_stage
        for name in EXPENSIVE:
            # caption runs first, and its server may still be starting.
            later = name != "caption" and any(not (self.out / name / unit.file_name).exists() for unit in units)
            if name in stages and (later or name in redo):
                check(name, self.config)

    def _check_curated(self, units: list[Unit]) -> None:
        job = self._job("curate")
        left = sum(not job.is_finished(unit) for unit in units)
        if left:
            raise UserError(
                f"pack: {left} of {len(units)} units of images are not curated, or their captions, boxes, masks or "
                "decisions have changed since; add curate to --stages"
            )

    def stage(self, name: str, units: list[Unit]) -> StageReport:
        """Run a stage on all units."""
        start = time.perf_counter()
        job = self._job(name)
        report = StageReport(name)
        todo = [unit for unit in units if not job.is_finished(unit)]
        try:
            images = sum(len(unit.items) for unit in todo)
            if self.workers.count > 1 and len(todo) > 1 and not job.is_remote and images >= _LARGE.get(name, 0):
                self._in_workers(job, todo, report)
            elif todo:
                self._here(job, todo, report)
        finally:
            report.seconds = time.perf_counter() - start
            self._log(report)
        _check_left(job, units, report)
        return report

    def _job(self, name: str) -> Job:
        context = importlib.import_module(self.factory).prepare_context(name, self.config, self.out)
        return Job(self.out.absolute(), name, self.config, self.device, context, self.factory)

    def stages_on_ray(self, address: str, names: Sequence[str], units: list[Unit]) -> list[StageReport]:
        """Run stages on all units: in one pass through all of them, as far as none needs all units of the one before.

        With several stages in a pass, the seconds of each are those of the pass.
        """
        needs_context = importlib.import_module(self.factory).needs_context
        reports: list[StageReport] = []
        with RayCluster(address, self.out.absolute(), [units[0].items[0].path]) as cluster:
            passes: list[list[str]] = []
            for name in names:
                before = RECORDED[RECORDED.index(name) - 1]
                streams = passes and passes[-1][-1] == before and not needs_context(name, self.config)
                passes[-1].append(name) if streams else passes.append([name])
            for one in passes:
                reports += self._pass_on_ray(cluster, one, units)
        return reports

    def _pass_on_ray(self, cluster: RayCluster, names: Sequence[str], units: list[Unit]) -> list[StageReport]:
        start = time.perf_counter()
        jobs = [self._job(name) for name in names]
        todo = [unit for unit in units if not _all_finished(jobs, unit)]
        before = [_tally(job, todo, retried=False) for job in jobs]
        reports = [StageReport(name) for name in names]
        try:
            with closing(cluster.run(jobs, todo, attempt_unit)) as done:
                rows = show_progress(done, len(todo), ", ".join(names), "units") if self.progress else done
                for parts, error in rows:
                    for report, part in zip(reports, parts, strict=False):
                        report.merge(part)
                    if error is not None:
                        raise error
        finally:
            for job, report, earlier in zip(jobs, reports, before, strict=True):
                # Counted in the records, because what a killed worker did has not been reported.
                report.rejected = _tally(job, todo, retried=True)
                report.rejected.subtract(earlier)
                report.images = report.rejected.total()
                del report.rejected[""]
                report.rejected = +report.rejected
                report.seconds = time.perf_counter() - start
                self._log(report)
        for job, report in zip(jobs, reports, strict=True):
            _check_left(job, units, report)
        return reports

    def _here(self, job: Job, units: list[Unit], report: StageReport) -> None:
        stage = job.make_stage()
        try:
            outcomes = process(job, stage, units)
            total = sum(len(unit.items) for unit in units)
            for outcome in show_progress(outcomes, total, job.name, "images") if self.progress else outcomes:
                report.add(outcome)
        finally:
            report.counts = Counter(stage.counts)
            stage.close()

    def _in_workers(self, job: Job, units: list[Unit], report: StageReport) -> None:
        parts = self.workers.map(partial(process_unit, job), units, chunk=1)
        for part in show_progress(parts, len(units), job.name, "units") if self.progress else parts:
            report.merge(part)

    def _log(self, report: StageReport) -> None:
        record = {"stage": report.name, "images": report.images, "seconds": round(report.seconds, 3)}
        record |= {"counts": dict(report.counts), "rejected": dict(report.rejected)}
        with open(self.out / "runs.jsonl", "a", encoding="ascii", opener=_append) as file:
            file.write(json.dumps(record) + "\n")

    def pack(self, source: CuratedSource) -> PackReport | None:
        """Write the data set in the layouts that were asked for; None: not packed."""
        options = self.config.pack
        if not source.scenes:
            raise UserError(f"pack: {self.out} has no curated scenes; run the stage curate first (--stages)")
        if options.layout in ("published", "both"):
            self._write_published(source)
        if options.layout == "published":
            if (self.out / "shards").exists():
                warn(f"warning: {self.out / 'shards'} is that of an earlier run: layout published writes no shards")
            return None
        return pack(
            source,
            self.out / "shards",
            shard_size=options.shard_size,
            val=options.val,
            test=options.test,
            workers=self.workers,
            progress=self.progress,
        )

    def _write_published(self, source: CuratedSource) -> None:
        """Write the published layout into a new directory, and move it into place."""
        final = (self.out / "published").resolve()  # it may be a link to another disk
        partial = final.with_name(f".{final.name}.partial")
        options = PackOptions(val=self.config.pack.val, test=self.config.pack.test)
        for path in (partial, final):
            if (status := status_of(path)) is not None:
                if not stat.S_ISDIR(status.st_mode):
                    raise UserError(f"{path}: got a {kind_of(status.st_mode)}, expected a directory of an earlier run")
                if foreign := sorted(one.name for one in path.iterdir() if not _PUBLISHED.fullmatch(one.name)):
                    raise UserError(f"{path}: contains {foreign[0]}, which generate does not write; move it away")
                shutil.rmtree(path)
        scenes = published_scenes(source, options.split_of)
        total = len(source.scenes)
        write_published_layout(
            show_progress(scenes, total, "writing the published layout", "scenes") if self.progress else scenes, partial
        )
        partial.rename(final)


def _check_left(job: Job, units: Sequence[Unit], report: StageReport) -> None:
    if any(has_results(job.records / unit.file_name) for unit in units):
        return
    found = (outcome for unit in units for outcome in rejections(job.records / unit.file_name) if outcome.reason)
    example = next((f", for example {one.key}: {one.detail or one.reason}" for one in found), "")
    raise UserError(
        f"{job.name}: all images were rejected{_reasons(report.rejected)}{example}; see "
        f"{job.directory / 'rejected.jsonl'}"
    )


def _all_finished(jobs: Sequence[Job], unit: Unit) -> bool:
    if not jobs[0].is_finished(unit):  # raises UserError if the stage before has not finished the unit
        return False
    try:
        return all(job.is_finished(unit) for job in jobs[1:])
    except UserError:  # the same for a stage before that is one of `jobs`
        return False


def _tally(job: Job, units: Iterable[Unit], *, retried: bool) -> Counter[str]:
    """The number of outcomes by reason of rejection, which is empty for the others."""
    counts: Counter[str] = Counter()
    for unit in units:
        with suppress(UserError):  # the stage before has not finished the unit
            counts.update(outcome.reason for outcome in job.outcomes(unit, retried=retried))
    return counts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _append(path: str, flags: int) -> int:
    return open_regular(path, flags, follow=False)


def _reasons(rejected: Counter[str]) -> str:
    return ": " + ", ".join(f"{n} {reason}" for reason, n in rejected.most_common()) if rejected else ""
