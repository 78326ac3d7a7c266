"""Tables, figures, the ledger and the headline, from results/study/ alone: python -m study.report

Writes results/study/report/ and the generated parts of docs/study.md. Results that are not what their plan says are
refused, the difference named. The same results give the same bytes.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import csv
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import write_atomically
from pruning.memory import METHODS, account
from study import figures
from study.claims import CLAIMS
from study.plan import RESULTS, load_plan, plan_files, problems
from study.run import read_results
from study.statistics import compare, holm

SOURCE = Path(__file__).parents[1] / RESULTS / "source" / "validation.csv"
DOCUMENTS = [Path("docs/study.md"), Path("README.md")]
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
CAPTIONS = {
    "differences": "fair comparison: differences in perplexity that were planned, with their 95 % intervals",
    "sparsity": "loss above dense AdamW against sparsity",
    "curves": "perplexity along the training",
    "layers": "sparsity of each layer at 90 %",
    "overlap": "overlap of the sets that criteria keep, from the same states",
    "eps": "v against the eps of 1e-8",
    "averages": "a gradient and its averages",
}
OPEN = "The main question is open: fewer than three seeds are done."
LEAST = 3  # seeds below which nothing is concluded
HEADLINE = (  # what is said, which plan of a scale says it, by which pair
    (
        "50 %: bitter7 under AdamW, against magnitude under AdamWSPAM",
        "",
        ("bitter7-adamw-50", "magnitude-adamwspam-50"),
    ),
    ("50 %: the optimizer alone, under magnitude", "", ("magnitude-adamw-50", "magnitude-adamwspam-50")),
    ("50 %: the criterion alone, under AdamW", "", ("bitter7-adamw-50", "magnitude-adamw-50")),
    ("90 %, AdamW: bitter7, against magnitude", "", ("bitter7-adamw-90", "magnitude-adamw-90")),
    ("90 %, AdamW: \\|w\\|·v^¼, against magnitude", "", ("variance_quarter-adamw-90", "magnitude-adamw-90")),
    ("90 %, rate held: \\|w\\|·v^¼, against magnitude", "_confirm", ("held-quarter-90", "held-magnitude-90")),
    (
        "90 %, rate held: \\|w\\|·v^¼ and density_lr, against magnitude",
        "_confirm",
        ("held-quarter-density_lr-90", "held-magnitude-90"),
    ),
    (
        "90 %, rate held: \\|w\\|·v^¼ and density_lr, against dense",
        "_confirm",
        ("held-quarter-density_lr-90", "held-dense"),
    ),
)


def load_study(results, files=None):
    """[(plan, its results)] of every plan of which there are results. UserError where one is not fair."""
    study, unfair = [], []
    for path in files or plan_files():
        plan = load_plan(path)
        found = read_results(plan, results)
        unfair += [f"{results}/{plan.name}/{problem}" for problem in problems(plan, found)]
        if found:
            study.append((plan, found))
    if unfair:
        raise UserError("\n".join(unfair))
    return study


def losses_of(results, arm):
    """seed -> final validation loss."""
    return {r["seed"]: r["val_loss"] for r in results.values() if r["arm"] == arm}


def comparisons(plan, results):
    """[(arm, against, Comparison, p corrected over all pairs of the plan)]."""
    found = [compare(losses_of(results, arm), losses_of(results, against)) for arm, against in plan.pairs]
    return [(*pair, c, p) for pair, c, p in zip(plan.pairs, found, holm([c.p for c in found]))]


def verdict(comparison, corrected):
    """What may be said of arm − against: 'lower', 'higher', 'no difference shown', or 'open' with too few seeds."""
    if comparison.n < LEAST:
        return "open"
    if not corrected < 0.05:
        return "no difference shown"
    return "lower" if comparison.mean < 0 else "higher"


# ---- tables ----


def arms_table(plan, results):
    """A row an arm: n, loss, its standard deviation, perplexity, sparsity, live parameters, memory, seconds.

    Memory is weights, gradients, states and buffers in bytes a parameter, by pruning/memory.py's account.
    """
    columns = ("n", "val_loss", "sd", "perplexity", "sparsity", "live parameters", "memory", "seconds")
    rows = [f"| arm | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for arm in plan.arms:
        runs = [r for r in results.values() if r["arm"] == arm]
        if not runs:
            rows.append(f"| {arm} | 0 |" + " |" * 7)
            continue
        losses = [r["val_loss"] for r in runs]
        n, mean = len(losses), math.fsum(losses) / len(losses)
        sd = f"{math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (n - 1)):.4f}" if n > 1 else ""
        live = round(math.fsum(r["parameters"] - r["sparsity"] * r["prunable"] for r in runs) / n)
        seconds = math.fsum(r["seconds"] for r in runs) / n
        numbers = (n, f"{mean:.4f}", sd, f"{math.exp(mean):.3f}", f"{runs[0]['sparsity']:.0%}", f"{live:,}")
        rows.append(f"| {arm} | {' | '.join(map(str, numbers))} | {memory(runs[0]):.1f} | {seconds:.0f} |")
    return "\n".join(rows)


def memory(run):
    """Bytes a parameter that training takes."""
    change = run["change"][0] if run["change"] else run["config"]["criterion"]
    method = {"averaged": "movement", "extra_decay": "movement"}.get(change, change)  # 4 bytes, too
    method = method if method in METHODS else "state"
    return account(run["parameters"], run["prunable"], run["config"]["optimizer"], method)["total"] / run["parameters"]


def pairs_table(plan, results):
    """A row a planned comparison: n, difference of loss, interval, p, corrected p, ratios of perplexities, verdict.

    A loss of characters is one of GPT-2's tokens once it is multiplied by the characters that these have in the text.
    """
    columns = ("n", "difference of loss", "95 % interval", "p", "p (Holm)", "perplexity ratio", "of GPT-2 tokens")
    rows = [f"| arm − against | {' | '.join(columns)} | arm is |", "|---|" + "---:|" * len(columns) + "---|"]
    for arm, against, c, corrected in comparisons(plan, results):
        interval = "" if math.isnan(c.low) else f"{c.low:+.4f} to {c.high:+.4f}"
        tokens = c.mean * plan.text.characters_per_token
        numbers = ("", "", "") if c.n == 0 else (f"{c.mean:+.4f}", f"{math.exp(c.mean):.4f}", f"{math.exp(tokens):.3f}")
        said = verdict(c, corrected)
        cells = (f"{arm} − {against}", c.n, numbers[0], interval, rounded(c.p), rounded(corrected), *numbers[1:], said)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def rounded(p):
    """A p of two digits, of which one can tell on which side of 0.05 it lies."""
    return "" if math.isnan(p) else "<0.05" if p < 0.05 and f"{p:.2g}" == "0.05" else f"{p:.2g}"


def early_table(plan, results):
    """Perplexity along the training, seeds averaged, of the arms that the source's curves compare."""
    arms = [arm for arm in plan.arms if not arm.startswith(("variance", "random")) and "again" not in arm]
    steps = sorted({point["step"] for r in results.values() for point in r["curve"]})
    rows = ["| arm | " + " | ".join(f"step {step}" for step in steps) + " |", "|---|" + "---:|" * len(steps)]
    for arm in arms:
        curves = list(curves_of(results, arm).values())
        if curves:
            means = [math.fsum(curve[step] for curve in curves) / len(curves) for step in steps]
            rows.append(f"| {arm} | " + " | ".join(f"{math.exp(mean):.2f}" for mean in means) + " |")
    return "\n".join(rows)


