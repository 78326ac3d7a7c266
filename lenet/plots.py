"""Figures and a table from stored metrics, without training: python -m lenet.plots FOLDER (whose runs/ lenet.compare
filled).

One style for all: a colour is a method, a line's dashes and a marker are a sparsity; bands and error bars are one
standard deviation over seeds. The colours are Okabe and Ito's, which people with any colour vision can tell apart.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import write_atomically, write_figure
from lenet.compare import SPARSITIES, read_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "adamwadv": "AdamWAdv",
    "adamwspam": "AdamWSPAM",
    "adamwprune": "AdamWPrune",
}
OPTIMIZERS = tuple(NAMES)  # in the order of the figures
METHODS = ("dense", "movement", "magnitude", "bitter0", "bitter7", "random")
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = {0: "-", 50: ":", 70: "--", 90: "-"}
MARKERS = {0: "*", 50: "o", 70: "s", 90: "^"}
plt.rcParams.update(
    {
        "font.size": 11,
        "axes.titlesize": 12,
        "figure.titlesize": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "savefig.dpi": 100,
    }
)
SOURCE_BYTES = {  # a parameter, beside its weight, as the source project counts: SGD without momentum, masks as bytes
    "sgd": 0,
    "adam": 8,
    "adamw": 8,
    "adamwadv": 12,
    "adamwspam": 12,
    "adamwprune": 8,
    "movement": 12,
    "magnitude": 1,
    "bitter0": 1,
}


class Group(NamedTuple):
    """Runs that differ in their seeds alone. sparsity: of the target, in percent."""

    optimizer: str
    method: str
    sparsity: int
    runs: list

    def curve(self, key):
        """(mean, standard deviation) over seeds, each [epochs]."""
        values = np.array([[epoch[key] for epoch in run["epochs"]] for run in self.runs])
        return values.mean(0), deviation(values)

    def final(self, key):
        """(mean, standard deviation) over seeds of one number a run."""
        values = np.array([run[key] for run in self.runs])
        return values.mean(), deviation(values)

    def label(self, with_optimizer=True):
        method = self.method + (f" {self.sparsity} %" if self.sparsity else "")
        return f"{NAMES[self.optimizer]} {method}" if with_optimizer else method


def deviation(values):
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def load(paths):
    """The files' runs as Groups, in the order of OPTIMIZERS, METHODS, sparsity."""
    groups = {}
    for path in paths:
        run = read_run(path)
        method = run["config"]["criterion"] or "dense"
        key = (
            run["config"]["optimizer"],
            method,
            round(100 * run["config"]["target_sparsity"]) if method != "dense" else 0,
        )
        groups.setdefault(key, []).append(run)
    for (optimizer, method, sparsity), runs in groups.items():
        if differing := differences(runs):
            raise UserError(
                f"runs of {optimizer} {method} {sparsity} % differ in {' and '.join(differing)}, where only their "
                "seeds should: draw them apart"
            )
    order = lambda key: (
        OPTIMIZERS.index(key[0]),
        METHODS.index(key[1]) if key[1] in METHODS else len(METHODS),
        key[1],
        key[2],
    )
    return [Group(*key, groups[key]) for key in sorted(groups, key=order)]


def differences(runs):
    """In what these runs differ beside their seeds; "no seed" where two have the same one."""
    described = [run["config"] | {"data": run["data"], "epochs": len(run["epochs"])} for run in runs]
    names = dict.fromkeys(name for one in described for name in one if name != "seed")
    differing = [name for name in names if len({str(one.get(name)) for one in described}) > 1]
    seeds = {one.get("seed") for one in described}
    return differing or ["no seed"] * (len(seeds) < len(runs))


def styles(groups):
    """A dict of colour, dashes and marker for each group: by method and sparsity within one optimizer, else all
    different."""
    if len({group.optimizer for group in groups}) == 1 and all(group.method in METHODS for group in groups):
        return [
            dict(
                color=COLOURS[METHODS.index(group.method)],
                linestyle=DASHES.get(group.sparsity, "-"),
                marker=MARKERS.get(group.sparsity, "D"),
            )
            for group in groups
        ]
    return [
        dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":")[i // len(COLOURS) % 3], marker="os^Dv"[i % 5])
        for i in range(len(groups))
    ]


