"""What was measured of a run: metrics.jsonl, one JSON object a logged step, always with its `step`; evaluation.json,
what gpt2.evaluate found beside the weights that it looked at."""

import math
from pathlib import Path

from gpt2.files import from_json

EVALUATION = "evaluation.json"
BY_LAYER = "layer_sparsity"  # {layer: share of its weights that are zero}


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts of finite numbers, and of layer_sparsity, a dict of them; [] where there is
    none. What a crash left of a line is left out, and what is something else.
    """
    try:
        texts = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = [measured(line) for line in map(parsed, texts) if isinstance(line, dict)]
    return [line for line in lines if type(line.get("step")) is int and line["step"] >= 0]


def measured(line):
    """What is a number in it."""
    numbers = {name: value for name, value in line.items() if is_number(value) and name != BY_LAYER}
    layers = line.get(BY_LAYER)
    if layers and isinstance(layers, dict) and all(map(is_number, layers.values())):
        numbers[BY_LAYER] = layers
    return numbers


def is_number(value):
    return type(value) is int and abs(value) < 1 << 63 or type(value) is float and math.isfinite(value)


def read_evaluation(folder):
    """What the evaluation.json in `folder` holds, {part: {metric: number}} and facts; {} where none can be read."""
    try:
        text = (Path(folder) / EVALUATION).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return found if isinstance(found := parsed(text), dict) else {}


def measures(evaluation):
    """(part, metric, value, its standard error or None) of each measured number in what `read_evaluation` gives."""
    found, rows = dict(evaluation), []
    tasks = found.pop("lm_eval", None)
    for part, facts in (found | (tasks if isinstance(tasks, dict) else {})).items():
        for name, value in facts.items() if isinstance(facts, dict) else ():
            if isinstance(value, float) and is_number(value) and not name.endswith("_stderr"):
                error = facts.get(f"{name}_stderr")
                rows.append((part, name, value, error if is_number(error) else None))
    return rows


def parsed(text):
    try:
        return from_json(text)
    except ValueError:
        return None
