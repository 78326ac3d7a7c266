"""Loss, perplexity, bits per byte, HellaSwag and other tasks of a model: python -m gpt2.evaluate OUT_DIR

OUT_DIR is a run (its newest checkpoint), one checkpoint, an exported folder or a Hugging Face GPT-2 folder. What was
measured is printed and kept in evaluation.json beside the weights, where parts measured before stay. Runs under
torchrun too.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

import torch

from gpt2 import hellaswag, load, parallel, perplexity, tokenizer
from gpt2.data import evaluation_batches
from gpt2.errors import Parser, UserError, one_line_errors, positive
from gpt2.faults import point
from gpt2.files import write_json
from gpt2.hf_tokenizer import token_bytes
from gpt2.metrics import EVALUATION, read_evaluation
from gpt2.progress import progress
from gpt2.shards import find_shards, read_meta
from gpt2.stops import Stopped
from gpt2.tokenizer import description_in, same_tokens


@torch.no_grad()
def evaluate(model, windows, config, world, dtype, checked=iter):
    """Mean loss (nats a token) over the evaluation's fixed batches, shared out over the ranks. Draws nothing random.

    checked: Stops.checked, which goes through the batches and may stop in between; then there is no loss, but None.
    """
    model.eval()
    total = torch.zeros(2, device=world.device)
    try:
        for inputs, targets, sequences in checked(evaluation_batches(windows, config, world)):
            point("in_evaluation")
            with parallel.autocast(world.device, dtype):
                _, loss = model(inputs, targets, False)
            if sequences:
                total += torch.stack([loss.float(), torch.ones_like(total[1])]) * sequences
    except Stopped:
        return None
    finally:
        model.train()
    loss, sequences = parallel.all_reduce_sum(total).tolist()
    return loss / sequences


def measure_validation(args, found, model, world, dtype):
    """{"validation": ...} of the validation shards, or {"strided": ...} with --stride."""
    data_dir, sizes = args.data_dir or found.config.data_dir, found.sizes
    data_format = args.data_format or (found.config.data_format if found.config else "shards")
    try:
        shards = find_shards(data_dir, "val", data_format)
    except UserError as error:
        elsewhere = "" if args.data_dir else "; where the data lie elsewhere now, name their folder with --data_dir"
        raise UserError(f"{error}{elsewhere}") from None
    stride = args.stride or sizes.block_size
    if not 1 <= stride <= sizes.block_size:
        raise UserError(f"--stride {stride}: expected 1 to the model's context of {sizes.block_size} tokens")
    windows, numbers = perplexity.chosen(shards, sizes.block_size, stride, sizes.vocab_size, args.tokens)
    with progress(len(numbers), "window", shown=world.is_main, leave=False) as bar:
        facts = perplexity.measure(
            model,
            windows,
            numbers,
            bytes_of_data(found, data_dir),
            world,
            dtype,
            lambda rows: bar.update(rows * world.size),
        )
    return {"strided" if args.stride else "validation": facts | {"data_dir": load.public(data_dir)}}


def bytes_of_data(found, data_dir):
    """Bytes of each token of the data, or None where neither data nor model say which tokenizer made them. UserError
    where they differ."""
    ours, theirs = description_in(read_meta(data_dir)), description_in(found.origin.get("tokenizer"))
    if theirs is None and found.origin.get("data") and data_dir == found.config.data_dir:
        load.require_trained_on(found, data_dir)  # an older checkpoint, which does not hold its tokenizer
    if None not in (ours, theirs) and ours != theirs:
        raise UserError(
            f"{data_dir}: was prepared with the tokenizer {ours['tokenizer']}, the model's is {theirs['tokenizer']}"
            + (", of other tokens" if ours["tokenizer"] == theirs["tokenizer"] else "")
            + "; give data prepared as the run's with --data_dir"
        )
    try:
        words = load.tokenizer_of(found, data_dir)
        unlike = found.kind == "hf" and ours and theirs is None and not same_tokens(tokenizer.load(ours), words)
    except UserError:
        return None
    if unlike:
        raise UserError(
            f"{data_dir}: was prepared with the tokenizer {ours['tokenizer']}, and {found.folder}/tokenizer.json gives "
            "other tokens; give data prepared with that file with --data_dir"
        )
    return token_bytes(words)


def measure_hellaswag(args, found, model, world, dtype):
    items, words = hellaswag.read_items(args.hellaswag), load.tokenizer_of(found, args.data_dir)
    with progress(len(items), "item", shown=world.is_main, leave=False) as bar:
        facts = hellaswag.evaluate(items, words, model, world, dtype, lambda items: bar.update(items * world.size))
    return {"hellaswag": facts | {"source": load.public(args.hellaswag)}}


def measure_tasks(args, found, model, world, dtype):
    from gpt2.harness import run_tasks

    tasks = run_tasks(args.lm_eval, found, load.tokenizer_of(found, args.data_dir), world)
    return {"lm_eval": {task: numbers | {"dtype": "float32"} for task, numbers in tasks.items()}}


def measures_of(args, found):
    """What the command is to measure. Without data, HellaSwag and tasks alone. UserError where nothing is left."""
    data_dir = args.data_dir or (found.config.data_dir if found.config else None)
    measures = [
        measure for measure, wanted in ((measure_hellaswag, args.hellaswag), (measure_tasks, args.lm_eval)) if wanted
    ]
    if measures:
        load.tokenizer_of(found, args.data_dir)  # one that is not there is said before anything is measured
    if args.data_dir or args.tokens or args.stride or not measures or (data_dir and Path(data_dir).is_dir()):
        if data_dir is None:
            raise UserError(
                f"{args.source}: does not say on which data it was trained: give a folder of shards with --data_dir"
            )
        measures.insert(0, measure_validation)
    return measures


def keep(folder, results, step, facts):
    """Write evaluation.json into `folder`; parts that were not measured this time stay as they were.

    facts: what each part, or task, is to say of how it was measured, where it does not itself.
    """
    path = folder / EVALUATION
    results = {
        part: {task: facts | numbers for task, numbers in found.items()} if part == "lm_eval" else facts | found
        for part, found in results.items()
    }
    try:
        write_json(path, read_evaluation(folder) | {"step": step} | results)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    return path


def text_of(results):
    """The results as lines: number ± standard error."""
    lines = []
    for part, facts in results.items():
        for task, numbers in facts.items() if part == "lm_eval" else [(part, facts)]:
            words = [
                f"{name} {number(value, numbers.get(f'{name}_stderr'))}"
                for name, value in numbers.items()
                if shown(name, value)
            ]
            lines.append(f"{task}: " + "  ".join(words))
    return "\n".join(lines)


def shown(name, value):
    return not name.endswith("_stderr") and isinstance(value, (int, float))


def number(value, error):
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return text + (f" ± {error:.4f}" if isinstance(error, float) else "")


def make_parser():
    parser = Parser(prog="python -m gpt2.evaluate", description=__doc__.partition(":")[0])
    parser.add_argument(
        "source", metavar="OUT_DIR", help="a run, a checkpoint, an exported folder, or a Hugging Face GPT-2 folder"
    )
    parser.add_argument("--data_dir", help="folder of the token shards (default: the run's)")
    parser.add_argument("--data_format", choices=("shards", "raw"), help="as in training (default: the run's)")
    parser.add_argument(
        "--tokens", type=positive, help="predict about this many tokens only (default: all of the validation shards)"
    )
    parser.add_argument(
        "--stride",
        type=positive,
        help="move the window by this many tokens, fewer than the context: more context a token",
    )
    parser.add_argument(
        "--hellaswag", nargs="?", const=hellaswag.DATASET, metavar="FILE",
        help="score HellaSwag: a jsonl file, or a dataset's name or folder (default: " + hellaswag.DATASET + ")",
    )  # fmt: skip
    parser.add_argument(
        "--lm_eval", metavar="TASKS", help="tasks of lm-evaluation-harness, or YAML files of one's own, by commas"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="of the computation (default: the run's, or auto)"
    )
    return parser


def main(arguments):
    parser = make_parser()
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        world = parallel.start(args.device)
        found = parallel.agree(world, load.find, args.source)
        measures, model = measures_of(args, found), load.build(found, world.device)
        dtype = parallel.compute_dtype(args.dtype or found.dtype, world.device)
        facts = {"device": world.device.type, "dtype": str(dtype)[6:], "torch": torch.__version__}
        for measure in measures:
            results = measure(args, found, model, world, dtype)
            if world.is_main:  # each at once, as the next one may fail
                print(text_of(results), flush=True)
                path = keep(found.folder, results, found.origin.get("step"), facts)
        if world.is_main:
            print(f"kept in {path}")
        parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
