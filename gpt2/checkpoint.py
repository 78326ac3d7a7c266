"""Checkpoints that are whole or passed over, and how a run goes on from them. gpt2/writer.py writes them.

OUT_DIR/checkpoints/step-00001000/ holds model.safetensors, optimizer.safetensors and manifest.json, which names the
step, the config, the versions, size and sha256 of the other two, and its own checksum. The folder is written under
another name, synced, and renamed: what carries a step's name is complete. Nothing here is pickled.
"""

import contextlib
import errno
import hashlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gpt2.config import ARCHITECTURE, differences, same_product, setting_changes
from gpt2.errors import UserError, warn
from gpt2.files import read_json, typed, write_json
from gpt2.guard import finite
from gpt2.placement import fill
from gpt2.tokenizer import description_in

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
    """Put back what `optimizer_tensors` gave, from what `open_tensors` gives. Hyper-parameters stay as they were made.

    UserError where the states of a parameter are missing: the optimizer would start anew without a word.
    """
    found = {name: set() for name in parameters}
    for entry, source in tensors.items():
        name, _, key = entry.rpartition(".")
        if name in parameters:
            parameter, shape = parameters[name], shape_of(source)
            if shape not in ([], list(parameter.shape)):
                raise UserError(f"{entry}: {shape} in the checkpoint, {list(parameter.shape)} in the model")
            state = (
                torch.empty_like(parameter)
                if shape == list(parameter.shape)
                else torch.zeros(shape, device=parameter.device)
            )
            fill(state, source)
            optimizer.state[parameter][key] = state
            found[name].add(key)
    keeps = "betas" in optimizer.defaults  # SGD has none where it had no momentum so far
    lacking = [name for name, keys in found.items() if keys != set().union(*found.values()) or keeps and not keys]
    if lacking:
        raise UserError(f"the checkpoint lacks states of the optimizer: those of {', '.join(lacking[:4])} are missing")


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
    measured = [path for path, loss in losses.items() if isinstance(loss, float)]
    best = min(measured, key=lambda path: (losses[path], path)) if measured else None
    return [path for path in paths[:-keep] if path != best]