def labels(groups):
    several = len({group.optimizer for group in groups}) > 1
    return [group.label(several) for group in groups]


def title(text, groups):
    """The text, the number of seeds, and the data where they are not the whole MNIST."""
    seeds = sorted({len(group.runs) for group in groups})
    data = sorted({run["data"] for group in groups for run in group.runs} - {"MNIST"})
    count = f"{seeds[0]} seed{'s' * (seeds[0] > 1)}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return ", ".join([text, count, *data])


def curves(axis, groups, key, style_of, scale=1.0):
    """A line for each group's mean over seeds, in a band of one standard deviation."""
    for group, style in zip(groups, style_of):
        mean, std = (scale * values for values in group.curve(key))
        epochs = np.arange(1, len(mean) + 1)
        axis.plot(epochs, mean, markersize=4, linewidth=1.4, **style)
        axis.fill_between(epochs, mean - std, mean + std, color=style["color"], alpha=0.12, linewidth=0)
    axis.set_xlabel("epoch")


def accuracy_axis(axis, groups):
    """Limits that show the last epochs' differences; what is far below runs out of the picture."""
    finals = [group.final("final_accuracy")[0] for group in groups]
    low = max(min(finals), max(finals) - 6)
    axis.set_ylim(low - max(1.0, 0.6 * (max(finals) - low)), min(100.05, max(finals) + 0.4))
    axis.set_ylabel("test accuracy, %")


def bars(axis, values, text, names, colours):
    """Horizontal bars with error bars, values: [(mean, standard deviation)], and the numbers written behind."""
    places = np.arange(len(values))[::-1]
    means, stds = np.array(values).T
    axis.barh(
        places,
        means,
        xerr=stds if stds.any() else None,
        color=colours,
        alpha=0.8,
        height=0.7,
        error_kw=dict(lw=1, capsize=2),
    )
    for place, mean, std in zip(places, means, stds):
        axis.annotate(
            text.format(mean, std), (mean + std, place), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(places, names, fontsize=9)
    axis.grid(axis="y", visible=False)


def accuracy_bars(axis, groups, names, colours):
    finals = [group.final("final_accuracy") for group in groups]
    bars(axis, finals, "{:.2f} ± {:.2f}" if any(std for _, std in finals) else "{:.2f}", names, colours)
    low, high = min(mean - std for mean, std in finals), max(mean + std for mean, std in finals)
    left, right = round(low - 0.3 * (high - low + 0.1)), high + 0.55 * (high - low + 0.5)
    axis.set(title="final accuracy", xlabel=f"test accuracy, % (from {left} on)", xlim=(left, right))
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= 100])


