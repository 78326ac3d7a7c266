"""What a run says while it runs: a line a logged step, a progress bar, metrics.jsonl, wandb, and the picture at the end."""

import contextlib
import json
import os
import secrets
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from gpt2.errors import UserError
from gpt2.files import write_atomically, write_figure, write_json


class Log:
    """The log of a run, on the main rank; on the others every method does nothing.

    start: the step from which the run goes on; later lines of metrics.jsonl, of steps that are done again, are dropped.
    """

    def __init__(self, config, world, start):
        self.config, self.active, self.start, self.wandb = config, world.is_main, start, None

    def open(self):
        """Write config.json and open the rest, on the main rank. UserError where out_dir cannot be written."""
        config, out_dir = self.config, Path(self.config.out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            write_json(out_dir / "config.json", asdict(config))
            path = out_dir / "metrics.jsonl"
            kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= self.start]
            write_atomically(path, "".join(kept).encode())
            self.metrics = open(path, "a", buffering=1)
        except OSError as error:
            raise UserError(f"out_dir={config.out_dir}: cannot be written: {error}") from None
        if config.wandb_log:
            self.wandb = start_wandb(config, out_dir)
        self.bar = tqdm(total=config.max_iters, initial=self.start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def say(self, text):
        if self.active:
            self.bar.write(text)

    def advance(self):
        if self.active:
            self.bar.update()

    def write(self, step, metrics):
        """One line of metrics.jsonl, of the terminal, and of wandb: {name: number}; numbers that do not apply are None."""
        if not self.active:
            return
        line = {"step": step} | {name: value for name, value in metrics.items() if value is not None}
        self.metrics.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(line, step=step)
        self.bar.write("  ".join(f"{label} {form.format(line[name])}" for name, label, form in COLUMNS if name in line))

    def close(self):
        if self.active:
            self.bar.close()
            self.metrics.close()
            if self.wandb:
                self.wandb.finish()

    def finish(self):
        """Close everything; draws OUT_DIR/training.png and returns its path, or None where this is not the main rank."""
        self.close()
        return draw(Path(self.metrics.name).parent) if self.active else None


COLUMNS = (
    ("step", "step", "{:6d}"),
    ("train_loss", "train_loss", "{:.4f}"),
    ("val_loss", "val_loss", "{:.4f}"),
    ("sparsity", "sparsity", "{:6.2%}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad_norm", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),
    ("step_ms", "ms/step", "{:.1f}"),
    ("prune_ms", "prune_ms", "{:.2f}"),
)


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] where there is none. A last line that a crash cut off is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for text in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def start_wandb(config, out_dir):
    """The wandb run of out_dir; its id is kept there, so that a resumed run goes on as the same one."""
    import wandb

    path = out_dir / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(4).encode())
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name or out_dir.name,
        id=path.read_text(),
        resume="allow",
        dir=os.fspath(out_dir),
        config=asdict(config),
    )


class Stopwatch:
    """Seconds spent inside `with stopwatch:`, summed until `read`. On CUDA the device's own time, by events, without a sync."""

    def __init__(self, device):
        self.cuda, self.spans, self.seconds = device.type == "cuda", [], 0.0

    def __enter__(self):
        if self.cuda:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        else:
            self.begin = time.perf_counter()

    def __exit__(self, *error):
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.spans.append((self.begin, end))
        else:
            self.seconds += time.perf_counter() - self.begin

    def read(self):
        """The seconds since the last `read`; waits for the device where it has not come that far."""
        if self.spans:
            self.spans[-1][1].synchronize()
        seconds = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000
        self.spans, self.seconds = [], 0.0
        return seconds


def draw(out_dir):
    """OUT_DIR/training.png: loss and sparsity over steps, from metrics.jsonl. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(out_dir / "metrics.jsonl")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in (
        ("train_loss", "training loss", dict(color="#0072B2", linewidth=1)),
        ("val_loss", "validation loss", dict(color="#D55E00", marker="o", markersize=4)),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points), label=label, **style)
    axis.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=f"{out_dir.name}: loss and sparsity")
    points = [(line["step"], 100 * line["sparsity"]) for line in lines if "sparsity" in line]
    handles = axis.get_legend_handles_labels()[0]
    if points:
        right = axis.twinx()
        handles.append(right.fill_between(*zip(*points), color="#009E73", alpha=0.25, label="sparsity"))
        right.set(ylabel="prunable weights that are zero (%)", ylim=(0, 100))
    axis.legend(handles=handles, loc="upper right")
    axis.grid(alpha=0.3)
    path = out_dir / "training.png"
    write_figure(path, figure, dpi=120)
    return path
