"""Train GPT-2 and prune it while it trains.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=4 train_gpt2.py config/bitter7.py --batch_size=32
    python train_gpt2.py --help

Read it from `train` at the bottom: everything a run does happens there, in that order. The same command starts a run and
continues it: the batch, the dropout masks and the learning rate of a step depend on (seed, step) alone, so a run that was
killed and continued from a checkpoint ends where it would have ended.
"""

import math
import sys
from dataclasses import asdict, replace

import torch

from gpt2 import checkpoint, parallel, tracking
from gpt2.config import help_text, load_config
from gpt2.data import TrainingBatches, Windows, describe_data
from gpt2.errors import UserError, one_line_errors
from gpt2.evaluate import evaluate
from gpt2.faults import point
from gpt2.lock import only_run_in
from gpt2.log import Log, say_finished
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import learning_rate, make_optimizer, make_spam, set_learning_rate
from gpt2.pace import Pace
from gpt2.shards import find_shards, read_meta
from gpt2.stops import Stopped, Stops
from gpt2.writer import Writer
from pruning import NotFiniteError, Pruner
from pruning.allocation import ALLOCATIONS
from pruning.criteria import CRITERIA
from pruning.optim import OPTIMIZERS
from pruning.schedule import SCHEDULES


def open_data(config, found):
    """The config with the vocabulary filled in (the data's, or else the run's), and the windows of training and validation."""
    of_data = read_meta(config.data_dir).get("vocab_size", 0)
    if 0 < config.vocab_size < of_data:
        raise UserError(
            f"vocab_size={config.vocab_size} is smaller than the {of_data} of the tokenizer of {config.data_dir}; "
            "leave it away"
        )
    config = replace(
        config, vocab_size=config.vocab_size or of_data or (found[1]["config"]["vocab_size"] if found else 50257)
    )
    splits = (find_shards(config.data_dir, split, config.data_format) for split in ("train", "val"))
    return config, *(Windows(shards, config.block_size, config.vocab_size) for shards in splits)


def make_model(config):
    """A GPT initialised from the seed, or with the weights that init_from names."""
    torch.manual_seed(config.seed)
    model = GPT(
        GPTConfig(
            config.block_size,
            config.vocab_size,
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.dropout,
            config.bias,
        )
    )
    if config.init_from == "gpt2":
        try:
            checkpoint.load_model(model, GPT.from_hugging_face("gpt2").tensors())
        except (ImportError, OSError) as error:
            raise UserError(
                f"init_from=gpt2: Hugging Face's weights are not at hand: {str(error).splitlines()[0]}"
            ) from None
    elif config.init_from not in ("auto", "scratch", "resume"):
        path, _ = checkpoint.at(config.init_from)
        checkpoint.load_model(model, checkpoint.load_tensors(path, "model.safetensors"))
    return model


def make_pruner(model, optimizer, config):
    """The Pruner that the config asks for, or None."""
    if config.criterion == "none":
        return None
    return Pruner(
        model,
        optimizer,
        config.criterion,
        config.target_sparsity,
        config.schedule,
        config.prune_begin,
        config.prune_end,
        config.prune_interval,
        allocation=config.allocation,
    )


def dropout_seed(config, step, number):
    """A seed for each micro-batch of the run, wherever it is computed."""
    return (config.seed * 1_000_003 + step * config.gradient_accumulation_steps + number) % 2**63


def save(writer, config, step, val_loss, model, optimizer, spam, pruner, data):
    """Have the checkpoint of `step` written; every rank takes part."""
    parameters, state = model.tensors(), pruner.state_dict() if pruner else {"buffers": {}}
    states = checkpoint.optimizer_tensors(optimizer, parameters)
    states |= {f"pruner.{name}": tensor for name, tensor in state.pop("buffers").items()}
    states |= {f"spam.{name}": tensor for name, tensor in spam.state_dict().items()} if spam else {}
    files = {"model.safetensors": parameters, "optimizer.safetensors": states}
    writer.save(step, files, config=asdict(config), **data, val_loss=val_loss, pruner=state)


def restore(path, manifest, model, optimizer, spam, pruner):
    """Load what `save` wrote at `path`; returns its step."""
    checkpoint.load_model(model, checkpoint.load_tensors(path, "model.safetensors"))
    tensors = checkpoint.load_tensors(path, "optimizer.safetensors")
    checkpoint.load_optimizer(optimizer, model.tensors(), tensors)
    of = lambda owner: {key.removeprefix(owner): t for key, t in tensors.items() if key.startswith(owner)}
    if spam:
        spam.load_state_dict(of("spam."))
    if pruner:
        pruner.load_state_dict(manifest["pruner"] | {"buffers": of("pruner.")})
    return manifest["step"]


def train(config, change=None):
    """A run from start to end. change: what an experiment does to (model, optimizer, pruner); returns the pruner to use."""
    stops, writer = Stops(config.max_hours, config.checkpoint_minutes), Writer(config.out_dir, config.keep_checkpoints)
    with only_run_in(config.out_dir), stops, writer:
        run(config, change, stops, writer)


