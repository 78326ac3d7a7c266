"""Weights & Biases, asked before a run starts and never able to stop or slow one that is under way."""

import contextlib
import inspect
import os
import queue
import secrets
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from gpt2.errors import UserError, first_line
from gpt2.files import write_atomically

PATIENCE = 60  # seconds for the service to answer at the start, and to take what is left at the end
BACKLOG = 1000  # lines that may wait for it in between
WITHOUT = "or leave --wandb_log away"


def check():
    """Import wandb and see that it has a key that its service takes; UserError where not. Writes nothing."""
    try:
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        takes = inspect.signature(wandb.login).parameters
        known = wandb.login(prompt=False) if "prompt" in takes else True  # older ones find out when the run starts
    except Exception as error:  # whatever a broken installation, or its network, raises
        raise UserError(f"wandb_log: wandb cannot be used: {first_line(error)}; mend that, {WITHOUT}") from None
    if not known:
        raise UserError(
            f"wandb_log: wandb has no API key: run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, {WITHOUT}"
        )


class Tracker:
    """The wandb run of out_dir, fed by a thread of its own; its id is kept there, for the run that is resumed.

    UserError where it cannot be started. What fails later is a warning, once.
    """

    def __init__(self, config):
        self.lines, self.warned = queue.Queue(BACKLOG), False
        try:
            self.run = start(config)
        except Exception as error:
            raise UserError(f"wandb_log: wandb cannot start a run: {first_line(error)}; mend that, {WITHOUT}") from None
        self.thread = threading.Thread(target=self.feed, name="wandb", daemon=True)
        self.thread.start()

    def feed(self):
        try:
            while (line := self.lines.get()) is not None:
                self.run.log(line, step=line["step"])
            self.run.finish()
        except Exception as error:
            self.warn(f"has failed ({first_line(error)})")

    def log(self, line):
        try:
            self.lines.put_nowait(line)
        except queue.Full:
            self.warn("does not keep up")

    def warn(self, what):
        if not self.warned:
            self.warned = True
            print(f"warning: wandb {what}; training goes on, metrics.jsonl has every line", file=sys.stderr, flush=True)

    def finish(self):
        """Let the service take what is left, for as long as its patience lasts."""
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(queue.Full):
            self.lines.put(None, timeout=PATIENCE)
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive():
            self.warn("has not taken all lines")


def start(config):
    import wandb

    out_dir = Path(config.out_dir)
    path, new = out_dir / "wandb_id", not (out_dir / "config.json").exists()
    try:
        known = path.read_text() if path.exists() else secrets.token_hex(4)
        run = init(wandb, config, out_dir, known)
        write_atomically(path, known.encode())
        return run
    except Exception:
        if new:  # leave nothing behind
            shutil.rmtree(out_dir / "wandb", ignore_errors=True)
        raise


def init(wandb, config, out_dir, known):
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name or out_dir.name,
        id=known,
        resume="allow",
        dir=os.fspath(out_dir),
        config=asdict(config),
        settings=wandb.Settings(init_timeout=PATIENCE),
    )