def compare_models(groups, name, path):
    """Six panels: accuracy, loss and sparsity over epochs; final accuracy, compression, and one against the other."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8.5 + 0.12 * max(0, len(groups) - 7)), layout="constrained")
    style_of, names = styles(groups), labels(groups)
    curves(axes[0, 0], groups, "test_accuracy", [style | {"label": label} for style, label in zip(style_of, names)])
    accuracy_axis(axes[0, 0], groups)
    axes[0, 0].set_title("test accuracy")
    curves(axes[0, 1], groups, "test_loss", style_of)
    axes[0, 1].set(title="test loss", ylabel="cross-entropy, nats", yscale="log")
    curves(axes[0, 2], groups, "sparsity", style_of, 100)
    axes[0, 2].set(title="sparsity", ylabel="prunable weights that are zero, %")
    colours = [style["color"] for style in style_of]
    accuracy_bars(axes[1, 0], groups, names, colours)
    ratios = [group.final("compression_ratio") for group in groups]
    bars(axes[1, 1], ratios, "{:.1f}×", names, colours)
    axes[1, 1].set(
        title="compression", xlabel="parameters / those not zero", xlim=(0, 1.2 * max(mean for mean, _ in ratios))
    )
    for group, style, (ratio, _) in zip(groups, style_of, ratios):
        axes[1, 2].errorbar(
            ratio, *group.final("final_accuracy"), capsize=3, markersize=8, **style | {"linestyle": "none"}
        )
    axes[1, 2].set(
        title="accuracy against compression", xlabel="parameters / those not zero", ylabel="test accuracy, %"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(groups), 120 // (8 + max(map(len, names)))),
    )
    figure.suptitle(title(f"{name}: LeNet-5 on MNIST", groups))
    write_figure(path, figure)


def accuracy_evolution(groups, name, path):
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    curves(
        axis,
        groups,
        "test_accuracy",
        [style | {"label": label} for style, label in zip(styles(groups), labels(groups))],
    )
    accuracy_axis(axis, groups)
    figure.legend(loc="outside right center")
    axis.set_title(title(f"{name}: accuracy over epochs", groups))
    write_figure(path, figure)


def compare_optimizers(groups, name, path):
    """Accuracy over epochs of every optimizer, a panel for each method that all have, and every final accuracy."""
    panels = (
        {"dense": groups}
        if groups[0].method == "dense"
        else {
            "movement (AdamWPrune: bitter0)": [
                g for g in groups if g.method == "movement" or (g.optimizer, g.method) == ("adamwprune", "bitter0")
            ],
            "magnitude": [g for g in groups if g.method == "magnitude"],
        }
    )
    panels = {method: shown for method, shown in panels.items() if shown}
    size = (13, 4.2 + 0.1 * len(groups))
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=size, layout="constrained", squeeze=False)
    axes, handles = axes[0], {}
    for axis, (method, shown) in zip(axes, panels.items()):
        curves(
            axis,
            shown,
            "test_accuracy",
            [
                dict(
                    color=COLOURS[OPTIMIZERS.index(g.optimizer) + 1],
                    marker="os^Dvp"[OPTIMIZERS.index(g.optimizer)],
                    label=NAMES[g.optimizer],
                )
                for g in shown
            ],
        )
        axis.set_title(method)
        accuracy_axis(axis, groups)
        handles |= {line.get_label(): line for line in axis.get_lines()}
    accuracy_bars(
        axes[-1],
        groups,
        [NAMES[g.optimizer] + (f" {g.method}" if g.method != "dense" else "") for g in groups],
        [COLOURS[METHODS.index(g.method) if g.method in METHODS else -1] for g in groups],
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.suptitle(title(f"Optimizers, {name}: LeNet-5 on MNIST", groups))
    write_figure(path, figure)


def memory_rows(groups):
    """[(label, kB of weights, states and buffers as measured here, kB as the source counts)] of optimizers with and
    without pruning."""
    rows = []
    for group in groups:
        if (group.method, group.sparsity) in (("dense", 0), ("movement", 90), ("magnitude", 90), ("bitter0", 90)):
            memory, parameters = group.runs[0]["memory_bytes"], group.runs[0]["parameters"]
            counted = parameters * (4 + SOURCE_BYTES[group.optimizer] + SOURCE_BYTES.get(group.method, 0))
            rows.append(
                (
                    group.label().replace(" 90 %", ""),
                    [memory[item] / 1000 for item in ("weights", "states", "buffers")],
                    counted / 1000,
                )
            )
    return rows


def memory_efficiency(groups, path):
    """Bytes by optimizer and method, and what each saves against SGD with movement pruning, by the source's account and
    by ours."""
    rows = memory_rows(groups)
    if not any(label == "SGD movement" for label, *_ in rows):
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 2.6 + 0.34 * len(rows)), layout="constrained", sharey=True)
    places, left = np.arange(len(rows))[::-1], np.zeros(len(rows))
    for item, colour, values in zip(
        ("weights", "optimizer's states", "pruning's buffers"),
        COLOURS[1:],
        np.array([measured for _, measured, _ in rows]).T,
    ):
        axes[0].barh(places, values, left=left, color=colour, alpha=0.8, height=0.6, label=item)
        left += values
    counted = np.array([count for *_, count in rows])
    axes[0].plot(counted, places, "D", color="black", markersize=5, label="as the source project counts")
    for place, total, count in zip(places, left, counted):
        axes[0].annotate(
            f"{total:,.0f} / {count:,.0f}",
            (max(total, count), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes[0].set(
        title="memory beside gradients, measured / as the source counts",
        xlabel="kB",
        xlim=(0, 1.3 * max(*counted, *left)),
    )
    axes[0].set_yticks(places, [label for label, *_ in rows])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    reference = next(i for i, (label, *_) in enumerate(rows) if label == "SGD movement")
    for values, marker, colour, label in ((left, "o", COLOURS[1], "saved, measured"), (counted, "D", "black", None)):
        axes[1].plot(100 * (1 - values / values[reference]), places, marker, color=colour, label=label)
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[1].set(title="saved against SGD + movement", xlabel="%, more is better")
    axes[1].legend(loc="lower left")
    figure.suptitle("Memory of weights, optimizer and pruning")
    write_figure(path, figure)


def training_plot(group, path):
    """One run, or the mean of its seeds: loss, accuracy and sparsity over epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for key, label, style in (("train_loss", "training", "-"), ("test_loss", "test", "--")):
        mean = group.curve(key)[0]
        axes[0].plot(np.arange(1, len(mean) + 1), mean, style, marker="o", markersize=4, color=COLOURS[1], label=label)
    axes[0].set(title="loss", xlabel="epoch", ylabel="cross-entropy, nats", yscale="log")
    axes[0].legend()
    curves(axes[1], [group], "test_accuracy", styles([group]))
    axes[1].set(title="accuracy", ylabel="test accuracy, %")
    curves(axes[2], [group], "sparsity", styles([group]), 100)
    axes[2].set(title="sparsity", ylabel="weights that are zero, %", ylim=(-2, 102))
    figure.suptitle(title(f"{group.label()}: {group.final('final_accuracy')[0]:.2f} %", [group]))
    write_figure(path, figure)


