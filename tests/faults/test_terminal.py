"""Foreign text with control characters, markup and lone surrogates: on a terminal, in logs, in files and on pages."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import LONG, generator, trials
from packs import read_rows, write_rows
from PIL import Image
from training_runs import SMALL

from scenarioclip_fast.cli import main as cli
from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import BadSample, Scene, Vocabulary, generate_scenes, pack
from scenarioclip_fast.data.check import Rejection
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.tables import text_table
from scenarioclip_fast.progress import progress
from scenarioclip_fast.report.page import Report
from scenarioclip_fast.terminal import echo, get_logger, printable
from scenarioclip_fast.train.metrics import MetricsLog

# Clears the screen, moves the cursor, rings, reorders text, forges a line; \udcff is a byte of a file name that is not
# UTF-8.
CONTROLS = "\x1b[2J\x1b]0;title\a\x9b31m\r\b\x7f\u202eabc\u2066\u2028\nerror: forged"
NAME = f"n\u00e9 {CONTROLS}\udcff <b>&\"'"
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ROOT = Path(cli.__file__).parents[1]


def assert_clean(text: str) -> None:
    assert (found := RAW.search(text)) is None, repr(text[max(0, found.start() - 200) : found.end() + 50])
    assert not any(line.startswith("error: forged") for line in text.splitlines())


def run(arguments: list[Any], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run a command; return its output after checking it."""
    capsys.readouterr()
    found = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert found == code, err[-2000:]
    assert_clean(out + err)
    return out + err


def assert_clean_files(folder: Path) -> int:
    """Check every text file below a folder; return how many there are."""
    files = [path for path in folder.rglob("*") if path.suffix in (".html", ".json", ".jsonl", ".yaml", ".txt")]
    for path in files:
        text = path.read_bytes().decode()  # strictly: UTF-8 without lone surrogates
        if path.suffix == ".html":
            assert RAW.search(text) is None
            assert "<script" not in text and "<img src=x" not in text and "<b>&" not in text
        elif path.suffix == ".jsonl" or path.name in ("zeroshot.json", "result.json"):
            assert RAW.search(text) is None
            for line in text.splitlines() if path.suffix == ".jsonl" else ():
                json.loads(line)
    return len(files)


@pytest.fixture
def hostile_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack as nobody's `pack` would write it: with keys and texts that are not normalised, in a folder like them."""

    def rename(scene: Scene, i: int) -> Scene:
        scene.key = f"{i}-{CONTROLS}-\udcff"[:80]
        scene.action = f"{scene.action} {CONTROLS} {MARKUP}"
        for item in scene.objects:
            item.name += f" {CONTROLS} {MARKUP} $x_"
        return scene

    # Names of tar members allow neither.
    folder = tmp_path / NAME
    with monkeypatch.context() as patch:
        patch.setattr("scenarioclip_fast.data.check.normalise", lambda text: text)
        patch.setattr("scenarioclip_fast.data.vocabulary.normalise", lambda text: text, raising=False)
        scenes = [rename(scene, i) for i, scene in enumerate(generate_scenes(16, seed=0, val=0.0, test=0.25))]
        keys = {scene.key.split("-")[0]: scene.key for scene in scenes}
        for scene in scenes:
            scene.key = scene.key.split("-")[0]
        pack(scenes, folder, progress=False)
    shards = read_rows(folder)
    for rows in shards.values():
        for row in rows:
            row[0] = keys.get(row[0], row[0]).replace("\udcff", "")
    write_rows(folder, shards)
    return folder


