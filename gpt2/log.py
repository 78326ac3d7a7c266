"""What a run says: a line a logged step, how far it is, metrics.jsonl, wandb, and the picture at the end."""

import contextlib
import json
import math
from dataclasses import asdict
from pathlib import Path

from gpt2 import tracking
from gpt2.checkpoint import checkpoints
from gpt2.errors import UserError, first_line, warn
from gpt2.files import Lines, read_json, typed, write_atomically, write_json
from gpt2.metrics import read_metrics
from gpt2.picture import PICTURE, draw
from gpt2.progress import progress


class Log:
    """The log of a run, on the main rank; on the others every method does nothing.

    start: the step from which the run goes on; later lines of metrics.jsonl, of steps that are done again, are dropped.
    """

    def __init__(self, config, world, start):
        self.config, self.active, self.start, self.tracker = config, world.is_main, start, None

    def open(self):
        """Write config.json and open the rest, on the main rank. UserError where out_dir or wandb fails."""
        config, out_dir = self.config, Path(self.config.out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            self.tracker = tracking.Tracker(config) if config.wandb_log else None
            write_json(out_dir / "config.json", asdict(config))
            path = out_dir / "metrics.jsonl"
            kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= self.start]
            write_atomically(path, "".join(kept).encode())
            self.metrics = Lines(path)
        except OSError as error:
            raise UserError(f"out_dir={config.out_dir}: cannot be written: {error}") from None
        self.bar = progress(config.max_iters, "step", self.start, smoothing=0.05)

    def say(self, text):
        if self.active:
            self.bar.write(text)

    def advance(self):
        if self.active:
            self.bar.update()

    def write(self, step, metrics):
        """One line of metrics.jsonl, of the terminal, and of wandb: {name: number, or dict of them}.

        What does not apply is None; it is left out, and so is what is not finite.
        """
        if not self.active:
            return
        line = {"step": step} | {
            name: value
            for name, value in metrics.items()
            if value is not None and (isinstance(value, dict) or math.isfinite(value))
        }
        if len(line) == 1:
            return
        self.metrics.write(json.dumps(line) + "\n")
        if self.tracker:
            self.tracker.log(line)
        self.bar.write("  ".join(f"{label} {form.format(line[name])}" for name, label, form in COLUMNS if name in line))

    def close(self):
        if self.active:
            self.bar.close()
            self.metrics.close()
            if self.tracker:
                self.tracker.finish()

    def finish(self):
        """Close everything, draw the picture, and say how the run ended and what it has left."""
        self.close()
        if self.active:
            try:
                draw(self.config.out_dir)
            except Exception as error:  # whatever a library of figures raises
                again = f"python -m gpt2.picture {typed(self.config.out_dir)} draws it"
                warn(f"{PICTURE} could not be written: {first_line(error)}; {again}")
            print(f"finished {self.config.max_iters} steps{last_numbers(self.config.out_dir)}")
            print(left_behind(self.config))


COLUMNS = (
    ("step", "step", "{:6d}"),
    ("train_loss", "train_loss", "{:.4f}"),
    ("val_loss", "val_loss", "{:.4f}"),
    ("sparsity", "sparsity", "{:6.2%}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad_norm", "{:.2f}"),
    ("skipped_steps", "skipped", "{:d}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),
    ("step_ms", "ms/step", "{:.1f}"),
    ("prune_ms", "prune_ms", "{:.2f}"),
)


def say_finished(config, step):
    """Of a run that had ended before: say so; draw the picture if it was killed before it did."""
    picture = Path(config.out_dir) / PICTURE
    if not picture.exists():
        with contextlib.suppress(Exception):  # as in a folder that may only be read
            draw(config.out_dir)
    print(
        f"the run in {config.out_dir} is finished ({step} of {config.max_iters} steps){last_numbers(config.out_dir)}; "
        "--init_from=resume with a larger --max_iters trains on, another --out_dir starts another run"
    )
    print(left_behind(config))


def last_numbers(out_dir):
    """' at 50.00% sparsity (34.13% of all parameters), val_loss 1.2345', as far as metrics.jsonl says so of its last
    step."""
    lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    last = {name: value for line in lines if line["step"] == lines[-1]["step"] for name, value in line.items()}
    sparsity = f" at {last['sparsity']:.2%} sparsity" if "sparsity" in last else ""
    of_all = f" ({last['sparsity_of_all']:.2%} of all parameters)" if "sparsity_of_all" in last else ""
    return sparsity + of_all + (f", val_loss {last['val_loss']:.4f}" if "val_loss" in last else "")


def left_behind(config):
    """The lines that say where a run's files are, and how to try its model where a tokenizer is known."""
    out_dir = config.out_dir
    lines = [f"  checkpoints  {out_dir}/checkpoints", f"  metrics      {out_dir}/metrics.jsonl"]
    lines += [f"  picture      {out_dir}/{PICTURE}"] if Path(out_dir, PICTURE).exists() else []
    lines += [f"  try it       python -m gpt2.sample {typed(out_dir)}"] if knows_its_tokenizer(config) else []
    return "\n".join(lines)


def knows_its_tokenizer(config):
    """Whether a run's newest checkpoint holds one, as of data of prepare_fineweb.py, or GPT-2's has the tokens."""
    if config.vocab_size == 0 or config.vocab_size >= 50257:  # 0: as GPT-2's
        return True
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        newest = checkpoints(Path(config.out_dir) / "checkpoints")[-1]
        return bool(read_json(newest / "manifest.json").get("tokenizer"))
    return False