def early_gaps(study, path):
    """A row a pair that differs in the optimizer: ratio of perplexities after a seventh of the run, and at its end.

    After a seventh of its run the source's gap is largest. Ratios are of GPT-2's tokens, as the source's.
    """
    rows = ["| where | arm / against | n | ratio after a seventh | at the end |", "|---|---|---:|---:|---:|"]
    ends = {run: float(points[-1]["val_perplexity"]) for run, points in source_runs(path).items()}
    early = {run: float(at_1000(points)["val_perplexity"]) for run, points in source_runs(path).items()}
    spam, adamw = "gpt2_adamwspam_magnitude_50", "gpt2_adamwprune_bitter7_state_50"
    ratios = [f"{table[spam] / table[adamw]:.3f}" for table in (early, ends)]
    rows.append(f"| source | magnitude, AMSGrad + SPAM / bitter7, AdamW, 50% | 1 | {' | '.join(ratios)} |")
    for plan, results in study:
        for arm, against in plan.pairs:
            optimizers = {plan.config(name, plan.seeds[0]).optimizer for name in (arm, against)}
            curves = [curves_of(results, name) for name in (arm, against)]
            seeds = sorted(curves[0].keys() & curves[1].keys())
            if len(optimizers) == 2 and seeds:
                steps = curves[0][seeds[0]]
                seventh = min(steps, key=lambda step: abs(step - max(steps) / 7))
                scale = plan.text.characters_per_token / len(seeds)
                gaps = [math.fsum(curves[0][s][at] - curves[1][s][at] for s in seeds) for at in (seventh, max(steps))]
                ratios = " | ".join(f"{math.exp(scale * gap):.3f}" for gap in gaps)
                rows.append(f"| {plan.name} | {arm} / {against} | {len(seeds)} | {ratios} |")
    return "\n".join(rows)


