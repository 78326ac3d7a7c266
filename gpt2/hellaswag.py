"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings the model takes for the likeliest.

The field scores it in two ways that differ by several points, so both are given, by name:
  harness  lm-evaluation-harness: the activity's label before the context, wikiHow's marks cleaned away; acc takes the
           highest sum of log-likelihoods, acc_norm divides it by the characters of the ending (the open leaderboards'
           number)
  llm.c    the context as it is; acc_norm takes the lowest mean loss a token, acc the lowest sum (build-nanogpt's and
           llm.c's number)
"""

import math
import re
from pathlib import Path

import torch

from gpt2 import parallel
from gpt2.errors import UserError, first_line
from gpt2.files import from_json
from gpt2.perplexity import rows_at_a_time, token_losses

DATASET = "Rowan/hellaswag"
FIELDS = {"activity_label": str, "ctx_a": str, "ctx_b": str, "ctx": str, "endings": list, "label": str | int}


def read_items(source):
    """The items of a jsonl file, or of the validation split of a dataset (a folder, or a name on the Hugging Face
    hub)."""
    items = from_file(source) if Path(source).is_file() else from_datasets(source)
    for number, item in enumerate(items, 1):
        if wrong := wrong_with(item if isinstance(item, dict) else {}):
            raise UserError(f"{source}: item {number} {wrong}")
    if not items:
        raise UserError(f"{source}: holds no item of HellaSwag")
    return items


def wrong_with(item):
    """What keeps an item from being scored, or None."""
    if lacking := [name for name, kind in FIELDS.items() if not isinstance(item.get(name), kind)]:
        return f"lacks {', '.join(lacking)}"
    if not all(isinstance(ending, str) for ending in item["endings"]):
        return "has endings that are no texts"
    if str(item["label"]) not in map(str, range(len(item["endings"]))):
        return f"has label {item['label']!r:.40}: use a split with labels"


def from_file(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a text may hold what splitlines takes for an end
    except (OSError, ValueError) as error:
        raise UserError(f"--hellaswag {path}: cannot be read as text: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        try:
            items.append(from_json(line)) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON: {error}") from None
    return items


def from_datasets(source):
    from gpt2.hub import import_datasets

    datasets = import_datasets()
    try:
        return list(datasets.load_dataset(str(source), split="validation"))
    except Exception as error:  # every layer below has errors of its own
        raise UserError(
            f"--hellaswag {source}: neither a jsonl file nor a dataset that can be had ({first_line(error)})"
        ) from None


def cleaned(text):
    """The text without wikiHow's marks, as lm-evaluation-harness cleans it."""
    without_marks = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return without_marks.replace("  ", " ")


def harness_pairs(item):
    """(context, ending) of each ending, and the endings' lengths in characters."""
    context = cleaned(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [cleaned(ending) for ending in item["endings"]]
    return [(context, " " + ending) for ending in endings], [len(ending) for ending in endings]


def encode_together(words, context, ending):
    """(tokens of context and ending, how many of them are the context's): encoded as one text, as the harness does."""
    kept = context.rstrip()
    ending = context[len(kept) :] + ending
    return words.encode(kept + ending).tolist(), len(words.encode(kept))


def encode_apart(words, context, ending):
    """The same, encoded one by one, as llm.c does."""
    head = words.encode(context).tolist()
    return head + words.encode(ending).tolist(), len(head)


def rows_of(item, words):
    """[(tokens, of which context), ...]: the item's endings in the harness's dialect, then in llm.c's; and the lengths
    in characters."""
    pairs, lengths = harness_pairs(item)
    rows = [encode_together(words, *pair) for pair in pairs]
    return rows + [encode_apart(words, item["ctx"], " " + ending) for ending in item["endings"]], lengths


def batch(rows, block_size, width):
    """(inputs, targets), int64 [rows, width]; targets are the endings' tokens, -1 elsewhere. What is too long loses its
    beginning."""
    inputs, targets = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
    for row, (tokens, context) in enumerate(rows):
        cut = max(0, len(tokens) - 1 - block_size)
        tokens, first = torch.tensor(tokens[cut:]), max(1, context - cut)
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, first - 1 : len(tokens) - 1] = tokens[first:]
    return inputs, targets


def score(item, words, model, world, dtype):
    """How the model does on an item: {metric: whether it is right}."""
    rows, lengths = rows_of(item, words)
    rows = [(tokens, context) if context else ([words.end_of_text, *tokens], 1) for tokens, context in rows]
    width = min(model.config.block_size, max(len(tokens) - 1 for tokens, _ in rows))
    losses, counts = [], []
    step = rows_at_a_time(world.device, width, model.config.vocab_size)
    for first in range(0, len(rows), step):
        inputs, targets = batch(rows[first : first + step], model.config.block_size, width)
        losses += token_losses(model, inputs, targets, world.device, dtype).sum(1).tolist()
        counts += (targets >= 0).sum(1).tolist()
    half, label = len(lengths), int(item["label"])
    means = [loss / max(1, count) for loss, count in zip(losses[half:], counts[half:])]
    by_character = [loss / max(1, length) for loss, length in zip(losses[:half], lengths)]
    ranked = {
        "harness_acc": losses[:half],
        "harness_acc_norm": by_character,
        "llm.c_acc": losses[half:],
        "llm.c_acc_norm": means,
    }
    return {name: values.index(min(values)) == label for name, values in ranked.items()}


METRICS = ("harness_acc", "harness_acc_norm", "llm.c_acc", "llm.c_acc_norm")


def evaluate(items, words, model, world, dtype, progress=lambda items: None):
    """Share of items that are right by each metric, with standard errors, over all ranks, as a dict."""
    right = torch.zeros(len(METRICS), dtype=torch.float64)
    for item in items[world.rank :: world.size]:
        scores = score(item, words, model, world, dtype)
        right += torch.tensor([scores[name] for name in METRICS], dtype=torch.float64)
        progress(1)
    shares = (parallel.sum_over_ranks(right, world) / len(items)).tolist()
    facts = {"items": len(items)}
    for name, share in zip(METRICS, shares):
        facts |= {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, len(items) - 1))}
    return facts