def run(config, change, stops, writer):
    # The world, the data, and the run that out_dir may hold.
    world = parallel.start(config.device)
    stops.join(world)
    found = parallel.on_main(world, checkpoint.find_run, config)
    if found and checkpoint.is_finished(found[1], config):
        return say_finished(config, found[1]["step"]) if world.is_main else None
    config, training, validation = parallel.agree(world, open_data, config, found)
    data = parallel.on_main(world, describe_data, config.data_dir, training.shards)
    parallel.on_main(world, checkpoint.require_same_data, found, data, config)
    if config.wandb_log:
        parallel.on_main(world, tracking.check)
    dtype = parallel.compute_dtype(config.dtype, world.device)

    # The model, its optimizer, its pruner. `model` owns the parameters, `fast` is how it is run.
    model = parallel.agree(world, make_model, config).to(world.device)
    optimizer = make_optimizer(model, config)
    spam = make_spam(optimizer, config)
    pruner = make_pruner(model, optimizer, config)
    pruner = change(model, optimizer, pruner) if change else pruner
    start = restore(*found, model, optimizer, spam, pruner) if found else 0
    compiling = parallel.should_compile(config.compile, world.device, config.vocab_size)
    compiled = torch.compile(model) if compiling else model
    fast = parallel.data_parallel(compiled, world)

    log = Log(config, world, start)
    parallel.on_main(world, log.open)
    log.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.tokens_per_step:,} tokens a step, {len(training):,} windows "
        f"an epoch, {world.size} x {world.device.type} in {str(dtype)[6:]}{', compiled' if compiling else ''}"
        + (f", continued from {found[0]}" if found else "")
    )

    # Each step: gradients of the micro-batches, mask, clip, optimizer, prune.
    micro_steps = config.gradient_accumulation_steps // world.size
    batches = TrainingBatches(training, config, world).from_step(start + 1)
    loss_sum = torch.zeros((), device=world.device)
    checked = stops.checked if world.size == 1 else iter  # ranks may have evaluations of different lengths
    measure = lambda: evaluate(compiled, validation, config, world, dtype, checked)
    done = start
    if found and found[1]["val_loss"] is None and (start % config.eval_interval == 0 or start == config.max_iters):
        val_loss = measure()  # the run was stopped in this evaluation
        log.write(start, dict(val_loss=val_loss))
    pace = Pace(world.device)
    for step in range(start + 1, config.max_iters + 1):
        set_learning_rate(optimizer, step, config)
        loss_sum.zero_()
        try:
            for micro_step in stops.checked(range(micro_steps)):
                number, inputs, targets = next(batches)
                if config.dropout:
                    torch.manual_seed(dropout_seed(config, step, number))
                with parallel.averaging(fast, on=micro_step == micro_steps - 1):
                    with parallel.autocast(world.device, dtype):
                        _, loss = fast(inputs, targets, False)  # the loss alone, without its logits
                    (loss / micro_steps).backward()
                loss_sum += loss.detach()
        except Stopped:
            break  # the step under way is left undone: it has changed no weight
        if pruner:
            with pace.pruning:
                pruner.mask_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        if spam:
            spam.before_step(grad_norm)
        optimizer.step()
        point("in_update")
        optimizer.zero_grad(set_to_none=True)
        if pruner:
            with pace.pruning:
                pruner.step()
        done = step
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
        train_loss = parallel.all_reduce_sum(loss_sum).item() / config.gradient_accumulation_steps
        if not math.isfinite(train_loss) or not math.isfinite(grad_norm):
            raise UserError(
                f"step {step}: the loss is {train_loss}, the gradient's norm {grad_norm:.3g}; checkpoints up to here are whole: "
                "lower --learning_rate, or start from one of them with --init_from=FOLDER --out_dir=ANOTHER"
            )
        speed = pace.read(config.tokens_per_step, model.flops_per_token(), world)
        val_loss = measure() if evaluating else None
        log.write(
            step,
            dict(
                train_loss=train_loss,
                val_loss=val_loss,
                learning_rate=learning_rate(step, config),
                grad_norm=grad_norm.item(),
                sparsity=pruner.sparsity if pruner else None,
                tokens=step * config.tokens_per_step,
                **speed,
            ),
        )
        if saving:
            save(writer, config, step, val_loss, model, optimizer, spam, pruner, data)
            stops.saved()
        pace.restart()
        if stops.asked:
            break

    if stops.asked:
        if done not in (start, writer.step):
            save(writer, config, done, None, model, optimizer, spam, pruner, data)
        writer.finish()
        log.close()
        return log.say(stops.message(done, start, config.max_iters))
    writer.finish()
    log.finish()


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return print(help_text())
    with one_line_errors(
        "train_gpt2.py", NotFiniteError, interrupted="interrupted; the same command continues from the last checkpoint"
    ):
        names = {
            "optimizer": OPTIMIZERS,
            "criterion": ("none", *CRITERIA),
            "schedule": tuple(SCHEDULES),
            "allocation": tuple(ALLOCATIONS),
        }
        train(load_config(arguments, names))
        parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