def test_every_command_on_a_hostile_pack(
    hostile_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / f"runs {NAME}"
    name = tmp_path / f"run {NAME}".replace("\udcff", "")  # safetensors opens no path that is not UTF-8
    assert "2J" in Vocabulary.load(hostile_pack / "vocabulary.bin").actions[0]
    run(["inspect", hostile_pack, "--out", runs / "inspected"], capsys)
    damage(hostile_pack)
    settings = [*SMALL, "data.batch_size=4", "train.steps=2", "train.log_every=1", "data.max_bad_fraction=1"]
    shown = run(["train", *settings, f"data.shards={hostile_pack}", f"run.dir={name}"], capsys)
    assert "\\x1b[2J" in shown, "the run directory is part of the summary"
    assert "not_an_image" in (name / "bad_samples.jsonl").read_text()
    if LONG:
        run(["train", *settings, f"data.shards={hostile_pack}", f"run.dir={name}", "--resume", "train.steps=3"], capsys)
    options = ["--batch-size", "2", "--report", runs / "page", "--json"]
    for kind in ("zeroshot", "retrieval", "negatives")[: trials(1, 3)]:
        run(["eval", kind, name, hostile_pack, "--split", "test", *options, name / f"{kind}.json"], capsys)
    run(["report", name, "--out", runs / "reported"], capsys)
    run(["export", name / "model", "--to", "safetensors", "--out", runs / "exported"], capsys)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(images / "a.png")
    shutil.move(images / "a.png", images / f"{CONTROLS}.png")
    (images / f"bad {CONTROLS}.png").write_bytes(b"nothing")
    assert "skipped (1)" in run(["embed", name, images, "--out", runs / "embedded.npz"], capsys)
    assert assert_clean_files(runs) >= 2
    assert_clean_files(name)


def damage(folder: Path) -> None:
    """Overwrite one image of the test and the train split each."""
    for name, rows in read_rows(folder).items():
        with (folder / name).open("r+b") as file:
            file.seek(rows[0][1])
            file.write(b"x" * rows[0][2])


def test_rejections_of_a_hostile_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / NAME
    write_published_layout(list(generate_scenes(8, seed=1)), folder)
    (folder / "classes.json").unlink()
    (file,) = sorted(folder.glob("metadata_train*.json"))
    record = json.loads(file.read_text())
    for entry in record["data"][:2]:
        entry["id"] = f"{entry['id']} {NAME}"
    record["data"][2]["image_path"] = f"{NAME}.jpg"
    record["data"][3]["objects"][0] = [f"{NAME} {MARKUP}", [0, 0, -5, "x"]]
    record["data"][4]["relations"].append([f"{NAME}.png", [NAME, MARKUP, "nothing"]])
    file.write_text(json.dumps(record))
    os.replace(file, file.with_name(f"metadata_train {CONTROLS}.json"))
    shown = run(["pack", folder, "--out", tmp_path / f"out {NAME}", "--workers", "1"], capsys)
    assert "rejected" in shown and "\\x1b[2J" in shown
    assert assert_clean_files(tmp_path / f"out {NAME}") >= 3
    run(["pack", tmp_path / f"missing {NAME}", "--out", tmp_path / "b"], capsys, 2)
    run(["inspect", folder, "--out", tmp_path / "c"], capsys, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"{NAME}=1"],
        ["train", f"optim.lr={NAME}"],
        ["train", f"optim.name={NAME}"],
        ["train", "-c", NAME],
        ["train", f"--{NAME}"],
        ["train", "--resume", NAME],
        [NAME],
        ["eval", "zeroshot", NAME, NAME],
        ["eval", NAME],
        ["embed", NAME, NAME, "--out", NAME],
        ["report", NAME],
        ["bench", NAME],
        ["bench", "--report", NAME],
        ["export", NAME, "--to", "hf", "--out", NAME],
        ["ablate", NAME, NAME],
        ["ablate", "--variants", NAME, "-c", "tiny"],
        ["inspect", f"https://127.0.0.1:9/{NAME}"],
    ],
)
def test_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit_:  # of argparse
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert_clean(out + err)


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIOENCODING", "PYTHONUTF8"))}
    return kept | changes


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX"},
    ][: trials(1, 3)],
)
def test_an_ascii_terminal(settings: dict[str, str], tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xc3\xa9 \xff\x1b"
    write_published_layout(list(generate_scenes(8, seed=1)), Path(os.fsdecode(folder)))
    command = [sys.executable, "-m", "scenarioclip_fast", "scenes", "-n", "2", "--out", folder + b"/more"]
    done = subprocess.run(command, capture_output=True, env=environment(**settings), timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\\x1b/more/metadata" in done.stdout and b"\x1b" not in done.stdout + done.stderr
    if "PYTHONIOENCODING" in settings:
        assert done.stdout.isascii() and b"caf\\xe9" in done.stdout


def test_the_traceback_of_an_internal_error_is_escaped() -> None:
    code = (
        "import sys, warnings, scenarioclip_fast.cli.main as cli\n"
        "def fail(*_):\n"
        f"    warnings.warn({CONTROLS!r})\n"
        f"    raise RuntimeError({CONTROLS!r})\n"
        "cli._run = fail\n"
        "sys.exit(cli.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "RuntimeError: \\x1b[2J" in done.stderr and "UserWarning: \\x1b[2J" in done.stderr
    assert RAW.search(done.stderr) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_keep_their_control_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(cli, "_run", lambda *_: len(list(progress(range(3), desc=CONTROLS))) - 3)
    assert main([]) == 0
    assert "3/3" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert RAW.search(terminal.getvalue().replace("\r", "")) is None
    terminal.truncate(0)
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False)
    log.log(CONTROLS)
    log.close()
    assert "\\x1b[2J" in terminal.getvalue()
    assert RAW.search(re.sub("\r|\x1b\\[A|\x00", "", terminal.getvalue())) is None


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)


def test_messages_of_the_api_are_single_lines(logged: io.StringIO) -> None:
    get_logger("scenarioclip_fast.tests").warning("%s: %d files", CONTROLS, 3)
    texts = [logged.getvalue().removesuffix("\n"), str(UserError(CONTROLS)), str(TrainingFailed(CONTROLS))]
    texts += [str(BadSample(CONTROLS, "reason", CONTROLS, CONTROLS)), str(Rejection(CONTROLS, "reason", CONTROLS))]
    for text in texts:
        assert "\n" not in text and "\\x1b[2J" in text
        assert_clean(text)
    table = text_table(["name", "value"], [[CONTROLS, "1"], ["a", "2"]], names=1)
    assert len(table.splitlines()) == 4 and len({len(line) for line in table.splitlines()}) == 1
    assert (
        str(UserError("x" * 10**6)) == str(UserError(str(UserError("x" * 10**6))))
        and len(str(UserError("x" * 10**6))) < 4000
    )


def test_pages_escape_attributes_and_text(tmp_path: Path) -> None:
    page = Report(NAME, MARKUP)
    page.add_facts(f'" onload="alert(1) {NAME}', {MARKUP: NAME})
    text = page.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and 'onload="' not in text and RAW.search(text) is None
    assert "&lt;/script&gt;&lt;script&gt;" in text


def test_printable_is_idempotent_and_keeps_ordinary_text() -> None:
    ordinary = "caf\u00e9 \u4e2d\u6587 \u0627\u0644\u0639 \U0001f469\u200d\U0001f4bb e\u0301 \u20ac\u00a0x\\n"
    assert printable(ordinary) == ordinary
    assert printable("a\nb", lines=True) == "a\nb" and printable("a\nb") == "a\\nb"
    rng = generator("printable")
    for _ in range(trials(200, 20_000)):
        text = "".join(
            chr(rng.choice((rng.randrange(0x300), rng.randrange(0x2000, 0x2100), rng.randrange(0x110000))))
            for _ in range(20)
        )
        shown = printable(text)
        assert printable(shown) == shown and RAW.search(shown) is None and "\n" not in shown
        for encoding in ("ascii", "latin-1", "utf-8"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            echo(text, file=stream)


def test_all_output_of_the_package_is_escaped() -> None:
    """Ruff forbids `print`; these are the other ways past `echo` and `get_logger`."""
    for path in ROOT.rglob("*.py"):
        if path.name != "terminal.py":
            found = re.findall(r"logging\.getLogger|std(?:out|err)\.write|traceback\.print|\bprint\(", path.read_text())
            assert not found, path
