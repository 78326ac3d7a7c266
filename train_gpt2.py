"""Train GPT-2 and prune it while it trains.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=4 train_gpt2.py config/bitter7.py --batch_size=32
    python train_gpt2.py --help

Read it from `run`: everything a run does happens there, in that order. The same command starts a run and
continues it: the batch, the dropout masks and the learning rate of a step depend on (seed, step) alone, so a run
that was killed and continued from a checkpoint ends where it would have ended.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import math
import sys
from dataclasses import replace

import torch

from gpt2 import checkpoint, initial, parallel, silent, tracking
from gpt2.config import help_text, load_config
from gpt2.data import TrainingBatches, Windows, describe_data
from gpt2.errors import Heedless, exit_at_once, one_line_errors
from gpt2.evaluate import evaluate
from gpt2.explain import machine_errors
from gpt2.faults import point
from gpt2.guard import Guard, weight_of
from gpt2.load import sizes_in
from gpt2.lock import OnlyRunIn
from gpt2.log import Log, say_finished
from gpt2.model import GPT
from gpt2.optimizer import learning_rate, make_optimizer, make_spam, set_learning_rate
from gpt2.pace import Pace
from gpt2.placement import averaging, place
from gpt2.pruner import continue_pruner, description, make_pruner, sparsities
from gpt2.restarts import count_restart
from gpt2.shards import find_shards, read_meta
from gpt2.state import restore, save
from gpt2.stops import Stopped, Stops
from gpt2.writer import Writer
from pruning import DensityLR, NotFiniteError
from pruning.allocation import ALLOCATIONS
from pruning.criteria import CRITERIA
from pruning.optim import OPTIMIZERS
from pruning.ranks import full
from pruning.schedule import SCHEDULES


def open_data(config, found):
    """The config with the vocabulary filled in (the data's, or else the run's), and the windows of training and
    validation."""
    of_data = read_meta(config.data_dir).get("vocab_size", 0)
    initial.require_room(config, of_data)
    config = replace(
        config, vocab_size=config.vocab_size or of_data or (found[1]["config"]["vocab_size"] if found else 50257)
    )
    splits = (find_shards(config.data_dir, split, config.data_format) for split in ("train", "val"))
    return config, *(Windows(shards, config.block_size, config.vocab_size) for shards in splits)


def make_model(config):
    """A GPT without memory yet: `placement.place` gives it its initial weights."""
    with torch.device("meta"):
        return GPT(sizes_in(config))


def dropout_seed(config, step, number):
    """A seed for each micro-batch of the run, wherever it is computed."""
    return (config.seed * 1_000_003 + step * config.gradient_accumulation_steps + number) % 2**63


def train(config, change=None):
    """A run from start to end.

    change: what an experiment does to (model, optimizer, pruner); returns the pruner to use.
    """
    lock, stops = OnlyRunIn(config.out_dir), Stops(config.max_hours, config.checkpoint_minutes)
    writer = Writer(config.out_dir, config.keep_checkpoints, lock.hold_again)
    with lock, stops, writer:
        run(config, change, stops, writer)


def run(config, change, stops, writer):
    # The world, the data, and the run that out_dir may hold.
    alone, timeout = config.parallel == "fsdp", config.dist_timeout_s
    world = parallel.start(config.device, alone, config.deterministic, timeout + 60)
    stops.join(world, timeout)
    found = parallel.on_main(world, checkpoint.find_run, config)
    if found and checkpoint.is_finished(found[1], config):
        return say_finished(config, found[1]["step"]) if world.is_main else None
    config, training, validation = parallel.agree(world, open_data, config, found)
    data = parallel.on_main(world, describe_data, config.data_dir, training.shards, validation.shards)
    parallel.on_main(world, checkpoint.require_same_data, found, data, config)
    if config.wandb_log:
        parallel.on_main(world, tracking.check)
    dtype = parallel.compute_dtype(config.dtype, world.device)

    # `model` owns the parameters, `compiled` is how it evaluates, `fast` how it trains.
    model = make_model(config)
    compiling = parallel.should_compile(config.compile, world.device)
    compiled, fast = place(model, config, world, dtype, compiling)
    exact = config.deterministic or world.device.type == "cpu" and not compiling  # the same gradients, to the bit
    optimizer = make_optimizer(model, config)
    spam = make_spam(optimizer, config)
    guard = Guard(optimizer, config.skip_outliers, config.max_bad_steps, world.device)
    pieces = model, optimizer, spam, guard
    load = lambda: restore(*found, *pieces) if found else initial.load_into(model, config, data["tokenizer"])
    start = parallel.agree(world, load)
    data["tokenizer"] = data["tokenizer"] or parallel.on_main(world, initial.tokenizer_so_far, config, found)
    pruner = make_pruner(model, optimizer, config)
    pruner = change(model, optimizer, pruner) if change else pruner
    pruner = continue_pruner(pruner, model, optimizer, config, *found) if found else pruner
    if pruner and config.density_lr > 1:
        DensityLR(pruner, optimizer, config.density_lr)
    parallel.on_main(world, count_restart, config.out_dir, start)

    log = Log(config, world, start)
    parallel.on_main(world, log.open)
    log.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.tokens_per_step:,} tokens a step, "
        f"{len(training):,} windows an epoch, {world.size} x {world.device.type} in {str(dtype)[6:]}"
        + (", compiled" if compiling else "")
        + (f", continued from {found[0]}" if found else "")
        + description(pruner)
    )

    # Each step: gradients of the micro-batches, mask, clip, optimizer, prune.
    micro_steps = config.gradient_accumulation_steps // world.size
    batches = TrainingBatches(training, config, world).from_step(start + 1)
    loss_sum = torch.zeros((), device=world.device)

    def loss_of(step, number, inputs, targets):
        if config.dropout:
            torch.manual_seed(dropout_seed(config, step, number))
        with parallel.autocast(world.device, dtype):
            return fast(inputs, targets, False)[1]  # the loss alone, without its logits

    measure = lambda: evaluate(compiled, validation, config, world, dtype, stops.checked)
    done = start
    if found and found[1]["val_loss"] is None and (start % config.eval_interval == 0 or start == config.max_iters):
        val_loss = measure()  # the run was stopped in this evaluation
        parallel.on_main(world, checkpoint.add_val_loss, found[0], val_loss)
        log.write(start, dict(val_loss=val_loss))
    pace = Pace(world.device)
    for step in range(start + 1, config.max_iters + 1):
        set_learning_rate(optimizer, step, config)
        loss_sum.zero_()
        try:
            for micro_step in stops.checked(range(micro_steps)):
                number, inputs, targets = next(batches)
                with averaging(fast, on=micro_step == micro_steps - 1):
                    loss = loss_of(step, number, inputs, targets)
                    loss_sum += loss.detach()
                    loss.backward(weight_of(loss_sum, micro_steps))
        except Stopped:
            break  # the step under way is left undone: it has changed no weight
        if pruner:
            with pace.pruning:
                pruner.mask_gradients()
        grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
        guard.step(grad_norm, spam)
        point("in_update")
        optimizer.zero_grad(set_to_none=True)
        if pruner:
            with pace.pruning:
                pruner.step(step)
        done, val_loss = step, None
        if config.check_interval and step % config.check_interval == 0:
            batch = step, number, inputs, targets
            silent.check(max(start, step - config.check_interval), model, fast, loss_of, batch, exact, grad_norm)
        log.advance()

        # Look, now and then: only here does the host wait for the device.
        last = step == config.max_iters
        logging, saving = step % config.log_interval == 0 or last, step % config.checkpoint_interval == 0 or last
        saving |= stops.save_due
        evaluating = step % config.eval_interval == 0 or last
        looking = logging or saving or evaluating
        pace.step(looking)
        if not looking:
            continue
        train_loss = parallel.all_reduce_sum(loss_sum) / config.gradient_accumulation_steps
        train_loss, grad_norm, skipped, wrong = guard.read(step, train_loss, grad_norm)
        speed = pace.read(config.tokens_per_step, model.flops_per_token(), world)
        val_loss = measure() if evaluating else None
        log.write(
            step,
            dict(
                train_loss=train_loss,
                val_loss=val_loss,
                learning_rate=learning_rate(step, config),
                grad_norm=grad_norm,
                skipped_steps=skipped or None,
                tokens=step * config.tokens_per_step,
                **sparsities(pruner, by_layer=evaluating),
                **speed,
            ),
        )
        if saving and (last or not wrong):
            save(writer, config, step, val_loss, data, *pieces, pruner)
            stops.saved()
        pace.restart()
        if stops.asked:
            break

    stops.rest()
    if stops.asked:
        if done not in (start, writer.step):
            save(writer, config, done, val_loss, data, *pieces, pruner)
        writer.finish()
        log.close()
        return log.say(stops.message(done, start, config.max_iters))
    writer.finish()
    log.finish()


def main(arguments):
    sys.stdout, sys.stderr = Heedless(sys.stdout), Heedless(sys.stderr)
    with one_line_errors(
        "train_gpt2.py", NotFiniteError, interrupted="interrupted; the same command continues from the last checkpoint"
    ):
        if "--help" in arguments or "-h" in arguments:
            return print(help_text(), flush=True)
        names = {
            "optimizer": OPTIMIZERS,
            "criterion": ("none", *CRITERIA),
            "schedule": tuple(SCHEDULES),
            "allocation": tuple(ALLOCATIONS),
        }
        config = load_config(arguments, names, initial.sizes)
        with machine_errors(config):
            train(config)
        parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
    exit_at_once(0)  # a signal finds nothing that it could break off
