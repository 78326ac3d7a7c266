"""Tasks of lm-evaluation-harness (pip install "lm_eval[hf]") on a model of ours, exported for it and run through its
Python interface."""

import logging
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2.errors import UserError, first_line, lost_a_peer
from gpt2.export import write_hugging_face
from gpt2.perplexity import rows_at_a_time


def run_tasks(names, found, words, world):
    """{task: {metric: number}} of the comma-separated tasks, over all ranks; each is a name the harness knows or the
    path of a task's YAML.

    UserError where the harness is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f'--lm_eval needs lm-evaluation-harness: pip install "lm_eval[hf]" ({error})') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise UserError("--lm_eval: names no task")
    by_name = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(by_name))  # reading the thousands that it knows takes ten seconds
    known = set(manager.all_tasks)
    if unknown := [task for task in by_name if task not in known]:
        raise UserError(f"--lm_eval: {', '.join(unknown)}: neither a task of lm-evaluation-harness nor a YAML file")
    model = exported(found, words, world)
    try:
        results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, log_samples=False)
    except AssertionError as error:
        why = str(error) or f"an answer is longer than the model's context of {found.sizes.block_size} tokens"
        raise UserError(f"--lm_eval {names}: lm-evaluation-harness gives up: {why}") from None
    except Exception as error:  # of a task's YAML, its functions, and data that cannot be had, each has its own
        if lost_a_peer(error):
            raise
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--lm_eval {names}: lm-evaluation-harness gives up: {why}") from None
    return {task: numbers_of(metrics) for task, metrics in results["results"].items()} if world.is_main else {}


def numbers_of(metrics):
    """The metrics of a task that are numbers: acc, acc_norm_stderr, ... without the harness's ",none" for no filter."""
    return {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, (int, float))}


def exported(found, words, world):
    """The harness's model of what was found, by way of a folder that is gone again when it is loaded."""
    rows = rows_at_a_time(world.device, found.sizes.block_size, found.sizes.vocab_size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_hugging_face(found, Path(folder), words, "float32")
            return harness_model(folder, world, rows)
    except OSError as error:
        raise UserError(f"--lm_eval: the model cannot be put where it is read, TMPDIR: {error}") from None


def harness_model(folder, world, batch_size):
    """The harness's own model class over the exported folder, which shares its requests out over our ranks."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class OverOurRanks(HFLM):
        def all_gather(self, tensor):
            parts = [torch.empty_like(tensor) for _ in range(world.size)]
            dist.all_gather(parts, tensor)
            return torch.stack(parts)

        def gather_object(self, value, dst=0):
            parts = [None] * world.size if world.rank == dst else None
            dist.gather_object(value, parts, dst)
            return parts

        def barrier(self):
            dist.barrier()

    model = AutoModelForCausalLM.from_pretrained(folder).to(world.device)
    ours = OverOurRanks(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size)
    ours._rank, ours._world_size = world.rank, world.size
    return ours
