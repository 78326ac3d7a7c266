"""Checkpoints that are whole or passed over, and how a run goes on from them. gpt2/writer.py writes them.

OUT_DIR/checkpoints/step-00001000/ holds model.safetensors, optimizer.safetensors and manifest.json, which names the
step, the config, the versions, size and sha256 of the other two, and its own checksum. The folder is written under
another name, synced, and renamed: what carries a step's name is complete. Nothing here is pickled.
"""

import contextlib
import hashlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt2.config import ARCHITECTURE, MAY_CHANGE, differences
from gpt2.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors")
FORMAT = 2  # of the manifest; 1, which does not say so, has no checksum. A newer one is refused, older ones are read.


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


def checksum(manifest):
    """sha256 of what a manifest says, apart from its own checksum: a flipped digit in it is noticed too."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def checkpoints(folder):
    """The folders that carry a step's name, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def outdated(folder, keep):
    """The checkpoints that are neither among the `keep` newest nor of the lowest val_loss."""
    paths, losses = checkpoints(folder), {}
    for path in paths:
        with contextlib.suppress(*DAMAGED, NewerFormat):
            losses[path] = read_manifest(path).get("val_loss")
    measured = [path for path, loss in losses.items() if loss is not None]
    best = min(measured, key=lambda path: (losses[path], path)) if measured else None
    return [path for path in paths[:-keep] if path != best]


def set_aside(path):
    """Rename a checkpoint that cannot be used, so that its step can be written again; returns its new path."""
    names = (path.with_name(f"damaged-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading a damaged checkpoint may raise


class NewerFormat(UserError):
    """A checkpoint of a later version of this project, which is not damaged."""


def read_manifest(path):
    """The manifest of the checkpoint at `path`; one of DAMAGED where it is no such thing, or NewerFormat."""
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or not {"step", "config", "files"} <= manifest.keys():
        raise ValueError("manifest.json lacks step, config or files")
    if type(format := manifest.get("format", 1)) is int and format > FORMAT:
        raise NewerFormat(
            f"{path}: written in format {format}, this version reads up to {FORMAT}: use the newer version"
        )
    sealed = "format" in manifest or "checksum" in manifest
    if sealed and (format, manifest.get("checksum")) != (FORMAT, checksum(manifest)):
        raise ValueError("manifest.json is not as it was written (its checksum differs)")
    if not isinstance(manifest["config"], dict) or not isinstance(manifest["files"], dict):
        raise ValueError("manifest.json: config and files must be objects")
    if type(manifest["step"]) is not int or manifest["step"] < 0:
        raise ValueError(f"manifest.json: step is {manifest['step']!r:.40}")
    if re.fullmatch(r"step-\d{8,}", path.name) and path.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"manifest.json is of step {manifest['step']}")
    return manifest


def read_json(path):
    """The JSON value in `path`; one of DAMAGED where it is none, or no file of sane size."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.name}")
    if path.stat().st_size > 1 << 26:
        raise ValueError(f"{path.name} is larger than 64 MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read as JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path.name} cannot be read as JSON: nested too deep") from None


def verify(path):
    """The manifest of the checkpoint at `path`, once its files have the size and hash it gives; DAMAGED if not."""
    manifest = read_manifest(path)
    for name in sorted({*FILES, *manifest["files"]}):
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(f"manifest.json names {name!r:.80}, which is not a file of this folder")
        facts, file = manifest["files"].get(name), path / name
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ValueError(f"manifest.json says nothing of {name}")
        if not file.is_file() or file.stat().st_size != facts["bytes"] or digest(file) != facts["sha256"]:
            raise ValueError(f"{name} is not the file that was written (missing, or size or sha256 differs)")
    return manifest


def newest(out_dir, put_aside=False):
    """(path, manifest) of the newest checkpoint that is whole, or None. Damaged ones are named and passed over.

    put_aside: also rename them, as the run that goes on will write their steps again; commands that only read do not.
    """
    for path in reversed(checkpoints(Path(out_dir) / "checkpoints")):
        try:
            return path, verify(path)
        except DAMAGED as error:
            kept = ""
            if put_aside:
                with contextlib.suppress(OSError):
                    kept = f"; kept as {set_aside(path).name}"
            print(f"warning: skipping the damaged checkpoint {path}: {error}{kept}", file=sys.stderr, flush=True)
    return None


def at(path):
    """(path, manifest) of a checkpoint's folder, or of the newest one of a run's. UserError where there is none."""
    path = Path(path)
    if (path / "manifest.json").exists():
        try:
            return path, verify(path)
        except DAMAGED as error:
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


def find_run(config, data):
    """(path, manifest) of the checkpoint from which the run in out_dir goes on, or None to start.

    config: the Config, vocab_size filled in; data: the training shards as the manifest lists them. UserError, saying
    what to do, where out_dir holds a finished run or another one: nothing ever overwrites a run.
    """
    out_dir, ours = Path(config.out_dir), asdict(config)
    started = out_dir / "config.json"
    if not started.exists():
        if config.init_from == "resume":
            raise UserError(f"init_from=resume: {out_dir} holds no run; leave --init_from away to start one")
        return None
    elsewhere = f"choose another --out_dir, or remove {out_dir} to start anew"
    if config.init_from == "scratch":
        raise UserError(f"init_from=scratch: {out_dir} holds a run already; {elsewhere}")
    found = newest(out_dir, put_aside=True)
    try:
        theirs = found[1]["config"] if found else dict(read_json(started))
    except DAMAGED as error:
        raise UserError(f"{started}: {error}; {elsewhere}") from None
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
    if manifest["step"] >= config.max_iters and manifest["val_loss"] is not None:
        raise UserError(
            f"the run in {out_dir} is finished ({manifest['step']} of {config.max_iters} steps); {elsewhere}, "
            "or train on with --init_from=resume and a larger --max_iters"
        )
    if manifest["data"] != data:
        there, here = ({tuple(shard) for shard in shards} for shards in (manifest["data"], data))
        names = ", ".join(sorted({name for name, _ in there ^ here})[:4])
        raise UserError(
            f"{config.data_dir}: not the shards that the run in {out_dir} was trained on; added, removed or changed: "
            f"{names}; "
            f"restore them, or {elsewhere}"
        )
    return path, manifest