def table(groups):
    """Markdown: final test accuracy in %, mean ± standard deviation over seeds, by optimizer, method and sparsity."""
    lines = ["| optimizer | method | dense | 50 % | 70 % | 90 % |", "|---|---|---|---|---|---|"]
    for optimizer in OPTIMIZERS:
        for method in METHODS:
            cells = {
                group.sparsity: group.final("final_accuracy")
                for group in groups
                if (group.optimizer, group.method) == (optimizer, method)
            }
            if cells:
                text = (f"{cells[s][0]:.2f} ± {cells[s][1]:.2f}" if s in cells else "" for s in (0, *SPARSITIES))
                lines.append(f"| {NAMES[optimizer]} | {method} | {' | '.join(text)} |")
    return (
        title("Final test accuracy, %: LeNet-5 on MNIST, mean ± standard deviation", groups)
        + "\n\n"
        + "\n".join(lines)
        + "\n"
    )


def draw_all(folder):
    """All figures and the table of the runs in folder/runs, into folder; returns their paths."""
    groups = load(sorted((folder / "runs").glob("*.json")))
    if not groups:
        raise UserError(f"{folder}: holds no runs/*.json; python -m lenet.compare --out {folder} makes them")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    for optimizer in OPTIMIZERS:
        if mine := [group for group in groups if group.optimizer == optimizer]:
            compare_models(mine, NAMES[optimizer], folder / f"{optimizer}_model_comparison.png")
            accuracy_evolution(mine, NAMES[optimizer], folder / f"{optimizer}_accuracy_evolution.png")
    for sparsity in (0, *SPARSITIES):
        if level := [group for group in groups if group.sparsity == sparsity]:
            name = f"{sparsity} % pruned" if sparsity else "dense"
            compare_optimizers(
                level, name, folder / f"optimizer_comparison_{f'{sparsity}_pruning' if sparsity else 'baseline'}.png"
            )
    memory_efficiency(groups, folder / "memory_efficiency_summary.png")
    write_atomically(folder / "table.md", table(groups).encode())
    return sorted(path for path in folder.glob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns)


def main(arguments=None):
    with one_line_errors("python -m lenet.plots", OSError):
        parser = Parser(
            prog="python -m lenet.plots",
            description="Draws every figure of a comparison, and its table, from the metrics in FOLDER/runs.",
        )
        parser.add_argument("folder", nargs="+", type=Path, help="folder that lenet.compare wrote to")
        for folder in parser.parse_args(arguments).folder:
            print(*draw_all(folder), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
