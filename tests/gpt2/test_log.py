"""What a run says: lines where there is no terminal, speeds without the first step, wandb that never is in the way."""

import ast
import errno
import io
import json
import os
import re
import sys
import time
import types
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gpt2 import errors, progress, report, tracking
from gpt2.config import FIELDS, Config, load_config, nearest
from gpt2.errors import UserError
from gpt2.log import Log, last_numbers, left_behind
from gpt2.metrics import read_metrics
from gpt2.pace import Pace
from gpt2.parallel import World
from gpt2.picture import draw
from tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_where_there_is_no_terminal_plain_lines_come_now_and_then(clock, capsys):
    with progress.progress(600, "step", initial=100) as bar:
        for second in range(1, 401):
            clock.now = second
            bar.update()
            if second == 100:
                bar.write("step 100  train_loss 1.0")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "step 100  train_loss 1.0\n" and "\r" not in captured.err
    assert lines[0] == "step 105 of 600 after 0:00:05, 0:08:15 left"
    assert 6 <= len(lines) <= 11
    clock.now = 0
    bar = progress.progress(1.0, "share", desc="looking")
    clock.now = 10
    bar.update(0.25)
    bar.total = None
    clock.now = 1000
    bar.update(0.1)
    assert capsys.readouterr().err == "looking, 25% after 0:00:10, 0:00:30 left\nlooking after 0:16:40\n"


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(10, "step") as bar:
        bar.update(3)
    assert "3/10" in terminal.getvalue()


def test_nothing_else_draws_bars():
    """Commands show how far they are with gpt2/progress.py, which knows of logs that are no terminal."""
    folders = ("gpt2", "lenet", "study")
    for path in [
        ROOT / "train_gpt2.py",
        ROOT / "prepare_fineweb.py",
        *(p for f in folders for p in ROOT.glob(f"{f}/*.py")),
    ]:
        if path.name != "progress.py":
            assert not re.search(r"(from|import) tqdm", path.read_text()), path


WORLD = World(0, 1, torch.device("cpu"))


def test_the_first_step_is_left_out_of_the_speed(clock):
    pace = Pace(WORLD.device)
    for seconds, looked_at in ((60.0, False), (2.0, False), (4.0, True)):
        with pace.pruning:
            clock.now += seconds / 2
        clock.now += seconds / 2
        pace.step(looked_at)
    speed = pace.read(tokens_per_step=300, flops_per_token=1.0, world=WORLD)
    assert speed == {"step_ms": 3000.0, "prune_ms": 1500.0, "tokens_per_second": 100.0, "mfu": None}


def test_a_first_step_that_is_logged_alone_has_its_own_speed(clock):
    pace = Pace(WORLD.device)
    clock.now = 5.0
    pace.step(True)
    assert pace.read(10, 1.0, WORLD)["step_ms"] == 5000.0
    pace.restart()
    clock.now = 6.0
    pace.step(False)
    clock.now = 7.0
    pace.step(True)
    assert pace.read(10, 1.0, WORLD)["step_ms"] == 1000.0


@pytest.mark.parametrize(
    "word, option",
    [
        ("lr", "learning_rate"),
        ("wd", "weight_decay"),
        ("bs", "batch_size"),
        ("learning-rate", "learning_rate"),
        ("max_steps", "max_iters"),
        ("num_train_epochs", "max_iters"),
        ("output_dir", "out_dir"),
        ("sparsity", "target_sparsity"),
        ("pruning_method", "criterion"),
        ("n_heads", "n_head"),
        ("criterium", "criterion"),
        ("seq_len", "block_size"),
    ],
)
def test_the_nearest_option_is_named(word, option):
    assert nearest(word, FIELDS) == f" (did you mean {option}?)"
    with pytest.raises(UserError, match=f"did you mean {option}"):
        load_config([f"--{word}=1"], {})


@pytest.mark.parametrize("word", ["xyzzy", "q", ""])
def test_what_is_near_nothing_names_nothing(word):
    assert nearest(word, FIELDS) == ""


