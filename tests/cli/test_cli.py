"""The program as a user meets it: help, table, exit codes, Ctrl-C, kill -9, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.cli.console import ProgressLine
from holdfast.experiments import Run
from holdfast.training.checkpoint import Checkpoint

PROGRAM = [sys.executable, "-c", "from holdfast.cli import main; main()"]


def holdfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last_line(result: Result) -> Path:
    return Path(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["list", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from holdfast.cli import app
from holdfast.cli.console import ProgressLine
try:
    app({arguments!r})
except SystemExit as done:
    assert done.code == 0
heavy = {{"torch", "pandas", "numpy", "datasets", "lightning_fabric", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_train_prints_the_table_and_ends_with_the_folder(tmp_path: Path) -> None:
    result = holdfast("train", "digits", *TINY, "--runs", tmp_path)
    assert result.exit_code == 0, result.output
    run = Run(last_line(result))
    assert run.finished
    for words in ("Standard", "PGD-5", "Certified (IBP, deterministic, real)", "/ 60", "95 % interval"):
        assert words in result.stdout
    assert "epoch 2/2  loss" in result.stderr
    assert "certified" in result.stderr
    standard = run.result["standard"]
    assert f"{100 * standard:.1f} %" in result.stdout

    again = holdfast("train", "digits", *TINY, "--runs", tmp_path)
    assert again.exit_code == 0
    assert "finished already" in again.stderr
    assert again.stdout == result.stdout

    shown = holdfast("show", run.path.name, "--runs", tmp_path)
    assert shown.stdout == result.stdout

    evaluated = holdfast(
        "evaluate", run.path, "--threat", "linf:8/255", "--attacks", "fgsm,pgd", "--certifiers", ""
    )
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads((last_line(evaluated) / "result.json").read_text())["threat"] == "linf:8/255"
    assert "FGSM" in evaluated.stdout
    assert "Certified" not in evaluated.stdout

    listed = holdfast("runs", "--runs", tmp_path)
    assert run.path.name[:8] in listed.stdout
    assert holdfast("runs", "--of", "evaluations", "--runs", tmp_path).stdout.count("digits") == 2
    latest = holdfast("show", run.path.name, "--runs", tmp_path)
    assert latest.stdout.splitlines()[:-1] == evaluated.stdout.splitlines()[:-1]
    assert "has 2 evaluations" in latest.stderr
    below = holdfast("show", last_line(evaluated).name, "--runs", tmp_path)
    assert below.stdout == evaluated.stdout


def test_damaged_runs_are_named_and_do_not_hide_the_others(tmp_path: Path) -> None:
    assert holdfast("train", "digits", *TINY, "--runs", tmp_path).exit_code == 0
    run = next(tmp_path.iterdir())
    for name, text in (("a", ""), ("b", "data: 3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(text)
    listed = holdfast("runs", "--runs", tmp_path)
    assert listed.exit_code == 0
    assert run.name[:6] in listed.stdout
    assert listed.stdout.count(" damaged ") == 2
    for text in ("{", "null"):
        next(run.glob("evaluations/*/result.json")).write_text(text)
        for command in (["train", "digits", *TINY], ["show", run.name]):
            shown = holdfast(*command, "--runs", tmp_path)
            assert shown.exit_code == 2
            assert "result.json cannot be read" in shown.stderr


def test_list_and_show_tell_what_there_is() -> None:
    everything = holdfast("list")
    for name in ("digits", "mnist-ibp", "cnn-4c3f", "trades", "pgd", "bounds", "one-cycle"):
        assert name in everything.stdout
    assert "Zhang" in holdfast("list", "objectives").stdout
    shown = holdfast("show", "trades").stdout
    assert "beta" in shown
    assert "Weight of the divergence" in shown
    assert "threat: linf:0.1" in holdfast("show", "mnist-ibp").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "'digit' is not a recipe; did you mean 'digits'"),
        (["train", "digits", "objective.kapa=1"], "did you mean 'kappa'"),
        (["train", "digits", "objective=ibpp"], "did you mean 'ibp'"),
        (["train", "digits", "threat=linf:-0.1"], "eps must be ≥ 0"),
        (["train", "digits", "threat=linf:8"], "write linf:8/255"),
        (["train", "digits", "evaluation.threat=l2:36"], "write l2:36/255"),
        (["train", "digits", "threat=linf:much"], "fraction such as 8/255"),
        (["train", "missing.yaml"], "no recipe file missing.yaml"),
        (["train", "mnist-ibp", "data.root=/nowhere/at/all"], "/nowhere/at/all is not there"),
        (["train", "digits", "--aagain"], "No such option"),
        (["evaluate", "nothing"], "'nothing' is not a run folder"),
        (["list", "atacks"], "did you mean 'attacks'"),
        (["show", "nothing"], "'nothing' is not a run folder"),
        (["train", "digits", "data.train_size=99999"], "1293 training images remain"),
        (["train", "digits", "data.validation=0.0001"], "none may be empty"),
        (["train", "digits", "objective.name=[1]"], "is not one of the objectives"),
        (["train", "digits", "threat={norm: [x], eps: 1}"], "is not a norm"),
        (["train", "digits", "threat.low=null"], "expected a number"),
    ],
)
def test_bad_input_is_answered_with_2_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        result = holdfast(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_answered_with_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = holdfast("train", "digits", *TINY, "--runs", tmp_path / "file")
    assert result.exit_code == 2
    assert "file" in result.stderr
    assert "Traceback" not in result.stderr


def start(runs: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, "train", "digits", *TINY, "training.epochs=400", *more, "--runs", str(runs)]
    # Whoever runs the tests in the background has Ctrl-C switched off for all that they start.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=heeding,
    )


def wait_for_checkpoint(runs: Path, epochs: int = 3) -> Path:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for history in runs.glob("*/history.jsonl"):
            if history.read_text().count('"epoch"') >= epochs:
                return history.parent
        time.sleep(0.01)
    raise AssertionError("no checkpoint within three minutes")


def test_ctrl_c_keeps_the_state_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path)
    folder = wait_for_checkpoint(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"the state is kept in {folder}" in errors
    assert "Traceback" not in errors
    assert (folder / "checkpoint" / "last.pt").is_file()
    assert not list(folder.rglob("result.json"))


KILLED = """
import os, random, signal, sys, threading
from holdfast import train
from holdfast.training import Reporter

