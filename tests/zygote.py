"""Starts runs of train_gpt2.py by forking a process that has imported everything: a run then takes a second, not five.

    with Zygote() as zygote:
        done = zygote.run("--out_dir=...", ranks=2, fault="after_fsync:1:SIGKILL", parallel="ddp")
        done.codes, done.output

A negative code is the signal that ended a rank.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Done:
    """How the ranks of a run ended."""

    codes: list
    output: str
    seconds: float

    def refused(self):
        """The lines of error; AssertionError where there is another code than 2, or a traceback."""
        assert set(self.codes) == {2} and "Traceback" not in self.output, self
        return [line for line in self.output.splitlines() if "error:" in line]


class Zygote:
    """The process that forks. Requests and answers are lines of JSON on its standard input and output."""

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def run(self, *arguments, ranks=1, fault=None, kill=None, timeout=120, limits=()):
        """Run train_gpt2.py to its end; kill: (seconds after the start, signal) to send to rank 0.

        fault: as in gpt2/faults.py, or "count": every rank prints how often it passes each point.
        limits: {name of a resource limit: value}; past `timeout` seconds every rank is killed.
        """
        request = dict(
            arguments=[*map(str, arguments)], ranks=ranks, fault=fault, kill=kill, timeout=timeout, limits=dict(limits)
        )
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))


class Count:
    """In the place of a fault: counts how often each point is passed."""

    def __init__(self, rank):
        self.passed = {"rank": rank}

    def pass_by(self, name):
        self.passed[name] = self.passed.get(name, 0) + 1


def serve():
    import gpt2.log
    import train_gpt2  # what takes so long

    gpt2.log.draw = lambda out_dir: None  # a picture takes longer than such a run
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(answer(train_gpt2, json.loads(line))) + "\n")
        answers.flush()


def answer(program, request):
    begin, log, passed, seen = time.monotonic(), os.memfd_create("output"), 0.0, time.monotonic()
    free = port()
    pids = [fork(program, request, rank, log, free) for rank in range(request["ranks"])]
    codes, kill, over = {}, request["kill"], None
    while len(codes) < len(pids):
        time.sleep(0.005)
        passed += min(1.0, time.monotonic() - seen)  # what pauses this process pauses the run
        seen = time.monotonic()
        if kill and passed > kill[0]:
            send(pids[0], getattr(signal, kill[1]), codes)
            kill = None
        if passed > request["timeout"] or over is not None and passed >= over:
            for pid in pids:
                send(pid, signal.SIGKILL, codes)
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid] and over is None:  # as torchrun does: the others are not waited for
                    over = passed + (0 if codes[pid] < 0 else 8)
    os.lseek(log, 0, os.SEEK_SET)
    with open(log, "rb") as file:
        output = file.read().decode(errors="replace")
    return dict(codes=[codes[pid] for pid in pids], output=output, seconds=time.monotonic() - begin)


def send(pid, number, codes):
    if pid not in codes:
        os.kill(pid, number)


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def fork(program, request, rank, log, free):
    """One rank of the run, as torchrun would start it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request["ranks"] > 1:
            places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=request["ranks"], LOCAL_WORLD_SIZE=request["ranks"])
            places |= dict(MASTER_ADDR="localhost", MASTER_PORT=free)
            os.environ |= {name: str(value) for name, value in places.items()}
        import resource

        from gpt2 import faults

        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        counter = Count(rank)
        if request["fault"] == "count":
            faults.aims[:] = [counter]
        else:
            faults.take_aim(request["fault"] or "")
        program.main(request["arguments"])
        if request["fault"] == "count":
            print("passed " + json.dumps(counter.passed), flush=True)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
