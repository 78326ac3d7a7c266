"""The one table of options: every name a config file or the command line may set, its type, default and meaning."""

import dataclasses
import difflib
import math
import operator
import os
import runpy
import types
from dataclasses import dataclass

from gpt2.errors import UserError, warn
from gpt2.files import is_utf8


def option(default, help, choices=None, above=None, at_least=None, below=None):
    """A field with its documentation and the values it takes."""
    limits = {"choices": choices, "above": above, "at_least": at_least, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    # where things lie
    out_dir: str = option("out/gpt2_124m", "folder of the run: config.json, metrics.jsonl, checkpoints/, training.png")
    data_dir: str = option("data/fineweb_edu", "folder of the token shards that prepare_fineweb.py writes")
    data_format: str = option(
        "shards",
        "shards: with a header, as prepare_fineweb.py and llm.c write them; raw: without, as nanoGPT's train.bin and "
        "val.bin",
        choices=("shards", "raw"),
    )
    init_from: str = option(
        "auto",
        "auto: continue the run in out_dir if there is one, else start; scratch: start, refuse to continue; "
        "resume: continue, also with changed settings; gpt2, gpt2-medium, gpt2-large, gpt2-xl: their weights from the "
        "Hugging Face hub; or a folder with weights: a run's, a checkpoint's, an exported one, one of save_pretrained",
    )
    # the model
    n_layer: int = option(12, "transformer blocks", at_least=1)
    n_head: int = option(12, "attention heads a block", at_least=1)
    n_embd: int = option(768, "width of the residual stream", at_least=1)
    block_size: int = option(1024, "context length, tokens", at_least=1)
    vocab_size: int = option(
        0, "tokens of the vocabulary; 0: as the data's meta.json says, else GPT-2's 50257", at_least=0
    )
    dropout: float = option(0.0, "probability of dropping an activation", at_least=0.0, below=1.0)
    bias: bool = option(True, "biases in Linear and LayerNorm, as in GPT-2")
    # the batch of an optimizer step: batch_size * gradient_accumulation_steps sequences
    batch_size: int = option(16, "sequences in a micro-batch", at_least=1)
    gradient_accumulation_steps: int = option(
        32, "micro-batches in a step over all ranks together; divisible by their number", at_least=1
    )
    # the optimizer
    optimizer: str = option(
        "adamw",
        "adamw, adam, sgd, adamwadv (AdamW with AMSGrad) or adamwspam (that with the spam_ options); adam and sgd add "
        "weight_decay to the gradient, and sgd's momentum is beta1",
    )
    spam_theta: float = option(
        50.0,
        "adamwspam: clip a gradient's elements at sqrt(spam_theta * exp_avg_sq); 0: no such clipping",
        at_least=0.0,
    )
    spam_interval: int = option(
        1000, "adamwspam: steps from one reset of both moments to the next; 0: never", at_least=0
    )
    spam_warmup_steps: int = option(0, "adamwspam: steps of cosine warm-up after a reset", at_least=0)
    learning_rate: float = option(6e-4, "highest learning rate, reached after warm-up", above=0.0)
    min_lr: float = option(-1.0, "learning rate at the end of the decay; -1: a tenth of learning_rate")
    warmup_iters: int = option(700, "steps of linear warm-up", at_least=0)
    lr_schedule: str = option("cosine", "how the learning rate falls to min_lr", choices=("cosine", "linear"))
    lr_decay_begin: int = option(0, "the learning rate is held to this step, where it lies after warm-up", at_least=0)
    lr_decay_iters: int = option(-1, "step at which the learning rate reaches min_lr; -1: max_iters", at_least=-1)
    decay_lr: bool = option(True, "warm up and decay; False: constant learning_rate")
    max_iters: int = option(19073, "optimizer steps of the run (default: 10 billion tokens)", at_least=1)
    weight_decay: float = option(
        0.1, "weight decay, on matrices only; decoupled from the gradient in every AdamW", at_least=0.0
    )
    beta1: float = option(0.9, "decay of exp_avg", at_least=0.0, below=1.0)
    beta2: float = option(0.95, "decay of exp_avg_sq", at_least=0.0, below=1.0)
    grad_clip: float = option(1.0, "clip the gradient's global norm to this; 0: no clipping", at_least=0.0)
    skip_outliers: float = option(
        0.0,
        "skip a step whose gradient norm is this many standard deviations above its running mean; 0: never",
        at_least=0.0,
    )
    max_bad_steps: int = option(
        10,
        "stop after so many steps in a row whose loss or gradient is not finite, or an outlier; each is skipped",
        at_least=1,
    )
    # pruning
    criterion: str = option("none", "what ranks the weights: a name of pruning/criteria.py; none trains dense")
    target_sparsity: float = option(
        0.5,
        "share of the prunable weights (not embeddings, not the head tied to them) that is zero at the end",
        at_least=0.0,
        below=1.0,
    )
    schedule: str = option("gmp", "how sparsity rises from prune_begin to prune_end: a name of pruning/schedule.py")
    allocation: str = option("global", "how sparsity is spread over layers: a name of pruning/allocation.py")
    pattern: str = option(
        "",
        "n:m: prune only among the n lowest of every m weights of a row, as 2:4, which sparse tensor cores take; "
        "empty: anywhere",
    )
    density_lr: float = option(
        1.0,
        "the prunable weights learn at min(density_lr, 1 / density) times learning_rate, where density is the share of "
        "them that is not pruned yet; 1: at learning_rate",
        at_least=1.0,
    )
    prune_begin: int = option(-1, "step of the first update; -1: a quarter of max_iters", at_least=-1)
    prune_end: int = option(-1, "step that reaches target_sparsity; -1: three quarters of max_iters", at_least=-1)
    prune_interval: int = option(20, "steps from one update to the next", at_least=1)
    keep_zeros: bool = option(True, "what starts from a checkpoint with zeros keeps them, also without a criterion")
    # evaluation, log, checkpoints
    eval_interval: int = option(250, "steps between evaluations on the validation shards", at_least=1)
    eval_iters: int = option(20, "micro-batches of an evaluation, the same ones each time", at_least=1)
    log_interval: int = option(10, "steps between lines of log", at_least=1)
    checkpoint_interval: int = option(1000, "steps between checkpoints; one is always written at the end", at_least=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept, beside the one with the lowest val_loss", at_least=1)
    checkpoint_minutes: float = option(
        30.0, "minutes after which a checkpoint is due whatever the step; 0: by steps alone", at_least=0.0
    )
    max_hours: float = option(0.0, "hours after which this start of the run saves and stops; 0: no limit", at_least=0.0)
    dist_timeout_s: float = option(
        600.0,
        "seconds without a step after which a run on several ranks ends and names the rank that hangs",
        at_least=1.0,
        below=1e7,
    )
    wandb_log: bool = option(False, "log to Weights & Biases too")
    wandb_project: str = option("adamwprune", "its project")
    wandb_run_name: str = option("", "its run's name; empty: the name of out_dir")
    # the machine
    deterministic: bool = option(
        False, "the same bits in every run on CUDA too, by slower operations; on a CPU, uncompiled, it is so without"
    )
    check_interval: int = option(
        2500,
        "steps between looks for silent faults: replicas compare weights, a micro-batch is replayed; 0: never",
        at_least=0,
    )
    seed: int = option(1337, "seed of initialisation, order of the data and dropout", at_least=0, below=2**63)
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option(
        "auto", "auto: bfloat16 where the machine computes in it, else float32", choices=("auto", "float32", "bfloat16")
    )
    compile: bool | str = option(
        "auto",
        "torch.compile; auto: on CUDA; where it fails, training goes on without, but for require",
        choices=("auto", True, False, "require"),
    )
    parallel: str = option(
        "ddp",
        "how ranks share the work; ddp: each holds all weights and states; fsdp: each holds its share of them",
        choices=("ddp", "fsdp"),
    )
    activation_checkpointing: bool = option(
        False, "keep a block's input alone and compute the block again backward: less memory, about a third more time"
    )

    @property
    def tokens_per_step(self):
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


FIELDS = {field.name: field for field in dataclasses.fields(Config)}

DEVICES = ("auto", "cpu", "cuda", "mps")  # cuda may have a number behind it, as in cuda:1

# What may change between stop and restart without making it another run.
MAY_CHANGE = {
    "out_dir",
    "data_dir",
    "data_format",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "checkpoint_minutes",
    "max_hours",
    "dist_timeout_s",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "device",
    "dtype",
    "compile",
    "parallel",
    "activation_checkpointing",
    "deterministic",
    "max_bad_steps",
    "check_interval",
    "init_from",
}
PRUNING = (
    "target_sparsity",
    "schedule",
    "allocation",
    "pattern",
    "density_lr",
    "prune_begin",
    "prune_end",
    "prune_interval",
)
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")

USAGE = "usage: train_gpt2.py [FILE.py ...] [--key=value ...]      (under python or torchrun)"


def load_config(arguments, names, sizes_of=lambda config: {}):
    """Config from the command line: files are run in order, `--key=value` overrides them wherever it stands.

    names: option -> values it may take, for the options whose values other modules define (criterion, schedule, ...).
    sizes_of: Config -> sizes of the weights that its init_from names, which are those of the model too.
    Raises UserError with one line for each problem found, all at once.
    """
    problems, values = [], {}
    files = [argument for argument in arguments if not argument.startswith("--")]
    for path in files:
        values.update(checked(run_file(path, problems), f"{path}: ", problems))
    typed = {}
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals:
                problems.append(f"{argument}: options are given as --{key}=value")
                continue
            typed.update(checked({key: parse(key, text)}, "", problems))
    problems += idle_pruning(values, typed)
    values |= typed
    config = dataclasses.replace(Config(), **values)
    problems += nameless(config)
    if not problems:
        config = with_sizes(config, values, sizes_of, problems)
        config = with_defaults_resolved(config)
    problems += impossible(config, names)
    if problems:
        raise UserError("\n".join(problems))
    if config.decay_lr and config.warmup_iters >= config.max_iters:
        reached = config.max_iters / (config.warmup_iters + 1)
        warn(
            f"warmup_iters={config.warmup_iters} are not over after max_iters={config.max_iters}: the learning rate "
            f"gets to {reached:.0%} of {config.learning_rate}"
        )
    return config


def with_sizes(config, given, sizes_of, problems):
    """The config with the sizes of its initial weights. A context may be shorter than theirs; the rest must fit."""
    try:
        sizes = sizes_of(config)
    except UserError as error:
        problems.append(str(error))
        return config
    for name, theirs in sizes.items():
        ours = given.get(name, theirs)
        if ours != theirs and not (name == "block_size" and ours < theirs):
            problems.append(f"{name}={ours}: the weights of init_from={config.init_from} have {theirs}: leave it away")
    return dataclasses.replace(config, **(sizes | {name: given[name] for name in sizes if name in given}))


def run_file(path, problems):
    """The names that a config file assigns; modules, functions and names like _this are its own affair."""
    if not os.path.isfile(path):
        problems.append(f"{shown(path)}: no such config file (options are given as --key=value)")
        return {}
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        problems.append(f"{path}: {type(error).__name__}: {error}".replace("\n", " "))
        return {}
    own = (types.ModuleType, types.FunctionType, type)
    return {name: value for name, value in names.items() if not name.startswith("_") and not isinstance(value, own)}


def parse(key, text):
    """The text of --key=text as the field's type, or the text itself where it does not fit, for `checked` to refuse."""
    kind = FIELDS[key].type if key in FIELDS else str
    if kind in (bool, bool | str):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return int(text.replace("_", "")) if kind is int else float(text)
        except ValueError:
            return text
    return text


def checked(values, where, problems):
    """The values whose name and type are right; the others become problems."""
    good = {}
    for key, value in values.items():
        if key not in FIELDS:
            problems.append(f"{where}unknown option {key!r}{nearest(key, FIELDS)}")
            continue
        kind = FIELDS[key].type
        if type(value) is int and kind in (int, float) and abs(value) >= 2**63:
            problems.append(f"{where}{key}=...: expected a number of less than 64 bits")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if kind != bool | str and type(value) is not kind:
            problems.append(
                f"{where}{key}={value!r}: expected {kind.__name__}, for example {key}={FIELDS[key].default!r}"
            )
        else:
            good[key] = value
    return good


# What other programs call it.
SYNONYMS = {
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "always_save_checkpoint": "checkpoint_interval",
    "batch": "batch_size",
    "context_length": "block_size",
    "dataset": "data_dir",
    "epochs": "max_iters",
    "experiment": "out_dir",
    "layers": "n_layer",
    "heads": "n_head",
    "hidden_size": "n_embd",
    "iters": "max_iters",
    "max_grad_norm": "grad_clip",
    "max_steps": "max_iters",
    "micro_batch_size": "batch_size",
    "num_epochs": "max_iters",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "num_steps": "max_iters",
    "num_train_epochs": "max_iters",
    "output": "out_dir",
    "output_dir": "out_dir",
    "per_device_train_batch_size": "batch_size",
    "pruning_method": "criterion",
    "resume": "init_from",
    "save_dir": "out_dir",
    "save_steps": "checkpoint_interval",
    "seq_len": "block_size",
    "sequence_length": "block_size",
    "steps": "max_iters",
    "wandb": "wandb_log",
    "warmup": "warmup_iters",
    "warmup_steps": "warmup_iters",
    "width": "n_embd",
}


def nearest(word, words):
    """' (did you mean X?)' or nothing: a synonym, initials (lr), part of a name (sparsity), or a slip of the keys."""
    word, words = str(word).replace("-", "_").lower(), [str(w) for w in words]
    initials = {"".join(part[:1] for part in w.split("_")): w for w in words if "_" in w}
    match = SYNONYMS.get(word, initials.get(word))
    if match not in words:
        close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
        match = next(iter(close or [w for w in words if len(word) > 2 and word in w.split("_")]), None)
    return f" (did you mean {match}?)" if match else ""


def with_defaults_resolved(config):
    """Fill in the defaults that depend on other options."""
    resolve = lambda value, default: default if value == -1 else value
    begin = resolve(config.prune_begin, max(1, config.max_iters // 4))
    return dataclasses.replace(
        config,
        min_lr=resolve(config.min_lr, config.learning_rate / 10),
        lr_decay_iters=resolve(config.lr_decay_iters, config.max_iters),
        prune_begin=begin,
        prune_end=resolve(config.prune_end, max(begin, config.max_iters * 3 // 4)),
    )


def idle_pruning(from_files, typed):
    """A line where options of pruning are given and no criterion is, so that the run would be dense without a word.

    A recipe that prunes, with --criterion=none typed, is its dense run, and meant so."""
    given = from_files | typed
    if given.get("criterion", "none") != "none":
        return []
    meant_dense = "criterion" in typed and from_files.get("criterion", "none") != "none"
    asked = typed if meant_dense else given
    read = {"density_lr"} if given.get("init_from", "auto") not in ("auto", "scratch") else set()  # by zeros that stay
    idle = [name for name in PRUNING if name in asked and asked[name] != FIELDS[name].default and name not in read]
    listed = ", ".join(f"{name}={given[name]}" for name in idle)
    return [f"{listed}: without a criterion nothing is pruned: add one, as --criterion=bitter7"] if idle else []


def nameless(config):
    """A line for each place without a name, as where a shell's variable is not set, or with one that none can have."""
    places = {name: getattr(config, name) for name in ("out_dir", "data_dir", "init_from")}
    wrong = {name: place for name, place in places.items() if not place or "\0" in place or not is_utf8(place)}
    return [
        f"{name}={place!r}: expected a name{'' if is_utf8(place) else ' in UTF-8'}, as in --{name}="
        f"{FIELDS[name].default}"
        for name, place in wrong.items()
    ]


def out_of_range(config, names):
    """A line for each value that is none of its option's."""
    problems = []
    for key, field in FIELDS.items():
        value, limits = getattr(config, key), field.metadata
        choices = names.get(key) or limits["choices"]
        if choices and value not in choices:
            listed = ", ".join(str(choice) for choice in choices)
            problems.append(f"{key}={value}: expected one of {listed}{nearest(value, choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{key}={value}: expected a finite number")
        for bound, sign, holds in (
            ("above", ">", operator.gt),
            ("at_least", ">=", operator.ge),
            ("below", "<", operator.lt),
        ):
            if limits[bound] is not None and not holds(value, limits[bound]):
                problems.append(f"{key}={value}: expected {key} {sign} {limits[bound]}")
    if (kind := config.device.partition(":")[0]) not in DEVICES:
        problems.append(f"device={config.device}: expected one of {', '.join(DEVICES)}{nearest(kind, DEVICES)}")
    return problems


def impossible(config, names):
    """A line for each value out of its range and each combination that cannot be."""
    problems, resolved = out_of_range(config, names), with_defaults_resolved(config)
    if config.n_head > 0 and config.n_embd % config.n_head:
        problems.append(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.gradient_accumulation_steps % world_size:
        fit = max(1, config.gradient_accumulation_steps // world_size) * world_size
        problems.append(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the {world_size} "
            f"ranks; try --gradient_accumulation_steps={fit}"
        )
    begin, end = resolved.prune_begin, resolved.prune_end
    given = (config.prune_begin, config.prune_end) != (-1, -1)
    if config.criterion != "none" and given and not 1 <= begin <= end <= config.max_iters:
        problems.append(
            f"prune_begin={begin}, prune_end={end}: expected 1 <= prune_begin <= prune_end <= "
            f"max_iters={config.max_iters}"
        )
    if config.lr_decay_begin > max(config.warmup_iters, resolved.lr_decay_iters):
        problems.append(
            f"lr_decay_begin={config.lr_decay_begin}: expected at most lr_decay_iters={resolved.lr_decay_iters}"
        )
    problems += impossible_pattern(config)
    refused = any(line.startswith(("learning_rate=", "min_lr=")) for line in problems)
    if not refused and config.min_lr != -1 and not 0 <= config.min_lr <= config.learning_rate:
        problems.append(f"min_lr={config.min_lr}: expected 0 <= min_lr <= learning_rate={config.learning_rate}")
    return problems


def setting_changes(old, new):
    """What makes `new` another run than `old`, dicts of settings: 'name is OLD there, NEW here' for each.

    Without dropout, the same sequences a step in other micro-batches are the same run.
    """
    free = set(MAY_CHANGE)
    if not new["dropout"] and same_product(old, new, "gradient_accumulation_steps"):
        free |= {"batch_size", "gradient_accumulation_steps"}
        if same_product(old, new, "eval_iters"):
            free.add("eval_iters")
    return differences(old, new, [name for name in new if name not in free])


def same_product(old, new, name):
    """Whether batch_size times the option `name`, sequences of a step or of an evaluation, is the same in both."""
    return {"batch_size", name} <= old.keys() and old["batch_size"] * old[name] == new["batch_size"] * new[name]


def impossible_pattern(config):
    """A line where pattern is none, or does not go with the sparsity, the allocation or the model's width."""
    if not config.pattern or config.criterion == "none":
        return []
    n, colon, m = config.pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        return [f"pattern={config.pattern}: expected n:m with 0 < n < m, as in 2:4"]
    problems = []
    if config.target_sparsity > int(n) / int(m):
        problems.append(f"pattern={config.pattern} allows at most target_sparsity={int(n) / int(m):g}")
    if config.allocation not in ("global", "uniform"):
        problems.append(
            f"pattern={config.pattern} does not go with allocation={config.allocation}, but with global or uniform"
        )
    if config.n_embd % int(m):
        problems.append(f"pattern={config.pattern}: n_embd={config.n_embd} is not divisible by {m}")
    return problems


def differences(old, new, names):
    """'name is OLD there, NEW here' for each of `names` on which the dicts differ; a later option has its default."""
    there = lambda name: old.get(name, FIELDS[name].default if name in FIELDS else None)
    return [
        f"{name} is {shown(there(name))} there, {shown(new.get(name))} here"
        for name in names
        if there(name) != new.get(name)
    ]


def shown(value):
    """A value as a message names it: an empty text in quotes, everything else as it is."""
    return "''" if value == "" else value


def help_text():
    """All options with their defaults, as --help prints them."""
    lines = [
        USAGE,
        "",
        "A FILE.py assigns options as plain Python: n_layer = 6. Later files and --key=value override earlier ones.",
        "",
    ]
    for name, field in FIELDS.items():
        lines.append(f"  --{name}={field.default}".ljust(44) + f" {field.metadata['help']}")
    return "\n".join(lines)
