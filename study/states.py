"""What a real run's Adam states hold: python -m study.states [--plan small]

Trains the first arm of the plan, through train_gpt2.py's own loop, and writes results/study/states.json: which sets the
criteria would keep from the same states (Jaccard overlap), v against bitter7's eps, and the averages of one gradient.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import shutil
import sys
from pathlib import Path

import torch

import train_gpt2
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import check_writable, write_json
from pruning import Pruner
from study import data
from study.plan import RESULTS, load_plan
from study.run import circumstances, data_dir, is_finished

CRITERIA = ("magnitude", "bitter0", "bitter3", "bitter5", "bitter6", "bitter7", "bitter8", "bitter9")
CRITERIA += ("variance_quarter", "variance_half", "variance_within", "random")
BETAS = (0.8, 0.9, 0.999)
EDGES = [x / 4 for x in range(-80, 1)]  # log10 of exp_avg_sq


class Observer:
    """Looks at one run, before each optimizer step; changes nothing in it."""

    def __init__(self, model, optimizer, config):
        self.model, self.optimizer, self.config, self.step = model, optimizer, config, 0
        self.histograms, self.raw, self.overlap = {}, [], {}
        # one pruner a criterion: from the first step on, so that each counts its steps
        self.pruners = {name: Pruner(model, optimizer, name, 0.9) for name in CRITERIA}
        self.layers = self.pruners["magnitude"].layers
        optimizer.register_step_pre_hook(self.before_step)

    @torch.no_grad()
    def before_step(self, *hook):
        self.step += 1
        self.raw.append(self.layers[0].parameter.grad.flatten()[0].item())
        steps, begin = self.config.max_iters, self.config.prune_begin
        if self.step in (steps // 10, begin, steps // 2, steps):
            self.histograms[self.step] = self.histogram()
        if self.step == steps // 2:
            self.overlap = {percent: self.jaccard(percent / 100) for percent in (50, 90)}

    def histogram(self):
        """Of exp_avg_sq over all prunable weights: shares between EDGES, and the share below eps."""
        v = torch.cat([self.optimizer.state[layer.parameter]["exp_avg_sq"].flatten() for layer in self.layers])
        logs = v.clamp(min=1e-20).log10().clamp(EDGES[0], EDGES[-1] - 1e-6)
        counts = torch.histogram(logs, torch.tensor(EDGES)).hist
        below = (v < 1e-8).float().mean().item()
        return {"log10_edges": EDGES, "share": (counts / len(v)).tolist(), "below_eps": below, "mean": v.mean().item()}

    def jaccard(self, sparsity):
        """Overlap (of both over of either) of what each two criteria keep, rows and columns in their order."""
        kept = [self.kept(pruner, sparsity) for pruner in self.pruners.values()]
        return [[round(((a & b).sum() / (a | b).sum()).item(), 4) for b in kept] for a in kept]

    def kept(self, pruner, sparsity):
        pruner.scores.prepare(pruner.zeros())
        scores = [
            pruner.scores.score(i, rows).flatten()
            for i in range(len(pruner.layers))
            for rows in pruner.scores.chunks(i)
        ]
        scores = torch.cat(scores)
        threshold = scores.kthvalue(round(sparsity * len(scores))).values
        return scores > threshold

    def averages(self):
        """name -> the gradient of one weight over the steps, raw and averaged without bias correction."""
        series = {"raw": self.raw}
        for beta in BETAS:
            average, values = 0.0, []
            for gradient in self.raw:
                average = beta * average + (1 - beta) * gradient
                values.append(average)
            series[str(beta)] = values
        return {name: [float(f"{value:.5g}") for value in values] for name, values in series.items()}


def observe(plan, args):
    """What results/study/states.json holds."""
    work = Path(args.work) / "states"
    shutil.rmtree(work, ignore_errors=True)
    data.prepare(plan.text, data_dir(plan, args))
    arm = next(iter(plan.arms))
    config = plan.config(arm, 0, out_dir=str(work), data_dir=str(data_dir(plan, args)))
    observers = []

    def watch(model, optimizer, pruner):
        observers.append(Observer(model, optimizer, config))
        return pruner

    train_gpt2.train(config, watch)
    if not is_finished(config):
        raise UserError("stopped on the way: nothing was written")
    seen = observers[0]
    return {
        "plan": plan.name,
        "arm": arm,
        "seed": 0,
        **circumstances(config),
        "criteria": CRITERIA,
        "overlap_step": config.max_iters // 2,
        "overlap": seen.overlap,
        "exp_avg_sq": seen.histograms,
        "gradient_of": f"{seen.layers[0].name}[0, 0]",
        "gradient": seen.averages(),
    }


def main(arguments):
    parser = Parser(prog="python -m study.states", description=__doc__.partition(":")[0])
    parser.add_argument("--plan", default="small", help="whose dense run is looked at (default: %(default)s)")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the results")
    parser.add_argument("--work", default="out/study", help="folder of data (default: %(default)s)")
    with one_line_errors(parser.prog, OSError, leave=sys.exit):
        args = parser.parse_args(arguments)
        torch.set_num_threads(1)
        plan, path = load_plan(args.plan), Path(args.results) / "states.json"
        check_writable(path)
        write_json(path, observe(plan, args))
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