def curves_of(results, arm):
    """seed -> {step: validation loss}."""
    return {r["seed"]: {p["step"]: p["val_loss"] for p in r["curve"]} for r in results.values() if r["arm"] == arm}


TABLES = {"arms": arms_table, "pairs": pairs_table, "early": early_table}


def ledger(study):
    """A row a claim: its verdict and the numbers that decide it."""
    rows = [
        "| claim | by | verdict | decided by | n | difference of loss, 95 % interval |",
        "|---|---|---|---|---:|---:|",
    ]
    for claim in CLAIMS:
        verdict_, c = judge(claim, study)
        numbers = "" if c is None or c.n == 0 else f"{c.mean:+.4f}"
        if numbers and not math.isnan(c.low):
            numbers += f", {c.low:+.4f} to {c.high:+.4f}"
        decided = f"{claim.plan}: {claim.arm} − {claim.against}"
        rows.append(f"| {claim.text} | {claim.by} | **{verdict_}** | {decided} | {c.n if c else 0} | {numbers} |")
    return "\n".join(rows)


def judge(claim, study):
    """(supported, refuted, neutral or open, the Comparison or None): the verdict of the claim's pair in its plan."""
    plan, results = next(((plan, found) for plan, found in study if plan.name == claim.plan), (None, None))
    if plan is None:
        return "open", None
    c, said = part(plan, results, claim.arm, claim.against)
    if said == "open":
        return "open", c
    if said == "no difference shown":
        return ("supported" if claim.same else "neutral"), c
    return ("supported" if said == "lower" and not claim.same else "refuted"), c


def part(plan, results, arm, against):
    """(the Comparison of arm − against, its verdict), by one of the plan's pairs, whichever way round it names them."""
    c = compare(losses_of(results, arm), losses_of(results, against))
    corrected = next(p for *pair, _, p in comparisons(plan, results) if set(pair) == {arm, against})
    return c, verdict(c, corrected)


