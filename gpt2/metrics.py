"""metrics.jsonl: one JSON object a logged step, always with its `step`."""

import json
from pathlib import Path


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] where there is none. What a crash left of a line is left out."""
    try:
        texts = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in map(parsed, texts) if isinstance(line, dict) and isinstance(line.get("step"), int)]


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
