"""The command line: one-line user errors, help, completion and start-up."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scenarioclip_fast.cli import doctor
from scenarioclip_fast.cli.main import COMMANDS, build_parser, main
from scenarioclip_fast.dispatch import BackendError
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.config_reference import sections

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m", "scenarioclip_fast"]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: sub for choices in found for name, sub in (choices or {}).items()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, OSError(code, os.strerror(code), "out.json"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: out.json: {os.strerror(code)}\n"
    fail_with(monkeypatch, OSError(code, os.strerror(code)))  # raised by a write, without a file name
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: while writing: {os.strerror(code)}\n"


def test_other_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        main(["doctor"])


def test_an_unavailable_backend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, BackendError("render_views: backend 'cuda' cannot run on cpu tensors"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: render_views: backend 'cuda' cannot run on cpu tensors\n"


def test_a_missing_dependency_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert main(["doctor"]) == 2
    assert re.fullmatch(r"error: torch is not installed: run `pip install 'torch>=.*'`\n", capsys.readouterr().err)
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'nonsense'", name="nonsense"))
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "argument COMMAND: got 'trian': did you mean train?"),
        ("zzz", "argument COMMAND: got 'zzz', expected one of demo, scenes, generate, pack, "),
        ("doctor --fast", "unrecognized arguments: --fast (see `scenarioclip-fast doctor --help`)"),
        ("doctor now", "unrecognized arguments: now"),
        ("eval zerosht RUN SHARDS", "argument KIND: got 'zerosht': did you mean zeroshot?"),
        ("eval zeroshot RUN SHARDS --spilt test", "unrecognized arguments: --spilt test: did you mean --split?"),
        ("eval zeroshot RUN SHARDS --weights teachr", "argument --weights: got 'teachr': did you mean teacher?"),
        ("pack DIR", "the following arguments are required: --out (see `scenarioclip-fast pack --help`)"),
        ("scenes --out DIR -n many", "argument -n: invalid int value: 'many'"),
        ("train --resmue", "unrecognized arguments: --resmue: did you mean --resume?"),
        ("train --optim.lr=1e-4", "unrecognized arguments: --optim.lr=1e-4: did you mean optim.lr=1e-4, without"),
        ("train --optim.lr 1e-4", "did you mean optim.lr=VALUE, without dashes?"),
        ("train -c", "argument -c/--config: expected one argument"),
        ("train -c=", "got an empty value in -c=: is a shell variable unset?"),
        ("train --resume=", "got an empty value in --resume=: is a shell variable unset?"),
        ("train -c tiny -c fast", "got -c twice: name one config"),
        ("ablate -c tiny --config fast", "got --config twice: name one config"),
        (
            "inspect x --out s3://b/x",
            "argument --out: got the URL s3://b/x, expected a path: only `pack` writes to URLs",
        ),
        ("eval probe RUN x --json s3://b/a.json", "argument --json: got the URL s3://b/a.json, expected a path"),
        ("embed RUN x --out https://host/a.npz", "argument --out: got the URL https://host/a.npz, expected a path"),
        ("--print-completion csh", "argument --print-completion: got 'csh': did you mean tcsh?"),
    ],
)
def test_invalid_usage_is_one_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "data.shards is not set: expected the directory that"),
        ("train tiny.yaml", "got 'tiny.yaml', expected key=value: did you mean -c tiny.yaml?"),
        ("train -c missing.yaml", "cannot read the config missing.yaml: No such file or directory"),
        ("train -c tinny", "config 'tinny': did you mean tiny? expected a YAML file, or one of fast, reference, tiny"),
        ("train -c .", "cannot read the config .: Is a directory"),
        ("train lr=1", "unknown config key lr: did you mean optim.lr?"),
        ("train --print-config optim.lr=2015-13-45", "optim.lr: got '2015-13-45', which is not a YAML value"),
        ("train --print-config optim.betas=" + 3000 * "[", "which is not a YAML value"),
        ("bench --report x --out {date}", "--out: got {date}, but {date} and {device} are replaced only when"),
        ("report " + 300 * "x", "File name too long"),
        ("pack " + 300 * "x" + " --out packed", "File name too long"),
        ("export missing --to hf --out " + 300 * "x", "File name too long"),
        ("train run.dir=s3://b/run", "run.dir: got 's3://b/run', expected a path, not a URL"),
        ("train --resume bset", "--resume: got 'bset', which does not exist: did you mean best?"),
        ("train --resume optim.lr=fast", "optim.lr: got 'fast', expected a finite number"),
        ("train --print-config optim.name=adamwf", "optim.name: got 'adamwf', did you mean adamw?"),
        ("pack missing --out packed", "missing: no such file or directory"),
        ("inspect missing", "missing: no such directory"),
        ("report missing", "missing does not exist"),
        ("scenes --out /dev/null", "/dev/null"),
    ],
)
def test_invalid_input_is_one_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_an_empty_argument_is_invalid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["embed", "", "photos", "--out", "a.npz"])
    assert "error: got an empty value: is a shell variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(stream: str) -> None:
    closed = {"stdout": ">&-", "stderr": "2>&-"}[stream]
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(MODULE)} train --print-config {closed}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert bool(done.stdout) == (stream == "stderr")


def test_home_directories_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["train", "--print-config", "run.dir=~/run", "data.shards=~/shards", "model.init=~/clip"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["run"]["dir"] == f"{tmp_path}/run" and config["data"]["shards"] == f"{tmp_path}/shards"
    assert config["model"]["init"] == f"{tmp_path}/clip"
    assert main(["scenes", "--out=~/scenes", "-n", "2"]) == 0
    assert (tmp_path / "scenes").is_dir()


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_stops_a_running_command(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    command = [*MODULE, "scenes", "--out", str(out), "-n", "100000"]

    def heed_interrupts() -> None:  # which background jobs of a shell ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options, preexec_fn=heed_interrupts) as process:
        while process.poll() is None and not any(out.rglob("*.jpg")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate(timeout=60)
    # CPython kills itself with SIGINT if it arrived during an import; a shell reports 130 in both cases.
    assert process.returncode in (130, -signal.SIGINT)
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error


def test_a_closed_pipe_is_not_an_error() -> None:
    command = f"{' '.join(MODULE)} train --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_has_help_and_formats_defaults_alike() -> None:
    parsers = subcommands(build_parser())
    assert tuple(parsers) == COMMANDS
    for name, parser in {**parsers, **subcommands(parsers["eval"])}.items():
        assert parser.description, name
        text = " ".join(parser.format_help().split())
        assert "%%" not in text
        assert "(default " not in text.replace("(default)", ""), f"{name}: write (default: VALUE)"


def test_python_m_shows_its_name() -> None:
    done = subprocess.run([*MODULE, "train", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m scenarioclip_fast train ")


def test_help_of_train_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section in sections():
        for key in section.keys:
            assert re.search(rf"^  {re.escape(key.name)} .*{re.escape(key.default)}$", text, re.MULTILINE), key.name


def test_printed_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["optim.lr=3e-4", "data.shards=x", "train.profile=[2, 3]"]
    assert main(["train", "-c", str(ROOT / "configs" / "tiny.yaml"), "--print-config", *overrides]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = TrainConfig.load(tmp_path / "printed.yaml")
    assert config == TrainConfig.load(ROOT / "configs" / "tiny.yaml", overrides)
    assert config.optim.lr == 3e-4


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "--print-config"], ["pack", "--help"]]
)
def test_help_and_config_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom scenarioclip_fast.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
        "print(*{'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], ["train"]),
        (["train", "optim.we"], ["optim.weight_decay="]),
        (["train", "-c", "FILE", "data.shards=x", "train.accum"], ["train.accumulate="]),
        (["train", "--res"], ["--resume"]),
        (["train", "-c", "conf"], ["configs"]),
        (["train", "-c", "ref"], ["reference"]),
        (["train", "--resume", "b"], ["best"]),
        (["train", "--resume", "conf"], ["configs"]),
        (["ablate", "conf"], ["configs"]),
        (["ablate", "optim.we"], ["optim.weight_decay="]),
        (["bench", "contr"], ["contrastive"]),
        (["embed", "RUN", "phot"], ["photo.jpg"]),
        (["eval", "zeroshot", "--split", "v"], ["val"]),
        (["eval", "retr"], ["retrieval"]),
        (["eval", "zeroshot", "--weights", "t"], ["teacher"]),
        (["pack", "--out", "conf"], ["configs"]),
    ],
)
def test_bash_completes_commands_options_paths_and_keys(words: list[str], expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    with script.open("w") as file:
        subprocess.run([*MODULE, "--print-completion", "bash"], stdout=file, check=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "photo.jpg").touch()
    line = ["scenarioclip-fast", *words]
    press_tab = (
        f"source {script}; COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; _scenarioclip_fast; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", press_tab], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_contain_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