def cost(study):
    """A row a plan: what is done of it, epochs of data, hours, machines, versions and commits.

    The hours of a run that several plans have are those of the plan that made it.
    """
    rows = [
        "| plan | runs done | of | epochs of data | hours | machine | torch | commits |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for plan, results in study:
        runs = list(results.values())
        epochs = sorted({f"{r['epochs']:.2f}" for r in runs})
        hours = math.fsum(r["seconds"] for r in runs if "made_as" not in r) / 3600
        machines = sorted({f"{r['machine']['processor']} ({r['machine']['capability']})" for r in runs})
        versions = sorted({r["versions"]["torch"] for r in runs})
        commits = sorted({r["commit"][:9] + r["commit"][40:] for r in runs})
        lists = (", ".join(values) for values in (machines, versions, commits))
        numbers = (plan.name, len(runs), len(plan.runs()), ", ".join(epochs), f"{hours:.2f}", *lists)
        rows.append(f"| {' | '.join(map(str, numbers))} |")
    return "\n".join(rows)


def states(path):
    """What the Adam states of one real run say, from the file of study/states.py."""
    if not path.exists():
        return "No run was looked into yet."
    seen = json.loads(path.read_text())
    names, table = seen["criteria"], seen["overlap"]["90"]
    twins = [("bitter8", "bitter3"), ("bitter9", "bitter5"), ("bitter7", "variance_quarter"), ("bitter7", "magnitude")]
    twins += [("bitter5", "magnitude"), ("random", "magnitude")]
    shared = (f"{a} and {b} {table[names.index(a)][names.index(b)]:.2f}" for a, b in twins)
    below = ", ".join(f"{h['below_eps']:.0%} at step {step}" for step, h in seen["exp_avg_sq"].items())
    return (
        f"In a dense run ({seen['plan']}, {seen['arm']}, seed {seen['seed']}), v lies below eps = 1e-8 for {below}. "
        f"Of the weights kept at 90 %, half way through it, two criteria share (Jaccard): {', '.join(shared)}."
    )


def repeats(path):
    """How far apart runs end that differ in code or processor alone, from pairs of losses that `path` holds."""
    if not path.exists():
        return "No run was made twice yet."
    rows = json.loads(path.read_text())["runs"]
    lines = ["| optimizer | runs made twice | within 0.002 | mean | standard deviation | farthest |"]
    lines.append("|---|" + "---:|" * 5)
    for optimizer in sorted({row["optimizer"] for row in rows}):
        apart = [row["val_loss"] - row["val_loss_before"] for row in rows if row["optimizer"] == optimizer]
        near, farthest = sum(abs(d) <= 0.002 for d in apart), max(apart, key=abs)
        deviation = f"{stdev(apart):.4f}" if len(apart) > 1 else ""
        spread = f"{fmean(apart):+.4f} | {deviation} | {farthest:+.4f}"
        lines.append(f"| {optimizer} | {len(apart)} | {near} | {spread} |")
    return "\n".join(lines)


def source_table(path):
    """A row a published run of the source: its optimizer, and how sparse it was where its perplexity is quoted from."""
    rows = [
        "| run | optimizer | perplexity at step 1,000 | sparsity there | last step | perplexity | sparsity there |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run, points in source_runs(path).items():
        early, last = at_1000(points), points[-1]
        optimizer = "AMSGrad + SPAM" if "adamwspam" in run else "AdamW"
        numbers = [f"{float(p['val_perplexity']):.2f} | {float(p['sparsity']):.1%}" for p in (early, last)]
        rows.append(f"| {run} | {optimizer} | {numbers[0]} | {int(last['step']):,} | {numbers[1]} |")
    return "\n".join(rows)


def source_runs(path):
    """run -> its rows, in order of steps."""
    runs = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["run"], []).append(row)
    return runs


def at_1000(points):
    return next(point for point in points if point["step"] == "1000")


def percent(difference):
    """A difference of loss as one of perplexity in %."""
    return f"{100 * (math.exp(difference) - 1):+.2f}"


def headline(study):
    """What each scale says to the main question and of the recipe, a column a scale."""
    plans = {plan.name: (plan, results) for plan, results in study}
    cells = {
        scale: [answer(plans.get(scale + kind), pair) for _, kind, pair in HEADLINE]
        for scale in ("small", "medium", "medium_long")
    }
    scales = [scale for scale, answers in cells.items() if answers[0]]
    if not scales:
        return OPEN
    sizes = [size(next(iter(plans[scale][1].values()))) for scale in scales]
    lines = [f"| perplexity | {' | '.join(sizes)} |", "|---" * (1 + len(scales)) + "|"]
    for row, (label, _, _) in enumerate(HEADLINE):
        lines.append(f"| {label} | {' | '.join(cells[scale][row] or 'open' for scale in scales)} |")
    return "\n".join(lines)


def size(result):
    """Of a run of characters: its parameters, and how many characters it saw."""
    return f"{result['parameters'] / 1e6:.2f} M parameters, {result['curve'][-1]['tokens'] / 1e6:.2f} M characters"


def answer(found, pair):
    """The change of perplexity, its interval, the seeds, and whether it is shown; nothing with too few seeds."""
    if found is None or not set(pair) <= set(found[0].arms):
        return ""
    c, said = part(*found, *pair)
    if c.n < LEAST:
        return ""
    mean, low, high = (percent(found[0].text.characters_per_token * x) for x in (c.mean, c.low, c.high))
    shown = "" if said in ("lower", "higher") else ", not shown"
    return f"{mean} % ({low} to {high}; {c.n} seeds){shown}"


def blocks(study, out):
    """name -> text of each generated part of a document; out: the folder of the figures, and of what shows them."""
    made = {"headline": headline(study), "ledger": ledger(study), "cost": cost(study)}
    made |= {"source": source_table(SOURCE), "early_gaps": early_gaps(study, SOURCE)}
    made |= {"states": states(out.parent / "states.json"), "figures": pictures(out, out)}
    made |= {"repeats": repeats(out.parent / "repeats.json")}
    for plan, results in study:
        made |= {f"{plan.name}_{part}": table(plan, results) for part, table in TABLES.items()}
    return made


def pictures(out, beside):
    """The figures in `out`, as markdown that a document in the folder `beside` can hold."""
    return "\n\n".join(
        f"![{CAPTIONS[path.stem.rpartition('_')[2]]}]({Path(os.path.relpath(path, beside)).as_posix()})"
        for path in sorted(out.glob("*.png"))
        if path.stem != "source"
    )


def fill(document, made):
    """The document with its generated parts replaced. UserError for one that nothing generates."""
    pending = {f"{path.stem}_{part}": "No run of this plan is done yet." for path in plan_files() for part in TABLES}
    made = {**pending, **made}
    unknown = [name for _, name, _ in BLOCK.findall(document) if name not in made]
    if unknown:
        raise UserError(f"nothing generates {', '.join(unknown)}; there are {', '.join(sorted(made))}")
    return BLOCK.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", document)


def filled(path, made, out):
    """The document at `path` with its generated parts, from where it lies."""
    return fill(path.read_text(), made | {"figures": pictures(out, path.parent)})


def main(arguments):
    parser = Parser(prog="python -m study.report", description=__doc__.partition(":")[0])
    parser.add_argument("--results", default=str(RESULTS), help="folder of the results")
    parser.add_argument("--documents", nargs="*", type=Path, default=DOCUMENTS, help="whose generated parts are filled")
    with one_line_errors(parser.prog, OSError, leave=sys.exit):
        args = parser.parse_args(arguments)
        for path in args.documents:
            if not path.is_file():
                raise UserError(f"--documents {path}: no such file")
        study = load_study(args.results)
        if not study:
            raise UserError(f"{args.results}: holds no results; make some with python -m study.run PLAN")
        out = Path(args.results) / "report"
        out.mkdir(parents=True, exist_ok=True)
        drawn = figures.draw_all(study, Path(args.results), out)
        made = blocks(study, out)
        for name, text in made.items():
            write_atomically(out / f"{name}.md", (text + "\n").encode())
        for path in args.documents:
            write_atomically(path, filled(path, made, out).encode())
        print(f"{len(made)} tables and {len(drawn)} figures in {out}\n{made['headline']}")


if __name__ == "__main__":
    main(sys.argv[1:])
