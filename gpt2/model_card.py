"""The model card (README.md) of an exported model: what it was trained on, how it was pruned, what was measured, how to
load it."""

import json
import shlex
from dataclasses import asdict, replace

from gpt2 import bitmask, load
from gpt2.config import FIELDS, MAY_CHANGE, Config, with_defaults_resolved
from gpt2.initial import STARTS
from gpt2.metrics import measures, read_evaluation

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```""",
    "bitmask": """`{file}` holds one bit a weight and the values that are not zero. gpt2/bitmask.py of AdamWPrune,
which needs torch and safetensors alone, reads it:

```python
from gpt2.bitmask import load

tensors = load({name})  # name -> tensor
```""",
}


def model_card(found, words, form, dtype, licence, name):
    """The card as Markdown; numbers that are not known are left out."""
    sparsity, rows = sparsity_table(found)
    parameters = sum(size for _, size, _ in rows)
    front = ["---", f"license: {licence}", "tags: [gpt2, pruning, sparsity]"]
    if form == "hf":
        front += ["library_name: transformers", "pipeline_tag: text-generation"]
    sizes = {name: getattr(found.sizes, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    sizes |= {"parameters": f"{parameters:,}", "tokenizer": words.name, "weights": dtype}
    parts = [
        "\n".join([*front, "---", "", f"# {' '.join(name.split())}"]),
        introduction(found, sparsity),
        "## Use\n\n" + USE[form].format(name=json.dumps(name, ensure_ascii=False), file=bitmask.FILE),
        "## Model\n\n" + table(("", ""), [(key, str(value)) for key, value in sizes.items()]),
        training(found),
        evaluation(found),
        "## Sparsity by layer\n\nShare of the weights that are exactly zero.\n\n" + layers(found, rows),
        f"## Licence\n\n{licence}, for the weights. The text it was trained on has a licence of its own.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(found, sparsity):
    how = f", pruned while it was trained by the criterion {found.config.criterion}" if pruned(found) else ""
    return (
        f"A GPT-2 in which {sparsity:.2%} of the attention and MLP weights are exactly zero{how}. Made with AdamWPrune."
    )


def pruned(found):
    return found.config is not None and found.config.criterion != "none"


def sparsity_table(found):
    """(share of the prunable weights that are zero, [(name, size, zeros), ...] of every tensor, read one at a time)."""
    rows = []
    for name in found.tensors:
        tensor = load.read(found, name)
        rows.append((name, tensor.numel(), int((tensor == 0).sum())))
    prunable = [(size, zeros) for name, size, zeros in rows if name.removesuffix(".weight").endswith(MATRICES)]
    return sum(zeros for _, zeros in prunable) / sum(size for size, _ in prunable), rows


def layers(found, rows):
    shares = {name: zeros / size for name, size, zeros in rows}
    lines = [
        (str(layer), *(f"{shares[f'transformer.h.{layer}.{matrix}.weight']:.2%}" for matrix in MATRICES))
        for layer in range(found.sizes.n_layer)
    ]
    return table(("block", *MATRICES), lines)


def training(found):
    """Data, steps and the command, of a run of ours."""
    config = found.config
    if config is None:
        return ""
    step = found.origin.get("step", config.max_iters)
    facts = [
        ("data", load.public(config.data_dir)),
        ("steps", f"{step:,} of {config.max_iters:,}"),
        ("tokens seen", f"{step * config.tokens_per_step:,}"),
        ("criterion", config.criterion),
    ]
    if pruned(found):
        facts += [
            (
                "schedule",
                f"{config.schedule}, steps {config.prune_begin} to {config.prune_end}, every {config.prune_interval}",
            ),
            ("allocation", config.allocation),
            ("target sparsity", f"{config.target_sparsity:g}"),
        ]
    shards = [name for name, *_ in found.origin.get("data", [])]
    if shards:
        facts.insert(1, ("shards", f"{len(shards)}: {shards[0]}" + (f" ... {shards[-1]}" if len(shards) > 1 else "")))
    return "## Training\n\n" + table(("", ""), facts) + "\n\n```\n" + command(config) + "\n```"


def command(config):
    """The command that trains such a model: the options that are neither the default, nor follow from others or from
    the data, nor are the machine's or of no influence on the model."""
    derived = {name: FIELDS[name].default for name in ("min_lr", "lr_decay_iters", "prune_begin", "prune_end")}
    usual = asdict(with_defaults_resolved(replace(config, **derived)))
    usual = asdict(Config()) | {name: usual[name] for name in derived}
    left_out = {"vocab_size", *MAY_CHANGE} - {"data_dir", "data_format", "dtype", "init_from"}
    weights = "auto" if config.init_from in STARTS else load.public(config.init_from)
    config = replace(config, data_dir=load.public(config.data_dir), init_from=weights)
    options = [
        f"--{name}={shlex.quote(str(value))}"
        for name, value in asdict(config).items()
        if value != usual[name] and name not in left_out
    ]
    return " \\\n    ".join(["python train_gpt2.py", *options])


def evaluation(found):
    """What gpt2.evaluate measured on these weights, or at least the validation loss that the run itself saw."""
    rows = []
    if found.origin.get("val_loss") is not None:
        rows.append(("validation loss during training", f"{found.origin['val_loss']:.4f}"))
    for part, name, value, error in measures(read_evaluation(found.folder)):
        rows.append((f"{part}: {name}", f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")))
    return "## Evaluation\n\n" + table(("", ""), rows) if rows else ""


def table(head, rows):
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
