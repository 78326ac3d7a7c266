"""What was measured of a run: metrics.jsonl, one JSON object a logged step, always with its `step`; evaluation.json,
what gpt2.evaluate found beside the weights that it looked at."""

import json
from pathlib import Path

EVALUATION = "evaluation.json"


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] where there is none. What a crash left of a line is left out."""
    try:
        texts = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [line for line in map(parsed, texts) if isinstance(line, dict) and isinstance(line.get("step"), int)]


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
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = facts.get(f"{name}_stderr")
                rows.append((part, name, value, error if isinstance(error, float) else None))
    return rows


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
