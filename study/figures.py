"""The study's figures, from results/study/ alone."""

import csv
import json
import math

from gpt2.files import write_figure
from study.statistics import compare

# One colour a criterion and one line a kind of optimizer, in all figures (Okabe and Ito's colours).
COLOURS = {
    "dense": "#000000",
    "magnitude": "#0072B2",
    "bitter7": "#D55E00",
    "variance_quarter": "#009E73",
    "movement": "#CC79A7",
    "random": "#999999",
}
LINES = {"adamw": "-", "adamwspam": "--"}


def draw_all(study, results, out):
    """Draw what the results allow into the folder `out`; returns the names."""
    drawn = []
    for plan, found in study:
        drawn.append(differences(plan, found, out / f"{plan.name}_differences.png"))
        if any(arm.startswith("magnitude-adamw-") for arm in plan.arms):
            drawn.append(loss_against_sparsity(plan, found, out / f"{plan.name}_sparsity.png"))
            drawn.append(curves(plan, found, out / f"{plan.name}_curves.png"))
            drawn.append(layers(plan, found, out / f"{plan.name}_layers.png"))
    if (path := results / "states.json").exists():
        states = json.loads(path.read_text())
        drawn += [
            overlap(states, out / "overlap.png"),
            eps(states, out / "eps.png"),
            averages(states, out / "averages.png"),
        ]
    if (path := results / "source" / "validation.csv").exists():
        drawn.append(source(path, out / "source.png"))
    return [path for path in drawn if path]


def canvas(width=8, height=4.5, columns=1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def save(path, figure):
    """Write the figure without the version of what drew it, so that the same results give the same bytes."""
    write_figure(path, figure, dpi=110, metadata={"Software": None})
    return path


def by_arm(results):
    """arm -> {seed: final loss}."""
    found = {}
    for result in results.values():
        found.setdefault(result["arm"], {})[result["seed"]] = result["val_loss"]
    return found


def parts(arm):
    """(criterion, optimizer, sparsity in %) of an arm CRITERION-OPTIMIZER-PERCENT, or None."""
    words = arm.split("-")
    return (words[0], words[1], int(words[2])) if len(words) == 3 and words[2].isdigit() else None


def differences(plan, results, path):
    """The fair comparison: each planned pair's difference in perplexity, with its 95 % interval."""
    losses = by_arm(results)
    found = [
        (f"{arm} − {against}", compare(losses.get(arm, {}), losses.get(against, {}))) for arm, against in plan.pairs
    ]
    found = [(label, c) for label, c in found if c.n >= 2][::-1]
    if not found:
        return None
    figure, axis = canvas(9, 1.2 + 0.28 * len(found))
    percent = lambda x: 100 * (math.exp(plan.text.characters_per_token * x) - 1)
    for row, (_, c) in enumerate(found):
        axis.plot([percent(c.low), percent(c.high)], [row, row], color="#0072B2", linewidth=2)
        axis.plot(percent(c.mean), row, "o", color="#D55E00", markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    if max(percent(c.high) for _, c in found) > 100:  # ruined models beside small differences
        axis.set_xscale("symlog", linthresh=10)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(found)), [f"{label} (n={c.n})" for label, c in found], fontsize=7)
    axis.set(xlabel="difference in perplexity of GPT-2 tokens, % (left: the first is better)", title=plan.title)
    axis.grid(axis="x", alpha=0.3)
    return save(path, figure)


def loss_against_sparsity(plan, results, path):
    """Final loss against sparsity, the mean over seeds with the 95 % interval of its difference from dense AdamW."""
    losses = by_arm(results)
    dense = losses.get("dense-adamw", {})
    lines = {}
    for arm, own in losses.items():
        if named := parts(arm):
            c = compare(own, dense)
            if c.n >= 2:
                lines.setdefault(named[:2], []).append((named[2], c))
    if not lines:
        return None
    figure, axis = canvas()
    for (criterion, optimizer), points in sorted(lines.items()):
        points.sort(key=lambda point: point[0])
        x, middle = [p for p, _ in points], [c.mean for _, c in points]
        spread = [[c.mean - c.low for _, c in points], [c.high - c.mean for _, c in points]]
        style = dict(color=COLOURS.get(criterion), linestyle=LINES.get(optimizer), capsize=3, marker="o", markersize=4)
        axis.errorbar(x, middle, spread, label=f"{criterion}, {optimizer}", **style)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="sparsity (%)", ylabel="loss above dense AdamW (nats), 95 % interval", title=plan.title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return save(path, figure)