def test_lines_that_a_crash_cut_off_are_no_metrics(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1, "x": 2}\n\x00\x00\n[1]\n{"x": 1}\n{"step": 2}\n{"step": 3')
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "train_loss": NaN, "val_loss": Infinity}',
        '{"step": 3, "val_loss": "x", "sparsity": []}',
        '{"step": 3, "val_loss": null, "sparsity": null, "tokens_per_second": "fast"}',
        '{"step": 3, "val_loss": {"a": {}}, "layer_sparsity": {"a": "b"}, "sparsity": {"a": 1}}',
        '{"step": true, "val_loss": 1}',
        '{"step": -1, "val_loss": 1}',
        f'{{"step": 1{"0" * 400}, "val_loss": 1}}',
        f'{{"step": 4, "val_loss": 1{"0" * 400}}}',
        "[" * 100_000,
    ],
)
def test_metrics_that_no_run_writes_are_passed_over(line, tmp_path):
    """Of a folder that somebody else has filled."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "val_loss": 2.0, "layer_sparsity": {{"a": 0}}}}\n{line}\n')
    (tmp_path / "config.json").write_text("{}")
    later = line.startswith(('{"step": 2', '{"step": 3', '{"step": 4'))  # a step, of which nothing is known
    assert last_numbers(tmp_path) == ("" if later else ", val_loss 2.0000")
    draw(tmp_path)
    report.page([report.read_run(tmp_path, "run", 0)])


def fake_wandb(monkeypatch, mode="online", login=lambda prompt: True, log=None, init_error=None):
    """A module `wandb` in place of the real one; returns the lines that it was given."""
    lines = []

    def init(**options):
        if init_error:
            raise init_error
        return SimpleNamespace(log=log or (lambda line, step: lines.append(line)), finish=lambda: None)

    module = types.ModuleType("wandb")
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))
    module.login, module.init, module.Settings = login, init, SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", module)
    return lines


def raising(error):
    def call(*_, **__):
        raise error

    return call


def raising_login(error):
    def login(prompt):
        raise error

    return login


@pytest.mark.parametrize(
    "options, words",
    [
        ({"login": lambda prompt: False}, "no API key.*wandb login"),
        (
            {"login": raising_login(RuntimeError("WANDB_API_KEY invalid: has 5\nmore"))},
            "WANDB_API_KEY invalid: has 5; mend",
        ),
        ({"login": raising_login(TimeoutError())}, "TimeoutError"),
    ],
)
def test_wandb_is_asked_before_the_run(options, words, monkeypatch):
    fake_wandb(monkeypatch, **options)
    with pytest.raises(UserError, match=words) as caught:
        tracking.check()
    assert "\n" not in str(caught.value) and "--wandb_log" in str(caught.value)


def test_an_absent_or_broken_wandb_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb cannot be used: import of wandb halted"):
        tracking.check()
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="wandb cannot be used: module 'wandb' has no attribute"):
        tracking.check()


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_without_its_service_wandb_needs_no_key(mode, monkeypatch):
    fake_wandb(monkeypatch, mode=mode, login=raising(AssertionError("asked")))
    tracking.check()


def test_a_wandb_that_cannot_start_leaves_nothing_behind(monkeypatch, tmp_path):
    fake_wandb(monkeypatch, init_error=RuntimeError("no route to host"))
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="cannot start a run: no route to host"):
        tracking.Tracker(replace(Config(), out_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_every_line(monkeypatch, tmp_path):
    lines = fake_wandb(monkeypatch)
    tracker = tracking.Tracker(replace(Config(), out_dir=str(tmp_path)))
    for step in range(50):
        tracker.log({"step": step})
    tracker.finish()
    assert [line["step"] for line in lines] == list(range(50)) and (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_wandb_that_fails_or_hangs_is_one_warning(how, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    monkeypatch.setattr(tracking, "BACKLOG", 5)
    log = raising(RuntimeError("the service is gone")) if how == "fails" else lambda line, step: time.sleep(30)
    fake_wandb(monkeypatch, log=log)
    tracker = tracking.Tracker(replace(Config(), out_dir=str(tmp_path)))
    began = time.monotonic()
    for step in range(50):
        tracker.log({"step": step})
    tracker.finish()
    assert time.monotonic() - began < 5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "warning: wandb" in said[0] and "training goes on" in said[0]


def test_a_wandb_that_is_behind_at_the_end_takes_what_waits_and_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "BACKLOG", 3)
    lines, finished = [], []
    fake_wandb(monkeypatch, log=lambda line, step: (time.sleep(0.02), lines.append(step)))
    tracker = tracking.Tracker(replace(Config(), out_dir=str(tmp_path)))
    tracker.run.finish = lambda: finished.append(len(lines))
    while not tracker.lines.full():
        tracker.log({"step": 0})
    tracker.finish()
    assert finished == [len(lines)] and len(lines) >= 3 and capsys.readouterr().err == ""


def test_of_a_path_that_this_user_may_not_use_one_line_says_which(monkeypatch, capsys):
    codes = []
    for error in (PermissionError(errno.EACCES, "Permission denied", "/root/x"), OSError(errno.EIO, "no line", "/x")):
        try:
            with errors.one_line_errors("program", leave=codes.append):
                raise error
        except OSError:
            codes.append("traceback")  # of what nobody expects
    assert codes == [2, "traceback"]
    assert capsys.readouterr().err == "program: error: /root/x: Permission denied; choose another place\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_console_cannot_show_ends_nothing(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with errors.one_line_errors("program", leave=lambda code: None):
        print("Ω 東京 \ud800")
        raise UserError("the character 'Ω'")
    output, said = (stream.buffer.getvalue() for stream in streams if not stream.flush())
    assert output == b"\\u03a9 \\u6771\\u4eac \\ud800\n" and said == b"program: error: the character '\\u03a9'\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_warnings_of_the_project_are_lines_and_those_of_libraries_stay(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    ours, theirs = ROOT / "pruning" / "scores.py", ROOT / ".venv" / "lib" / "site-packages" / "torch" / "nn.py"
    with pytest.warns(UserWarning) as left, errors.one_line_errors("program"):
        for file in (ours, theirs, "/elsewhere/pruning/scores.py"):
            warnings.warn_explicit("look here", UserWarning, str(file), 1)
    assert capsys.readouterr().err == ("warning: look here\n" if rank == "0" else "")
    assert [str(warning.filename) for warning in left] == [str(theirs), "/elsewhere/pruning/scores.py"]


def test_modules_beside_a_file_that_is_run_shadow_nothing():
    """`python gpt2/sample.py` puts gpt2/ first on the path: a logging.py there was every library's `logging`.

    pruning/select.py and study/statistics.py are such names: packages that are run with -m and imported by their names.
    """
    known = {"pruning/select.py", "bench/select.py", "study/statistics.py"}
    for folder in (".", "gpt2", "lenet", "pruning", "study", "bench"):
        shadows = {p for p in (ROOT / folder).glob("*.py") if p.stem in sys.stdlib_module_names}
        assert {p.relative_to(ROOT).as_posix() for p in shadows} <= known


def test_every_choice_of_a_message_is_one_line():
    """UserErrors of the tree have no line break of their own: a break means another problem."""
    for path in ROOT.glob("gpt2/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and getattr(node.exc.func, "id", "") == "UserError"
            ):
                for part in ast.walk(node.exc):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value != "\n":
                        assert "\n" not in part.value, (path, part.value)


def test_the_last_numbers_are_those_of_the_last_step(tmp_path):
    """Zeros that were let go, and an evaluation that was not finite, are not what an earlier step had."""
    lines = [{"step": 1, "val_loss": 2.0, "sparsity": 0.5, "learning_rate": 0.1, "train_loss": 2.0}]
    write = lambda: (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write()
    assert last_numbers(tmp_path) == " at 50.00% sparsity, val_loss 2.0000"
    lines += [{"step": 2, "learning_rate": 0.1, "train_loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    write()
    assert last_numbers(tmp_path) == ", val_loss 1.5000"
    assert report.summary(lines, "run").keys() & {"sparsity", "train_loss", "val_loss"} == {"train_loss", "val_loss"}
    lines += [{"step": 3, "learning_rate": 0.1}]  # a loss that was not finite
    write()
    assert last_numbers(tmp_path) == "" and not report.summary(lines, "run").keys() & {"train_loss", "val_loss"}
    lines[-1]["val_loss"] = 1.25  # the step was skipped
    write()
    assert last_numbers(tmp_path) == ", val_loss 1.2500" and report.summary(lines, "run")["val_loss"] == 1.25


def test_a_line_of_nothing_is_not_written(tmp_path):
    log = Log(replace(Config(), out_dir=str(tmp_path)), World(0, 1, torch.device("cpu")), 0)
    log.open()
    log.write(1, dict(val_loss=None))
    log.write(2, dict(val_loss=float("nan")))
    log.write(3, dict(val_loss=1.0))
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "val_loss": 1.0}]


@pytest.mark.parametrize("name", ["$5_{$", "a$b_{$c", "\udce9"])
def test_a_picture_has_any_name(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n')
    assert draw(tmp_path / name).stat().st_size > 5000


def test_lines_whose_reader_has_gone_are_lost(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = errors.Heedless(os.fdopen(writer, "w"))
    print("into nothing", file=stream, flush=True)


@pytest.mark.parametrize("vocab_size, tokenizer", [(9, None), (9, {"tokenizer": "char"}), (50257, None), (0, None)])
def test_a_model_is_offered_for_trying_where_its_tokenizer_is_known(vocab_size, tokenizer, tmp_path):
    config = Config(out_dir=str(tmp_path / "a run"), vocab_size=vocab_size)
    offer = f"python -m gpt2.sample '{tmp_path}/a run'"
    assert (offer in left_behind(config)) == (vocab_size != 9)
    (tmp_path / "a run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    manifest = tmp_path / "a run" / "checkpoints" / "step-00000007" / "manifest.json"
    manifest.write_text(json.dumps({"tokenizer": tokenizer}))
    assert (offer in left_behind(config)) == (vocab_size != 9 or tokenizer is not None)
    manifest.write_text("no JSON")
    assert (offer in left_behind(config)) == (vocab_size != 9)
