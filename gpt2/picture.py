"""The picture of a run, as far as it has come: python -m gpt2.picture OUT_DIR"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import write_figure
from gpt2.metrics import read_metrics

PICTURE = "training.png"


def draw(out_dir):
    """OUT_DIR/training.png: loss and sparsity over steps, from metrics.jsonl. Returns its path.

    UserError where there is nothing to draw.
    """
    out_dir = Path(out_dir)
    lines = read_metrics(out_dir / "metrics.jsonl")
    if not any({"train_loss", "val_loss", "sparsity"} & line.keys() for line in lines):
        raise UserError(f"{out_dir / 'metrics.jsonl'}: holds no loss and no sparsity to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    plot_losses(axis, lines)
    axis.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axis.grid(alpha=0.3)
    handles = axis.get_legend_handles_labels()[0] + plot_sparsity(axis, lines)
    name = out_dir.resolve().name.encode(errors="replace").decode()
    figure.suptitle(f"{name}: loss and sparsity", parse_math=False)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    path = out_dir / PICTURE
    write_figure(path, figure, dpi=120)
    return path


def plot_losses(axis, lines):
    for name, label, style in (
        ("train_loss", "training loss", {"color": "#0072B2", "linewidth": 1}),
        ("val_loss", "validation loss", {"color": "#D55E00", "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points), label=label, **style)


def plot_sparsity(axis, lines):
    """Sparsity on an axis of its own, behind the losses; it changes at updates and holds from one to the next."""
    points = [(line["step"], 100 * line["sparsity"]) for line in lines if "sparsity" in line]
    if not points:
        return []
    right = axis.twinx()
    axis.set_zorder(right.get_zorder() + 1)
    axis.patch.set_visible(False)
    right.set(ylabel="prunable weights that are zero (%)", ylim=(0, 100))
    area = right.fill_between(*zip(*points), step="post", color="#009E73", alpha=0.25, linewidth=0, label="sparsity")
    return [area]


def main(arguments):
    parser = Parser(prog="python -m gpt2.picture", description=__doc__.partition(":")[0])
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder of a run, which may still be going on")
    with one_line_errors(parser.prog):
        out_dir = Path(parser.parse_args(arguments).out_dir)
        if not (out_dir / "metrics.jsonl").exists():
            raise UserError(f"{out_dir}: holds no metrics.jsonl: expected the out_dir of a run")
        try:
            print(draw(out_dir))
        except OSError as error:
            raise UserError(f"{out_dir / PICTURE}: cannot be written: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