def set_aside(path):
    """Rename a checkpoint that cannot be used, so that its step can be written again; returns its new path."""
    names = (path.with_name(f"damaged-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


PASSING = (errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT)
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


def add_val_loss(path, val_loss):
    """Write into the manifest at `path` a loss that was measured after its checkpoint had been saved."""
    manifest = read_manifest(path) | {"val_loss": finite(val_loss)}
    if "checksum" in manifest:
        manifest["checksum"] = checksum(manifest)
    with contextlib.suppress(OSError):  # a disk that takes nothing is the log's to tell
        write_json(path / "manifest.json", manifest)


def newest(out_dir, put_aside=False):
    """(path, manifest) of the newest checkpoint that is whole, or None. Damaged ones are named and passed over.

    put_aside: also rename them, as the run that goes on will write their steps again; commands that only read do not.
    """
    for path in reversed(checkpoints(Path(out_dir) / "checkpoints")):
        try:
            return path, verify(path)
        except DAMAGED as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise UserError(f"{path}: cannot be read: {error}; the same command continues once it can") from None
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
        whole = "whole " if checkpoints(path / "checkpoints") else ""
        raise UserError(
            f"{path}: holds no {whole}checkpoint (expected the out_dir of a run, or one of its checkpoints/step-... "
            "folders)"
        )
    return found


def open_tensors(path, name):
    """name -> what reads that tensor ([...]), or rows of it ([first:last]), from a file of the checkpoint at `path`."""
    try:
        file = safe_open(path / name, "pt")
    except SafetensorError as error:
        raise UserError(f"{path / name}: {error}") from None
    except OSError as error:
        raise UserError(f"{path / name}: {error}; out_dir must be on storage that all machines see") from None
    return {key: file.get_slice(key) for key in file.keys()}


def owned(tensors, owner):
    """Those of `tensors` whose names begin with `owner`, by the rest of their names."""
    return {name.removeprefix(owner): tensor for name, tensor in tensors.items() if name.startswith(owner)}


def shape_of(source):
    """The shape, as a list, of a tensor or of what `open_tensors` gives."""
    return source.get_shape() if hasattr(source, "get_shape") else list(source.shape)


def load_model(model, tensors):
    """Copy `tensors`, or what `open_tensors` gives, into the parameters of the same names.

    UserError where names or shapes differ.
    """
    parameters = model.tensors()
    if parameters.keys() != tensors.keys():
        raise UserError(
            f"the checkpoint holds other parameters: {sorted(parameters.keys() ^ tensors.keys())[:4]} are in one only"
        )
    for name, parameter in parameters.items():
        if list(parameter.shape) != shape_of(tensors[name]):
            raise UserError(
                f"{name}: {shape_of(tensors[name])} in the checkpoint, {list(parameter.shape)} in the model"
            )
        fill(parameter, tensors[name])


def find_run(config):
    """(path, manifest) of the newest checkpoint of the run in out_dir, or None to start.

    UserError, saying what to do, where out_dir holds another run: nothing ever overwrites one. vocab_size 0, which the
    data have yet to fill in, is no difference.
    """
    out_dir, ours = Path(config.out_dir), asdict(config)
    started = out_dir / "config.json"
    if not started.exists() and not checkpoints(out_dir / "checkpoints"):
        if config.init_from == "resume":
            raise UserError(f"init_from=resume: {out_dir} holds no run; leave --init_from away to start one")
        return None
    elsewhere = elsewhere_than(out_dir)
    if config.init_from == "scratch":
        raise UserError(f"init_from=scratch: {out_dir} holds a run already; {elsewhere}")
    found = newest(out_dir, put_aside=True)
    try:
        theirs = found[1]["config"] if found else dict(read_json(started))
    except DAMAGED as error:
        raise UserError(f"{started}: {error}; {elsewhere}") from None
    ours["vocab_size"] = ours["vocab_size"] or theirs.get("vocab_size")
    if found and (changed := differences(theirs, ours, ("optimizer",))):
        raise UserError(
            f"{out_dir} holds the states of another optimizer: {changed[0]}; --init_from={typed(out_dir)} with another "
            "--out_dir starts one anew from its weights"
        )
    if changed := differences(theirs, ours, ARCHITECTURE):
        raise UserError(f"{out_dir} holds a run of another architecture: {'; '.join(changed)}; {elsewhere}")
    if (changed := setting_changes(theirs, ours)) and config.init_from != "resume":
        raise UserError(
            f"{out_dir} holds another run: {'; '.join(changed)}; {elsewhere}, or continue it so with --init_from=resume"
        )
    if found and not same_product(theirs, ours, "eval_iters"):
        warn(
            f"evaluations take {config.eval_iters * config.batch_size} windows now, before "
            f"{theirs.get('eval_iters')} x {theirs.get('batch_size')}: their losses do not compare"
        )
    if found is None and config.init_from == "resume":
        raise UserError(
            f"init_from=resume: {out_dir} holds no whole checkpoint; leave --init_from away to start over there"
        )
    if changed and found and is_finished(found[1], config):
        raise UserError(
            f"the run in {out_dir} is finished ({found[1]['step']} of {config.max_iters} steps), and can be trained on "
            f"with a larger --max_iters alone: {'; '.join(changed)}; or {elsewhere}"
        )
    if found and found[1]["step"] > config.max_iters:
        raise UserError(
            f"max_iters={config.max_iters}: the run in {out_dir} has taken {found[1]['step']} steps: give more, or "
            f"{elsewhere}"
        )
    return found


def elsewhere_than(out_dir):
    return f"choose another --out_dir, or remove {out_dir} to start anew"


def is_finished(manifest, config):
    """Whether nothing is left to do but the picture: all steps are done and the last evaluation too."""
    return manifest["step"] >= config.max_iters and manifest["val_loss"] is not None


def require_same_data(found, data, config):
    """UserError where the run was trained on other data, or with another tokenizer, than `describe_data` found.

    found: of `find_run`, None where there is nothing to compare with. What one of them does not say, as older manifests
    do not, is not compared.
    """
    if found is None:
        return
    path, manifest = found
    if changed := differences(manifest["config"], asdict(config), ["vocab_size"]):
        raise UserError(
            f"{config.data_dir}: of another vocabulary than the run in {config.out_dir}: {'; '.join(changed)}"
        )
    way_out = f"restore them, or {elsewhere_than(config.out_dir)}"
    for key, use in (("data", "trained"), ("validation", "evaluated")):
        there, here = ({row[0]: row[1:] for row in rows} for rows in (manifest.get(key, data[key]), data[key]))
        other = sorted(name for name in there.keys() | here.keys() if not same_shard(there.get(name), here.get(name)))
        if other:
            raise UserError(
                f"{config.data_dir}: not the shards that the run in {config.out_dir} was {use} on; added, removed or "
                f"changed: {', '.join(other[:4])}; {way_out}"
            )
    words = description_in(manifest.get("tokenizer")), data["tokenizer"]
    if None not in words and words[0] != words[1]:
        raise UserError(
            f"{config.data_dir}: its meta.json describes another tokenizer than {path}/manifest.json; {way_out}"
        )


def same_shard(there, here):
    """Whether [tokens, fingerprint] are one shard's; fingerprints of two kinds cannot be compared."""
    if there is None or here is None or there[0] != here[0]:
        return False
    prints = [shard[1].partition(":") for shard in (there, here) if len(shard) > 1]
    return len(prints) < 2 or prints[0][0] != prints[1][0] or prints[0] == prints[1]
