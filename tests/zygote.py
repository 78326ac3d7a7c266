"""Runs programs of this project by forking a process that has imported what they import: a second each, not six.

    with Zygote() as zygote:
        done = zygote.call("-m gpt2.sample", out_dir)           # as a shell would, in a process of its own
        done = zygote.run("--out_dir=...", ranks=2, fault="after_fsync:1:SIGKILL", parallel="ddp")   # train_gpt2.py
        done.codes, done.output

A negative code is the signal that ended a rank. When it ends, or whoever uses it, all that it has started ends too.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Done:
    """How the ranks of a run ended, and what all of them printed."""

    codes: list
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self):
        return self.stdout + self.stderr

    @property
    def returncode(self):
        """That of the first rank that failed, or 0."""
        return next((code for code in self.codes if code), 0)

    def refused(self):
        """The lines of error; AssertionError where there is another code than 2, or a traceback."""
        assert set(self.codes) == {2} and "Traceback" not in self.output, self
        return [line for line in self.stderr.splitlines() if "error:" in line]


class Zygote:
    """The process that forks. Requests and answers are lines of JSON on its standard input and output."""

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], cwd=ROOT, env=environment, start_new_session=True, **pipes
        )
        self.lock = threading.Lock()
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def call(self, program, *arguments, ranks=None, **options):
        """Run a program ("train_gpt2.py", "-m gpt2.sample") to its end, as `python` or, with ranks, as torchrun does.

        env: {name: value} that it finds in its environment.
        kill: (seconds after the start, signal) to send to rank 0.
        limits: {name of a resource limit: value}; past `timeout` seconds every rank is killed.
        fault: as in gpt2/faults.py, or "count": every rank prints how often it passes each point.
        picture: False where a run's picture, which takes longer than a small run, is not looked at.
        """
        known = {"env": {}, "kill": None, "limits": {}, "timeout": 300, "fault": None, "picture": True}
        assert not options.keys() - known, options
        request = known | options | {"program": program, "arguments": [*map(str, arguments)], "ranks": ranks}
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return Done(**json.loads(self.process.stdout.readline()))

    def run(self, *arguments, ranks=1, **options):
        """Run train_gpt2.py, without its picture."""
        options = {"timeout": 120, "picture": False} | options
        return self.call("train_gpt2.py", *arguments, ranks=ranks if ranks > 1 else None, **options)


class Count:
    """In the place of a fault: counts how often each point is passed, and says so when the process ends."""

    def __init__(self, rank):
        self.passed = {"rank": rank}

    def pass_by(self, name):
        self.passed[name] = self.passed.get(name, 0) + 1

    def say(self):
        print("passed " + json.dumps(self.passed), flush=True)


def serve():
    """Answer requests until there are no more; in a forked rank, returns the request and the rank instead."""
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401 - an optimizer's first step imports it

    import lenet.train  # noqa: F401
    import prepare_fineweb  # noqa: F401
    import train_gpt2  # noqa: F401

    gc.freeze()  # a collection in a fork would copy all memory
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        begin, free = time.monotonic(), port()
        pids = []
        for rank in range(request["ranks"] or 1):
            pid = os.fork()
            if not pid:
                answers.close()
                become(request, rank, free, outputs)
                return request, rank
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
            pids.append(pid)
        codes = watch(pids, request, begin)
        stdout, stderr = map(text, outputs)
        answer = dict(codes=codes, stdout=stdout, stderr=stderr, seconds=time.monotonic() - begin)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def watch(pids, request, begin):
    """Wait for the ranks, and see that each ends; returns their codes."""
    codes, kill, over, passed, seen = {}, request["kill"], None, 0.0, begin
    user = select.poll()
    user.register(0, select.POLLHUP)
    while len(codes) < len(pids):
        gone = bool(user.poll(5))
        passed += min(1.0, time.monotonic() - seen)  # what pauses this process pauses the run
        seen = time.monotonic()
        if kill and passed > kill[0]:
            send(pids[0], getattr(signal, kill[1]), codes)
            kill = None
        if gone or passed > request["timeout"] or over is not None and passed >= over:
            for pid in pids:
                send(pid, signal.SIGKILL, codes)
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid] and over is None:  # as torchrun does: the others are not waited for
                    over = passed + (0 if codes[pid] < 0 else 8)
    for pid in pids:  # whom it has started and not waited for
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def send(pid, number, codes):
    if pid not in codes:
        os.kill(pid, number)


def text(file):
    os.lseek(file, 0, os.SEEK_SET)
    with open(file, "rb") as opened:
        return opened.read().decode(errors="replace")


def port():
    """A free port below those that the system gives to who asks for any: nobody takes it before it is listened on."""
    while True:
        number = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", number))
            return number


def become(request, rank, free, outputs):
    """Make this process what a shell, or torchrun, would have started."""
    import resource

    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    os.environ |= request["env"]
    if request["ranks"]:
        places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=request["ranks"], LOCAL_WORLD_SIZE=request["ranks"])
        places |= dict(MASTER_ADDR="localhost", MASTER_PORT=free)
        os.environ |= {name: str(value) for name, value in places.items()}
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))


def execute(request, rank):
    """Run the program as the main one, and end as an interpreter does, but without looking through all its memory."""
    code = 1
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        run_main(request, rank)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run_main(request, rank):
    from gpt2 import errors, faults, log

    if not request["picture"]:
        log.draw = lambda out_dir: None
    if request["fault"] == "count":
        counter = Count(rank)
        faults.aims[:] = [counter]
    else:
        faults.take_aim(request["fault"] or os.environ.get("ADAMWPRUNE_FAULT", ""))
    *module, name = request["program"].split()
    sys.argv = [name, *request["arguments"]]
    errors.exit_at_once = sys.exit if request["fault"] == "count" else errors.exit_at_once
    try:
        if module:
            sys.modules.pop(name, None)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        if request["fault"] == "count":
            counter.say()


if __name__ == "__main__":
    to_do = serve()
    if to_do:
        execute(*to_do)