def curves(plan, results, path):
    """Perplexity along the training at 50 % and without pruning, seeds averaged: where the source's gap is largest."""
    wanted = [arm for arm in plan.arms if arm.startswith("dense") or (parts(arm) and parts(arm)[2] == 50)]
    figure, axis = canvas()
    for arm in wanted:
        own = [r["curve"] for r in results.values() if r["arm"] == arm]
        if own:
            criterion, optimizer = arm.split("-")[:2]
            steps = [point["step"] for point in own[0]]
            means = [math.fsum(c[i]["val_loss"] for c in own) / len(own) for i in range(len(steps))]
            style = dict(color=COLOURS.get(criterion), linestyle=LINES.get(optimizer), marker="o", markersize=3)
            axis.plot(steps, [math.exp(mean) for mean in means], label=f"{arm} (n={len(own)})", **style)
    axis.set(xlabel="optimizer step", ylabel="validation perplexity", yscale="log", title=plan.title)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")
    return save(path, figure)


def layers(plan, results, path):
    """Sparsity of each layer at 90 %, criterion by criterion, seeds averaged."""
    figure, axis = canvas(9, 4.5)
    for arm in plan.arms:
        own = [r["layer_sparsity"] for r in results.values() if r["arm"] == arm]
        named = parts(arm)
        if own and named and named[1:] == ("adamw", 90) and named[0] != "random":
            names = list(own[0])
            means = [100 * math.fsum(layer[name] for layer in own) / len(own) for name in names]
            short = [name.removeprefix("transformer.h.").removesuffix(".weight") for name in names]
            axis.plot(
                short, means, marker="o", markersize=4, color=COLOURS.get(named[0]), label=f"{named[0]} (n={len(own)})"
            )
    axis.tick_params(axis="x", rotation=90, labelsize=7)
    axis.set(ylabel="sparsity (%)", title=f"{plan.title}: where 90 % comes from")
    if axis.lines:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return save(path, figure)


def overlap(states, path):
    """Jaccard overlap of the sets that the criteria keep from the same states."""
    figure, axes = canvas(11, 5.2, columns=2)
    for axis, (percent, table) in zip(axes, states["overlap"].items()):
        names = states["criteria"]
        axis.imshow(table, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                axis.text(
                    j,
                    i,
                    f"{value:.2f}".lstrip("0"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="w" if value < 0.6 else "k",
                )
        axis.set_title(f"overlap of what is kept at {percent} %", fontsize=10)
    return save(path, figure)


def eps(states, path):
    """exp_avg_sq of prunable weights against the eps of 1e-8 that bitter7 adds to it."""
    figure, axis = canvas()
    for step, histogram in states["exp_avg_sq"].items():
        axis.stairs(
            histogram["share"], histogram["log10_edges"], label=f"step {step}: {histogram['below_eps']:.0%} below eps"
        )
    axis.axvline(-8, color="black", linewidth=0.8, linestyle=":")
    axis.text(-7.95, axis.get_ylim()[1] * 0.92, "eps", fontsize=9)
    axis.set_xlim(-12, -3)
    axis.set(xlabel="log10 of exp_avg_sq", ylabel="share of the prunable weights", title="v against eps in a real run")
    axis.legend(fontsize=8)
    return save(path, figure)


def averages(states, path):
    """The gradient of one weight and its averages."""
    figure, axis = canvas(9, 4)
    for name, series in states["gradient"].items():
        alpha = 0.35 if name == "raw" else 1.0
        axis.plot(series, label=name if name == "raw" else f"beta {name}", alpha=alpha, linewidth=1)
    axis.set(
        xlabel="optimizer step", ylabel="gradient", title=f"one gradient and its averages: {states['gradient_of']}"
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return save(path, figure)


def source(path, out):
    """The source project's published curves, their optimizers named."""
    runs = {}
    with open(path) as file:
        for line in csv.DictReader(file):
            runs.setdefault(line["run"], []).append((int(line["step"]), float(line["val_perplexity"])))
    figure, axis = canvas(9, 5)
    for run, points in sorted(runs.items()):
        optimizer = "AMSGrad + SPAM (adamwspam)" if "adamwspam" in run else "AdamW"
        style = dict(color="#0072B2") if "adamwspam" in run else dict(color="#D55E00", alpha=0.8)
        line = "--" if "nocompile" in run else "-"
        name = run.removeprefix("gpt2_").replace("adamwprune_", "").replace("adamwspam_", "")
        points = [point for point in points if point[0]]
        axis.plot(*zip(*points), line, marker="o", markersize=3, label=f"{name}: {optimizer}", **style)
        axis.annotate(name, points[-1], fontsize=6, xytext=(4, 0), textcoords="offset points")
    axis.set(
        xlabel="step", ylabel="validation perplexity", yscale="log", title="The source's published runs, GPT-2 124M"
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")
    return save(out, figure)
