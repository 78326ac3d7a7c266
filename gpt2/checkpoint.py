"""Checkpoints that are whole or not there, and the rules by which a run goes on from them.

OUT_DIR/checkpoints/step-00001000/ holds model.safetensors, optimizer.safetensors and manifest.json, which names the step,
the config, the versions, and size and sha256 of the other two. The folder is written under another name, synced, and
renamed: what carries a step's name is complete. Nothing here is pickled.
"""

import hashlib
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt2.config import ARCHITECTURE, MAY_CHANGE, differences
from gpt2.errors import UserError
from gpt2.files import sync, write_json
from gpt2.parallel import from_main

FILES = ("model.safetensors", "optimizer.safetensors")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer, parameters):
    """The optimizer's state as a flat dict, "PARAMETER.STATE" -> tensor; parameters: name -> parameter."""
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer, parameters, tensors):
    """Put back what `optimizer_tensors` gave. Hyper-parameters stay as the optimizer was made."""
    for entry, tensor in tensors.items():
        name, key = entry.rsplit(".", 1)
        if name in parameters:
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)


def save(out_dir, step, model, optimizer, keep, **facts):
    """Write the checkpoint of `step`, then delete those beyond the `keep` newest and the one of lowest val_loss.

    model, optimizer: name -> tensor; facts: what else the manifest holds (config, val_loss, ...), as JSON.
    """
    folder = Path(out_dir) / "checkpoints"
    final, beside = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    beside.mkdir(parents=True)
    for name, tensors in zip(FILES, (model, optimizer)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / name)
        sync(beside / name)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": digest(beside / name)} for name in FILES}
    write_json(beside / "manifest.json", {"step": step, **facts, "versions": versions, "files": files})
    if final.exists():  # damaged, or the run would have continued from it
        shutil.rmtree(final)
    beside.rename(final)
    sync(folder)
    for path in outdated(folder, keep):
        shutil.rmtree(path)


def outdated(folder, keep):
    """The checkpoints that are neither among the `keep` newest nor of the lowest val_loss."""
    paths = sorted(folder.glob("step-*"))
    losses = {path: read_manifest(path).get("val_loss") for path in paths if (path / "manifest.json").exists()}
    measured = [path for path, loss in losses.items() if loss is not None]
    best = min(measured, key=lambda path: (losses[path], path)) if measured else None
    return [path for path in paths[:-keep] if path != best]


def read_manifest(path):
    """The manifest of the checkpoint at `path`; ValueError where it is no such thing."""
    manifest = json.loads((path / "manifest.json").read_text())
    if not isinstance(manifest, dict) or not {"step", "config", "files"} <= manifest.keys():
        raise ValueError("manifest.json lacks step, config or files")
    return manifest


def verify(path):
    """The manifest of the checkpoint at `path`, once its files have the size and hash it gives; ValueError or OSError if not."""
    manifest = read_manifest(path)
    for name in FILES:
        file, facts = path / name, manifest["files"][name]
        if file.stat().st_size != facts["bytes"] or digest(file) != facts["sha256"]:
            raise ValueError(f"{name} is not the file that was written (size or sha256 differs)")
    return manifest


def newest(out_dir):
    """(path, manifest) of the newest checkpoint that is whole, or None. Damaged ones are named on stderr and passed over."""
    for path in sorted((Path(out_dir) / "checkpoints").glob("step-*"), reverse=True):
        try:
            return path, verify(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"warning: skipping the damaged checkpoint {path}: {error}", file=sys.stderr, flush=True)
    return None


def at(path):
    """(path, manifest) of a checkpoint's folder, or of the newest one of a run's. UserError where there is none."""
    path = Path(path)
    if (path / "manifest.json").exists():
        try:
            return path, verify(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged checkpoint: {error}") from None
    found = newest(path)
    if found is None:
        raise UserError(
            f"{path}: holds no checkpoint (expected the out_dir of a run, or one of its checkpoints/step-... folders)"
        )
    return found


def load_tensors(path, name):
    """name -> tensor of a safetensors file in the checkpoint at `path`."""
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise UserError(f"{path / name}: {error}") from None


def load_model(model, tensors):
    """Copy `tensors` into the parameters of the same names; UserError where names or shapes differ."""
    parameters = model.tensors()
    if parameters.keys() != tensors.keys():
        raise UserError(
            f"the checkpoint holds other parameters: {sorted(parameters.keys() ^ tensors.keys())[:4]} are in one only"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"{name}: {list(tensors[name].shape)} in the checkpoint, {list(parameter.shape)} in the model"
                )
            parameter.copy_(tensors[name])


def find_run(config, data, world):
    """(path, manifest) of the checkpoint from which the run in out_dir goes on, or None to start. The main rank decides.

    config: the Config, vocab_size filled in; data: the training shards as the manifest lists them. UserError, saying
    what to do, where out_dir holds a finished run or another one: nothing ever overwrites a run.
    """
    found = find_on_main(config, data) if world.is_main else None
    step = from_main(found[1]["step"] if found else -1, world)
    if step < 0:
        return None
    path = Path(config.out_dir) / "checkpoints" / f"step-{step:08d}"
    return path, read_manifest(path)


def find_on_main(config, data):
    out_dir, ours = Path(config.out_dir), asdict(config)
    started = out_dir / "config.json"
    if not started.exists():
        if config.init_from == "resume":
            raise UserError(f"init_from=resume: {out_dir} holds no run; leave --init_from away to start one")
        return None
    elsewhere = f"choose another --out_dir, or remove {out_dir} to start anew"
    if config.init_from == "scratch":
        raise UserError(f"init_from=scratch: {out_dir} holds a run already; {elsewhere}")
    found = newest(out_dir)
    try:
        theirs = found[1]["config"] if found else json.loads(started.read_text())
    except ValueError as error:
        raise UserError(f"{started}: cannot be read as JSON: {error}; {elsewhere}") from None
    if changed := differences(theirs, ours, ARCHITECTURE):
        raise UserError(f"{out_dir} holds a run of another architecture: {'; '.join(changed)}; {elsewhere}")
    changed = differences(theirs, ours, [name for name in ours if name not in MAY_CHANGE])
    if changed and config.init_from != "resume":
        raise UserError(
            f"{out_dir} holds another run: {'; '.join(changed)}; {elsewhere}, or continue it so with --init_from=resume"
        )
    if found is None:
        if config.init_from == "resume":
            raise UserError(
                f"init_from=resume: {out_dir} holds no whole checkpoint; leave --init_from away to start over there"
            )
        return None
    path, manifest = found
    if manifest["step"] >= config.max_iters:
        raise UserError(
            f"the run in {out_dir} is finished ({manifest['step']} of {config.max_iters} steps); {elsewhere}, "
            "or train on with --init_from=resume and a larger --max_iters"
        )
    if manifest["data"] != data:
        there, here = ({tuple(shard) for shard in shards} for shards in (manifest["data"], data))
        names = ", ".join(sorted({name for name, _ in there ^ here})[:4])
        raise UserError(
            f"{config.data_dir}: not the shards that the run in {out_dir} was trained on; added, removed or changed: {names}; "
            f"restore them, or {elsewhere}"
        )
    return path, manifest
