"""Fixtures that many tests share: small shards, a fast way to call the commands, several ranks in one process tree."""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.zygote import Zygote

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared here is bits and messages of a CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests are small, and run side by side
try:
    (Path.home() / ".cache").mkdir(exist_ok=True)
    tempfile.TemporaryFile(dir=Path.home() / ".cache").close()
except (OSError, RuntimeError):  # a home that takes no files: what is kept there is kept elsewhere
    for name in ("HF_HOME", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(name, str(Path(tempfile.gettempdir(), f"tests-{os.getuid()}", name)))
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMALL = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=2",
    "--gradient_accumulation_steps=12",
    "--max_iters=30",
    "--warmup_iters=3",
    "--eval_interval=10",
    "--eval_iters=3",
    "--log_interval=1",
    "--checkpoint_interval=10",
    "--device=cpu",
    "--dtype=float32",
    "--compile=False",
    "--learning_rate=1e-2",
]
PRUNED = ["--criterion=bitter7", "--prune_begin=5", "--prune_end=25", "--prune_interval=5"]


def write_shard(path, tokens):
    """llm.c's format, written here from its description: 256 int32, then uint16 tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def shared_data(name):
    """A path in the folder of real data, or a skipped test."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the real data {name}, which is not here")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Shards of 100 tokens' vocabulary in which the next token can be learnt: three of training, one of validation."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    steps = random.choice([1, 2, 3], p=[0.8, 0.1, 0.1], size=9000)
    tokens = np.cumsum(steps) % 100
    for number, split in enumerate(["val", "train", "train", "train"]):
        write_shard(
            folder / f"toy_{split}_{number:06d}.bin", tokens[number * 2000 : number * 2000 + 2000 + 37 * number]
        )
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 100}))
    return folder


STARTED = []  # processes of the test that runs
GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.discard if line.startswith("-") else groups.add)(abs(int(line)))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """However a test ends, the processes that it started with `start` end with it, and theirs."""
    yield
    while STARTED:
        end(STARTED.pop())


@functools.cache
def guard():
    """Takes lines: a group of processes that has begun, or, after a minus, has ended. It is a process that outlives the
    tests' own, however that dies, and then kills the groups that are left."""
    command, options = [sys.executable, "-ISc", GUARD], {"text": True, "bufsize": 1, "start_new_session": True}
    return subprocess.Popen(command, stdin=subprocess.PIPE, **options).stdin


def end(process):
    """Kill the group of a process that `start` gave, which it leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    guard().write(f"-{process.pid}\n")


def start(program, *arguments, ranks=None, env=(), **options):
    """Start a program of this project, in a process group of its own; returns the process, with its output as text."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen(
        [sys.executable, *launcher, *program.split(), *map(str, arguments)],
        env=environment,
        start_new_session=True,
        **(pipes | options),
    )
    guard().write(f"{process.pid}\n")
    STARTED.append(process)
    return process


@functools.cache
def the_zygote():
    """One for all tests of this process."""
    running = Zygote()
    atexit.register(running.__exit__)
    return running.__enter__()


@pytest.fixture(scope="session")
def zygote():
    """Starts runs of train_gpt2.py in a second each."""
    return the_zygote()


def run(program, *arguments, check=True, **options):
    """Run a program of this project, forked from what has its imports; returns (codes, output) as zygote.Done."""
    return checked(the_zygote().call(program, *arguments, **options), program, arguments, check)


def run_anew(program, *arguments, ranks=None, check=True, **options):
    """Run a program of this project in a new interpreter, or by torchrun; returns the finished process."""
    process = start(program, *arguments, ranks=ranks, **options)
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        end(process)
        STARTED.remove(process)
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    return checked(done, program, arguments, check)


def checked(done, program, arguments, check):
    if check and done.returncode:
        raise AssertionError(
            f"{program} {arguments} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


def metrics_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def files_of(out_dir, step):
    """The bytes of model and optimizer in the checkpoint of `step`."""
    folder = Path(out_dir) / "checkpoints" / f"step-{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def refused(done):
    """The lines with which a command refused: exit code 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    return [line for line in done.stderr.splitlines() if "error:" in line]


@pytest.fixture
def in_process(monkeypatch):
    """prepare_fineweb.py's workers are threads of this process, which start at once."""
    import signal
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("gpt2.preparation.pool", ThreadPoolExecutor)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
