"""How long a run takes to stop when it is asked to: python -m bench.stops [--ranks 1 2] [--phases step evaluation ...]

The quickstart is started, sent a signal in the middle of something, and timed until it has left; then the same command
is given again, and what it ends with is compared with a run that nobody disturbed. A run has 8 steps, evaluates in the
middle and at the end, and saves a checkpoint of every second step. Of two ranks the second one is asked, or, with
--torchrun, torchrun itself, which passes the signal on to both and then ends with 1.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpt2.errors import Parser, one_line_errors, positive
from gpt2.metrics import read_metrics
from tests.torture import difference, end_of

OPTIONS = ["--max_iters=8", "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--checkpoint_interval=2"]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
PHASES = ("imports", "data", "compilation", "step", "evaluation", "checkpoint")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


STARTED = []  # processes, each the leader of a group of its own


class Run:
    """A run of the quickstart in `out_dir`, on one or two ranks, as a process."""

    def __init__(self, out_dir, ranks, *options):
        launcher = [*LAUNCHER, f"--nproc_per_node={ranks}"] if ranks > 1 else []
        accumulation = f"--gradient_accumulation_steps={ranks}"
        command = [sys.executable, *launcher, "train_gpt2.py", "config/quickstart.py", f"--out_dir={out_dir}"]
        self.out_dir, self.ranks, self.log = Path(out_dir), ranks, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*command, *OPTIONS, accumulation, *options], stdout=self.log, stderr=self.log, start_new_session=True
        )
        STARTED.append(self.process)

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def last_rank(self):
        """The process that is asked: of rank 1 where there are two."""
        while self.ranks > 1:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
                    parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:
                    continue
                if int(parent) == self.process.pid and b"RANK=1" in environment:
                    return int(pid)
            time.sleep(0.02)
        return self.process.pid

    def wait_for(self, what):
        """Until what() is true; False where the run ends before."""
        while not what():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def reach(self, phase):
        """Wait until the run is in the middle of it."""
        pid, steps = self.last_rank(), lambda: len(read_metrics(self.out_dir / "metrics.jsonl"))
        if phase == "imports":
            self.wait_for(lambda: "libtorch_cpu" in Path("/proc", str(pid), "maps").read_text())
        elif phase == "data":
            self.wait_for(self.out_dir.exists)
        elif phase == "compilation":
            self.wait_for(lambda: "compiled" in self.output())
            time.sleep(2)
        elif phase == "step":
            self.wait_for(lambda: steps() >= 2)
        elif phase == "evaluation":
            self.wait_for(lambda: steps() >= 2)
            begin = time.monotonic()
            self.wait_for(lambda: steps() >= 3)
            time.sleep(1.5 * (time.monotonic() - begin) + 0.5)
        elif phase == "checkpoint":
            self.wait_for(lambda: list((self.out_dir / "checkpoints").glob(".step-*.tmp")))
        return pid


def measure(folder, phase, ranks, number, expected, torchrun):
    """(seconds from the signal to the end of all processes, exit code, the last line, what was wrong)."""
    options, out_dir = [f"--compile={phase == 'compilation'}"], folder / "stopped"
    shutil.rmtree(out_dir, ignore_errors=True)
    run = Run(out_dir, ranks, *options)
    asked = run.reach(phase)
    os.kill(run.process.pid if torchrun else asked, number)
    begin = time.perf_counter()
    code = run.process.wait()
    seconds = time.perf_counter() - begin
    said = [line for line in run.output().splitlines() if "stopped" in line or "interrupted" in line]
    again = Run(out_dir, ranks, *options)
    wrong = "not continued" if again.process.wait() else difference(end_of(out_dir), expected)
    return seconds, code, (said or ["finished"])[-1], wrong or "bitwise"


def main():
    parser = Parser(prog="python -m bench.stops", description=__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="when to signal (default: all)")
    parser.add_argument(
        "--signals", nargs="+", choices=[number.name for number in SIGNALS], help="what to send (default: each in turn)"
    )
    parser.add_argument("--torchrun", action="store_true", help="ask torchrun, where there are two ranks")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    try:
        measure_all(args)
    finally:
        for process in STARTED:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def measure_all(args):
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), {}
        for ranks in args.ranks:
            for turn, phase in enumerate(args.phases):
                compiled = phase == "compilation"
                if (ranks, compiled) not in expected:
                    out_dir = folder / f"undisturbed-{ranks}-{compiled}"
                    assert Run(out_dir, ranks, f"--compile={compiled}").process.wait() == 0
                    expected[ranks, compiled] = end_of(out_dir)
                numbers = [signal.Signals[one] for one in args.signals or ()] or [SIGNALS[turn % 3]]
                for number in numbers:
                    seconds, code, said, end = measure(
                        folder, phase, ranks, number, expected[ranks, compiled], args.torchrun
                    )
                    print(
                        f"| {phase} | {ranks} | {number.name} | {seconds:.1f} s | {code} | {end} | {said}", flush=True
                    )


if __name__ == "__main__":
    with one_line_errors("python -m bench.stops"):
        main()
