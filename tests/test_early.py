"""Ctrl-C while a program imports: one line and 130; what asks a training to stop, the line of a stop and 0."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = "import gpt2.early, os, signal, time\nos.kill(os.getpid(), signal.{0})\ntime.sleep(9)"


@pytest.mark.parametrize(
    "name, number, code, words",
    [
        ("sample.py", "SIGINT", 130, "sample.py: interrupted"),
        ("sample.py", "SIGTERM", -15, ""),
        ("train_gpt2.py", "SIGINT", 130, "train_gpt2.py: interrupted"),
        ("train_gpt2.py", "SIGTERM", 0, "before its first step was done (SIGTERM); the same command continues"),
        ("train_gpt2.py", "SIGUSR1", 0, "before its first step was done (SIGUSR1); the same command continues"),
    ],
)
def test_a_signal_during_the_imports(name, number, code, words, tmp_path):
    (tmp_path / name).write_text(PROGRAM.format(number))
    done = subprocess.run([sys.executable, name], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == code and done.stderr.decode().strip().endswith(words)
    assert len(done.stderr.splitlines()) == 2 * bool(words)


@pytest.mark.parametrize("when", ["during the imports", "while it waits"])
def test_a_rank_that_torchrun_ends_does_not_repeat_what_another_has_said(when, tmp_path):
    (tmp_path / "train_gpt2.py").write_text(
        "import gpt2.early, os, signal, sys, threading\nfrom gpt2.errors import UserError, one_line_errors\n"
        "end = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"{'end()' if when == 'during the imports' else 'threading.Timer(0.3, end).start()'}\n"
        "with one_line_errors('train_gpt2.py'):\n    raise UserError('a typo')\n"
    )
    env = {"PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "train_gpt2.py"], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (-15, b"")


def test_every_command_listens_before_it_imports():
    programs = [ROOT / "train_gpt2.py", ROOT / "prepare_fineweb.py"]
    programs += [path for folder in ("gpt2", "lenet", "study") for path in (ROOT / folder).glob("*.py")]
    commands = [path for path in programs if "    with one_line_errors(" in path.read_text()]
    assert len(commands) > 12
    for path in commands:
        lines = [line.strip() for line in path.read_text().splitlines()]
        first = next(line for line in lines if line.startswith(("import ", "from ")))
        assert first.startswith("import gpt2.early"), path


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_what_a_program_was_started_without_is_the_null_device(closed, tmp_path):
    program = (
        "import gpt2.early, os, sys\nfor stream in (sys.stdout, sys.stderr): print('lost', file=stream, flush=True)\n"
    )
    program += "file = os.open('file', os.O_CREAT)\nos._exit(0 if file > 2 else 3)"
    (tmp_path / "sample.py").write_text(program)
    closing = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} sample.py {closing}"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""