class Power(Reporter):
    def __init__(self, steps, seconds):
        self.steps, self.seconds = steps, seconds
    def step(self, loss):
        self.steps -= 1
        if self.steps == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

draw = random.Random(int(sys.argv[1]))
train("digits", *sys.argv[3:], runs=sys.argv[2], reporter=Power(draw.randint(6, 12), draw.uniform(0, 0.02)))
"""


@pytest.mark.slow
def test_kill_9_ten_times_at_any_moment_and_the_result_is_the_same(tmp_path: Path) -> None:
    training = "training={epochs: 100, batch_size: 40, checkpoint_every: 2, averaging: {}}"
    overrides = [o for o in TINY if not o.startswith("training")] + [training]
    straight = holdfast("train", "digits", *overrides, "--runs", tmp_path / "straight")
    assert straight.exit_code == 0, straight.output
    runs = tmp_path / "killed"
    reached = [0]
    for number in range(10):
        command = [sys.executable, "-c", KILLED, str(number), str(runs), *overrides]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        (path,) = runs.glob("*/checkpoint/last.pt")
        reached.append(Checkpoint.load(path, torch.device("cpu")).step)
    assert reached == sorted(reached)
    assert any(step % 3 for step in reached), "no epoch was ever cut"
    resumed = holdfast("train", "digits", *overrides, "--runs", runs)
    assert resumed.exit_code == 0, resumed.output
    assert "goes on after epoch" in resumed.stderr
    one, other = Run(last_line(straight)), Run(last_line(resumed))
    weights, same = (load_file(run.path / "model.safetensors") for run in (one, other))
    assert all(torch.equal(same[key], value) for key, value in weights.items())
    assert one.examples.equals(other.examples)
    assert list(one.history["loss"]) == list(other.history["loss"])
    assert not list(other.path.rglob(".*"))


def test_a_full_disk_stops_the_run_and_says_where_the_state_is(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk: the small ones fit, the checkpoint does not.
    overrides = " ".join(f"'{override}'" for override in TINY)
    script = f"ulimit -f 8; exec {sys.executable} -c 'from holdfast.cli import main; main()'"
    done = subprocess.run(
        ["bash", "-c", f"{script} train digits {overrides} --runs {tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "the state is kept in" in done.stderr
    assert "Traceback" not in done.stderr
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == ["environment.json", "failed.txt", "recipe.yaml"]


def test_the_result_goes_to_standard_output_also_while_a_terminal_shows_progress(tmp_path: Path) -> None:
    # A live progress bar once took standard output over, and with it the table and the path.
    terminal, errors = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "train", "digits", *TINY, "--runs", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )
    os.close(errors)
    threading.Thread(target=_drain, args=(terminal,), daemon=True).start()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Standard" in output
    assert Run(Path(output.splitlines()[-1])).finished


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):  # the other side closes
        while os.read(terminal, 4096):
            pass


HOMELESS = """
import os, pwd
def nobody(number):
    raise KeyError(number)
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
from holdfast.cli import main
main()
"""


@pytest.mark.parametrize(
    ("program", "surroundings"),
    [
        (PROGRAM, {"PYTHONIOENCODING": "ascii", "HOME": "/proc/1"}),
        ([sys.executable, "-c", HOMELESS], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_neither_a_plain_terminal_nor_a_missing_home_stops_a_run(
    program: list[str], surroundings: dict[str, str], tmp_path: Path
) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [*program, "train", "digits", *TINY],
        env={**kept, **surroundings, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / done.stdout.splitlines()[-1]).finished
    assert "Certified (IBP, deterministic, real)" in done.stdout
    assert not [word for word in ("Traceback", "atplotlib", "rror:") if word in done.stderr], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_evaluates_a_factory_and_a_file_of_weights(tmp_path: Path) -> None:
    trained = holdfast("train", "digits", *TINY, "--runs", tmp_path)
    weights = last_line(trained) / "model.safetensors"
    settings = ["--data", "digits", "--threat", "linf:0.05", "--attacks", "fgsm,apgd", "--runs", tmp_path]
    settings += ["evaluation.examples=40", "evaluation.curve_points=0"]
    done = holdfast("evaluate", weights, "--architecture", "mlp", "model.hidden=[16]", *settings)
    assert done.exit_code == 0, done.output
    assert "mlp on digits" in done.stdout
    result = Run(last_line(done)).result
    again = Run(last_line(trained))
    same = holdfast("evaluate", again.path, *settings[2:])
    assert same.exit_code == 0, same.output
    other = Run(last_line(same)).result
    assert result["standard"] == other["standard"]
    assert result["attacked"] == other["attacked"]
    done = holdfast("evaluate", "helpers:digits_model", *settings)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (last_line(done) / "adversarial").iterdir()} == {"fgsm.npz", "apgd.npz"}
    with np.load(last_line(done) / "adversarial" / "apgd.npz") as kept:
        assert kept["x_adv"].shape[1:] == (1, 8, 8)
        assert all(text.startswith("apgd restart") for text in kept["origin"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["helpers:digits_model"], "say --data and --threat"),
        (["helpers:digits_modle", "--data", "digits", "--threat", "linf:0.1"], "cannot be imported"),
        (
            ["helpers:digits_model", "--data", "digits", "--threat", "linf:0.1", "--attacks", "autoatack"],
            "autoattack",
        ),
        (["nothing.pt"], "not a run folder"),
    ],
)
def test_models_that_cannot_be_evaluated_are_answered_with_2(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = holdfast("evaluate", *arguments, "--runs", tmp_path / "runs")
    assert done.exit_code == 2, done.output
    assert words in done.stderr.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "objective",
    [
        *(
            "adversarial",
            "trades",
            "clean-plus-adversarial",
            "rst",
            "llr",
            "tulip",
            "input-gradient",
            "cure",
            "mart",
        ),
        *("{name: awp, objective: trades}", "fast-at", "{name: fast-at, grad_align: 0.2}", "free-at", "mma"),
    ],
)
def test_every_defence_trains_a_network_with_batch_norm_and_dropout_and_goes_on(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "digits", "--runs", str(tmp_path), f"objective={objective}", *TINY]
    command += ["model={name: wide-resnet, depth: 10, width: 1, dropout: 0.3}", "evaluation.certifiers=[]"]
    command += ["data.train_size=48", "training.batch_size=24", "evaluation.lipschitz_examples=2"]
    command += ["evaluation.train_examples=2", "evaluation.examples=4", "evaluation.curve_points=0"]

    def interrupt(self: ProgressLine, record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "epoch", interrupt)
        cut = CliRunner().invoke(app, command)
    assert cut.exit_code == 1
    assert "goes on from there" in cut.output
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "goes on after epoch 1 of 2" in done.output
    history = Run(Path(done.stdout.splitlines()[-1])).history
    assert history["epoch"].tolist() == [1, 2]
    assert np.isfinite(history["loss"]).all()
