"""Runs side by side, on the terminal and as one HTML file: python -m gpt2.report OUT_DIR [OUT_DIR ...] --to report.html

The page needs no network and no server: numbers, styles and the script that draws them are in the file. It shows what
lies in the runs' folders, finished or not: metrics.jsonl, config.json, the newest checkpoint and its evaluation.json.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import json
import math
import sys
from pathlib import Path
from statistics import median

import torch

from gpt2 import load
from gpt2.config import FIELDS
from gpt2.decode import generate
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import read_json, write_atomically
from gpt2.metrics import BY_LAYER, measures, read_evaluation, read_metrics

CURVES = ("val_loss", "train_loss", "sparsity", "learning_rate", "grad_norm", "tokens_per_second")
POINTS = 2000  # of a curve in the page, at most
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SAMPLE_TOKENS = 200
PAGE = Path(__file__).with_name("report.html")
TABLE = (
    ("run", "{}"),
    ("step", "{:,}"),
    ("train_loss", "{:.4f}"),
    ("val_loss", "{:.4f}"),
    ("perplexity", "{:.2f}"),
    ("sparsity", "{:.2%}"),
    ("tokens_per_second", "{:,.0f}"),
    ("time", "{}"),
)


def read_run(out_dir, name, sample_tokens):
    """All that the page shows of a run, as JSON. UserError where the folder holds no run."""
    try:
        config = read_json(Path(out_dir) / "config.json")
        lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"{out_dir}: not the out_dir of a run: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{out_dir}: not the out_dir of a run: config.json holds no options")
    if not lines:
        raise UserError(f"{out_dir}: metrics.jsonl holds no line of numbers yet")
    found = checkpoint_of(out_dir)
    return {
        "name": name,
        "config": {option: as_json(value) for option, value in config.items()},
        "summary": summary(lines, name),
        "curves": {
            curve: thinned([[line["step"], line[curve]] for line in lines if curve in line]) for curve in CURVES
        },
        "progress": thinned(progress(lines)),
        "layers": layer_sparsity(lines, found),
        "sample": sample_of(out_dir, found, sample_tokens),
        "evaluation": evaluation_of(found),
    }


def as_json(value):
    """An option's value; as text where JSON has no such number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def checkpoint_of(out_dir):
    try:
        return load.find(out_dir)
    except UserError:
        return None  # a run that has not come to its first checkpoint


def summary(lines, name):
    """The row of the table: the last value of each number, tokens/s as a median, the time as the sum of the steps'."""
    last = {key: value for line in lines for key, value in line.items()}
    final = next((line for line in reversed(lines) if "learning_rate" in line), last)
    if "sparsity" not in final:  # zeros were let go
        last.pop("sparsity", None)
    if "train_loss" not in final:  # it is not finite any more
        last.pop("train_loss", None)
        if not any("val_loss" in line for line in lines if line["step"] == last["step"]):
            last.pop("val_loss", None)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    row = {key: last[key] for key in ("step", "train_loss", "val_loss", "sparsity") if key in last}
    if "val_loss" in last:
        row["perplexity"] = math.exp(min(last["val_loss"], 700))
    if speeds:
        row["tokens_per_second"] = median(speeds)
    return row | {"run": name, "time": duration(3600 * progress(lines)[-1][2])}


def progress(lines):
    """[step, tokens, hours of training] at the start and at each line; step_ms is a mean since the line before."""
    rows, before = [[0, 0, 0.0]], 0
    for line in lines:
        _, tokens, hours = rows[-1]
        if 0 <= line.get("step_ms", -1) < 1e12:
            hours += line["step_ms"] * (line["step"] - before) / 3_600_000
            before = line["step"]
        rows.append([line["step"], line.get("tokens", tokens), hours])
    return rows


def duration(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def thinned(points):
    """At most POINTS of the points, evenly, the last among them."""
    step = -(-len(points) // POINTS)
    return points[:: step or 1] + (points[-1:] if step > 1 and (len(points) - 1) % step else [])


def layer_sparsity(lines, found):
    """{"steps": [...], "names": [...], "shares": one list a layer}: from the metrics, else from the newest
    checkpoint."""
    measured = [(line["step"], line[BY_LAYER]) for line in lines if BY_LAYER in line]
    if not measured and found:
        names = [name for name in found.tensors if name.endswith(MATRICES)]
        shares = {name: float((load.read(found, name) == 0).float().mean()) for name in sorted(names, key=natural)}
        measured = [(found.origin.get("step", 0), shares)]
    if not measured:
        return None
    step = -(-len(measured) // 100)
    measured = measured[: -1 : step or 1] + measured[-1:]
    names = list(measured[-1][1])
    return {
        "steps": [at for at, _ in measured],
        "names": [name.removeprefix("transformer.").removesuffix(".weight") for name in names],
        "shares": [[shares.get(name, 0.0) for _, shares in measured] for name in names],
    }


def natural(name):
    """A key that sorts h.2 before h.10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def sample_of(out_dir, found, tokens):
    """OUT_DIR/sample.txt, or some text that the newest checkpoint writes, or None."""
    if (path := Path(out_dir) / "sample.txt").exists():
        return path.read_text(encoding="utf-8", errors="replace")[:4000]
    if found is None or tokens == 0:
        return None
    try:
        words, model = load.tokenizer_of(found), load.build(found, "cpu")
        start, draw = torch.tensor([[words.end_of_text]]), torch.Generator().manual_seed(1337)
        return words.decode(generate(model, start, tokens, 0.8, 200, draw)[0].tolist())
    except UserError:
        return None  # nobody says which tokenizer it was, or the weights are not finite


def evaluation_of(found):
    """{"part metric": number} of the checkpoint's evaluation.json; {} where there is none."""
    rows = measures(read_evaluation(found.folder)) if found else []
    return {f"{part} {name}": value for part, name, value, _ in rows}


def names_of(folders):
    """A name for each folder: its last part, or as much of the path as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: named twice")


def table(runs):
    """The summaries as aligned text."""
    rows = [[name for name, _ in TABLE]]
    for run in runs:
        rows.append([form.format(run["summary"][name]) if name in run["summary"] else "" for name, form in TABLE])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def page(runs):
    """The HTML file, data inside."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    data = json.dumps({"runs": runs, "defaults": defaults}, allow_nan=False).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("DATA_OF_THE_RUNS", data)


def main(arguments):
    parser = Parser(prog="python -m gpt2.report", description=__doc__.partition(":")[0])
    parser.add_argument("out_dirs", metavar="OUT_DIR", nargs="+", help="folders of runs, finished or not")
    parser.add_argument("--to", metavar="FILE", help="write the page there, as report.html")
    parser.add_argument("--sample_tokens", type=int, default=SAMPLE_TOKENS, help="of a sample for the page; 0: none")
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        tokens = args.sample_tokens if args.to else 0
        runs = [read_run(*named, tokens) for named in zip(args.out_dirs, names_of(args.out_dirs))]
        print(table(runs))
        if args.to:
            try:
                write_atomically(args.to, page(runs).encode())
            except OSError as error:
                raise UserError(f"--to {args.to}: cannot be written: {error}") from None
            print(f"\npage in {args.to}")


if __name__ == "__main__":
    main(sys.argv[1:])
