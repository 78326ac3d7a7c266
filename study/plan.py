"""A plan: which runs are compared, on what, and what may differ between them. A short Python file, study/plans/NAME.py.

    title   one line for the tables
    text    a Text of study/data.py
    base    options of gpt2/config.py that all runs share
    arms    name -> the options in which that arm differs, and "change": (a name of study/arms.py, its options)
    seeds   each arm runs once with each
    pairs   [(arm, against), ...]: the comparisons, chosen before the runs; one family for Holm's correction

A run is fair if it is what the plan says and nothing else: `problems` names every other difference.
"""

import runpy
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2.config import ARCHITECTURE, Config, impossible, nearest, shown, with_defaults_resolved
from gpt2.errors import UserError
from pruning.allocation import ALLOCATIONS
from pruning.criteria import CRITERIA
from pruning.optim import OPTIMIZERS
from pruning.schedule import SCHEDULES
from study.arms import ARMS
from study.data import Text

PLANS = Path(__file__).parent / "plans"
RESULTS = Path("results/study")
FIELDS = ("title", "text", "base", "arms", "seeds", "pairs")
NAMES = {
    "optimizer": OPTIMIZERS,
    "criterion": ("none", *CRITERIA),
    "schedule": tuple(SCHEDULES),
    "allocation": tuple(ALLOCATIONS),
}
# Where a run lies and how often it saves: of no influence on its result.
PLACES = ("out_dir", "data_dir", "data_format", "checkpoint_interval", "keep_checkpoints", "log_interval", "init_from")
OPTIONS = Config.__dataclass_fields__
PINNED = dict(dtype="float32", compile=False, log_interval=10, wandb_log=False)


@dataclass(frozen=True)
class Plan:
    name: str
    title: str
    text: Text
    base: dict
    arms: dict
    seeds: tuple
    pairs: list

    def runs(self):
        """[(arm, seed), ...], seed by seed, so that what is done is a complete comparison of fewer seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def config(self, arm, seed, **places):
        """The Config of a run."""
        own = {name: value for name, value in self.arms[arm].items() if name != "change"}
        return with_defaults_resolved(Config(**{**PINNED, **self.base, **own, "seed": seed, **places}))

    def path(self, arm, seed, results=RESULTS):
        return Path(results) / self.name / f"{arm}-seed{seed}.json"


def plan_files():
    return [path for path in sorted(PLANS.glob("*.py")) if path.stem != "__init__"]


def load_plan(path):
    """The Plan in the file `path`, or the one of that name in study/plans. UserError for what is wrong with it."""
    file = Path(path) if str(path).endswith(".py") else PLANS / f"{path}.py"
    if not file.is_file():
        known = [plan.stem for plan in plan_files()]
        raise UserError(f"{path}: no such plan{nearest(path, known)}; there are {', '.join(known)}")
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}".replace("\n", " ")) from None
    if missing := [field for field in FIELDS if field not in names]:
        raise UserError(f"{file}: lacks {', '.join(missing)}")
    plan = Plan(file.stem, **{field: names[field] for field in FIELDS})
    problems = [f"{file}: {problem}" for problem in mistakes(plan)]
    if problems:
        raise UserError("\n".join(problems))
    return plan


def mistakes(plan):
    """What is wrong with a plan, a line each."""
    problems = []
    for arm, own in plan.arms.items():
        unknown = [name for name in {**plan.base, **own} if name not in OPTIONS and name != "change"]
        problems += [f"{arm}: unknown option {name!r}{nearest(name, OPTIONS)}" for name in unknown]
        if "change" in own and own["change"][0] not in ARMS:
            problems.append(f"{arm}: unknown change {own['change'][0]!r}{nearest(own['change'][0], ARMS)}")
        if not unknown:
            problems += [f"{arm}: {problem}" for problem in impossible(plan.config(arm, plan.seeds[0]), NAMES)]
    machines_choice = [
        name for name in ("dtype", "compile", "device") if {**PINNED, **plan.base}.get(name, "auto") == "auto"
    ]
    problems += [f"{name}=auto: say which, machines differ in what auto picks" for name in machines_choice]
    for pair in plan.pairs:
        problems += [f"pair {pair}: no arm {arm!r}{nearest(arm, plan.arms)}" for arm in pair if arm not in plan.arms]
    return problems


def problems(plan, results):
    """'RUN: WHAT is X there, Y ...' for each way in which a result is not what the plan says or not like the others.

    results: file name -> what study/run.py wrote.
    """
    found, first_of = [], {}
    for name, result in results.items():
        arm, seed = result.get("arm"), result.get("seed")
        if arm not in plan.arms or seed not in plan.seeds:
            found.append(f"{name}: arm {arm!r} with seed {seed} is not in the plan {plan.name}")
            continue
        if name != plan.path(arm, seed).name:
            found.append(f"{name}: holds arm {arm} with seed {seed}, which belongs in {plan.path(arm, seed).name}")
        wanted = expected(plan, arm, seed)
        found += [f"{name}: {line}" for line in differences(wanted, facts_of(result), "in the plan")]
        for key, mine in shared_facts(plan, result).items():
            other, theirs = first_of.setdefault(key, (name, mine))
            if theirs != mine:
                found.append(f"{name}: {key[0]} is {mine} there, {theirs} in {other}")
        twin = first_of.setdefault(("weights", arm, result["initial_weights"]), (name, seed))
        if twin[1] != seed:
            found.append(f"{name}: seed {seed} has the initial weights of seed {twin[1]} in {twin[0]}")
    return found


def expected(plan, arm, seed):
    """What the plan says about a run: its config, data, tokens and change."""
    config = plan.config(arm, seed)
    change = plan.arms[arm].get("change")
    return {
        **{name: value for name, value in asdict(config).items() if name not in (*PLACES, "vocab_size")},
        "change": [change[0], dict(change[1])] if change else None,
        "text": plan.text.sha256,
        "tokens": config.tokens_per_step * config.max_iters,
        "steps": config.max_iters,
        "final sparsity": config.target_sparsity if config.criterion != "none" else 0.0,
    }


def facts_of(result):
    """The same about a run that was made. An option younger than the run has its default there."""
    defaults = asdict(with_defaults_resolved(Config()))
    config = {name: result["config"].get(name, default) for name, default in defaults.items()}
    last, target = result["curve"][-1], result["config"]["target_sparsity"]
    exact = abs(result["sparsity"] - target) * result["prunable"] <= 1
    return {
        **{name: value for name, value in config.items() if name not in (*PLACES, "vocab_size")},
        "change": result["change"],
        "text": result["data"]["text"],
        "tokens": last["tokens"],
        "steps": last["step"],
        "final sparsity": target if exact else result["sparsity"],
    }


def shared_facts(plan, result):
    """(what, among which runs) -> value: equal in all runs that carry the same key."""
    own = set(plan.arms[result["arm"]])
    facts = {
        ("shards", "all"): str(sorted(result["data"]["shards"].items())),
        ("evaluation set", "all"): result["evaluation"],
        ("torch version", "all"): result["versions"]["torch"].split("+")[0],
        ("batch order", result["seed"]): result["batches"],
    }
    if not own & {*ARCHITECTURE, "init_from"}:
        facts["initial weights", result["seed"]] = result["initial_weights"]
    return facts


def differences(wanted, made, where):
    return [
        f"{key} is {shown(made.get(key))} there, {shown(value)} {where}"
        for key, value in wanted.items()
        if made.get(key) != value
    ]
