"""lm-evaluation-harness, really run, offline, on a task and items of this folder."""

import json
import os
import shutil

import pytest

from gpt2 import evaluate
from tests.conftest import run
from tests.gpt2.test_hellaswag import ITEMS

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """HellaSwag as the harness defines it, its own functions and metrics, over our items."""
    folder = tmp_path_factory.mktemp("task")
    endings = [["on the mat", "on [x] a log", "is not", "the the"], ["sat", "and  the", "log and mat", "?"]]
    shapes = [item | {"endings": four, "ind": 0, "split_type": ""} for item in ITEMS for four in endings]
    items = [item | {"label": str(label)} for item in shapes for label in (0, 1)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "cleaning.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    (folder / "local_hellaswag.yaml").write_text(f"""
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "items.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function cleaning.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return folder


def test_the_harness_and_our_hellaswag_agree(finished_run, command, task, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    out_dir = finished_run("byte")
    arguments = ["--lm_eval", task / "local_hellaswag.yaml", "--hellaswag", task / "items.jsonl"]
    code, out, err = command(evaluate, out_dir, "--tokens", 64, *arguments)
    assert code == 0, err
    (path,) = out_dir.glob("checkpoints/step-00000030/evaluation.json")
    results = json.loads(path.read_text())
    theirs, ours = results["lm_eval"]["local_hellaswag"], results["hellaswag"]
    assert theirs["acc"] == ours["harness_acc"] and theirs["acc_norm"] == ours["harness_acc_norm"]
    assert theirs["acc_norm_stderr"] == pytest.approx(ours["harness_acc_norm_stderr"])
    assert 0 < theirs["acc_norm"] < 1 and "local_hellaswag: " in out


def test_ranks_share_the_work_and_agree(finished_run, command, task, monkeypatch):
    """Validation, HellaSwag and the harness on two ranks give what one gives, to the order of sums."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    out_dir = finished_run("byte")
    items = task / "items.jsonl"
    arguments = ["--tokens", 640, "--hellaswag", items, "--lm_eval", task / "local_hellaswag.yaml", "--device", "cpu"]
    code, _, err = command(evaluate, out_dir, *arguments)
    assert code == 0, err
    (path,) = out_dir.glob("checkpoints/step-00000030/evaluation.json")
    alone = json.loads(path.read_text())
    path.unlink()
    run("-m gpt2.evaluate", out_dir, *arguments, ranks=2)
    together = json.loads(path.read_text())
    numbers = lambda facts: {name: value for name, value in facts.items() if isinstance(value, (int, float))}
    for one, two in (
        (alone["validation"], together["validation"]),
        (alone["hellaswag"], together["hellaswag"]),
        (alone["lm_eval"]["local_hellaswag"], together["lm_eval"]["local_hellaswag"]),
    ):
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-6) and len(numbers(one)) > 4


def test_unknown_tasks_are_one_line(finished_run, command, monkeypatch):
    from lm_eval import tasks

    few = lambda include_defaults: tasks.manager.TaskManager(
        include_defaults=False
    )  # all would take ten seconds to list
    monkeypatch.setattr(tasks, "TaskManager", few)
    code, _, err = command(evaluate, finished_run("byte"), "--lm_eval", "no_such_task")
    assert code == 2 and "no_such_task" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["task: [", "", "task: mine\n", "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: no.jsonl}\n"]
)
def test_a_task_that_cannot_be_run_is_one_line(finished_run, command, tmp_path, monkeypatch, text):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(text)
    shutil.copytree(finished_run("byte"), tmp_path / "run")
    code, out, err = command(evaluate, tmp_path / "run", "--tokens", 64, "--lm_eval", tmp_path / "mine.yaml")
    (kept,) = tmp_path.glob("run/checkpoints/step-00000030/evaluation.json")
    assert json.loads(kept.read_text())["validation"]["tokens"] == 64 and "validation: " in out
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "lm-evaluation-harness" in lines[0] and "Traceback" not in err
