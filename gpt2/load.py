"""A model and its tokenizer from wherever they lie: a run, one of its checkpoints, an exported folder, or Hugging
Face's.

Weights are read tensor by tensor, when they are asked for; nothing that is read can run code.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from gpt2 import bitmask, checkpoint, hugging_face, tokenizer
from gpt2.config import Config, checked, out_of_range
from gpt2.data import describe_data
from gpt2.errors import UserError, first_line
from gpt2.files import read_json
from gpt2.metrics import is_number
from gpt2.model import GPT, GPTConfig
from gpt2.shards import find_shards, read_meta
from gpt2.tokenizer import description_in

ORIGIN = "origin.json"  # in an exported folder: of which run it is, and its tokenizer


@dataclass(frozen=True)
class Found:
    """Weights that lie in `folder`, with what is known of them.

    tensors: name -> function that reads the tensor, by the names and in the orientation of gpt2/model.py; config: of
    the run that trained them, or None; origin: step, val_loss, data and tokenizer, as far as they are known.
    """

    folder: Path
    kind: str  # checkpoint, hf or bitmask
    sizes: GPTConfig
    tensors: dict[str, Callable]
    config: Config | None = None
    origin: dict = field(default_factory=dict)

    @property
    def dtype(self):
        """In which the run computed, as parallel.compute_dtype takes it."""
        return self.config.dtype if self.config else "auto"


def find(path):
    """What lies at `path`, files checked as far as their kind allows. UserError where it is nothing that can be
    read."""
    path = Path(path)
    if (path / bitmask.FILE).exists():
        return find_bitmask(path)
    if is_hugging_face(path):
        sizes = hugging_face.sizes_of(path)
        return Found(path, "hf", sizes, hugging_face.readers(path, sizes), **known(path))
    folder, manifest = checkpoint.at(path)
    config = run_config(manifest["config"], f"{folder}/manifest.json")
    file = hugging_face.open_safetensors(folder / "model.safetensors")
    tensors, sizes = {name: partial(file.get_tensor, name) for name in file.keys()}, sizes_in(config)
    hugging_face.require_plausible(sizes, f"{folder}/manifest.json")
    return Found(folder, "checkpoint", sizes, tensors, config, facts_in(manifest))


def is_hugging_face(path):
    """Whether a config.json says so, or lies beside weights: then hugging_face.sizes_of tells what is wrong with it."""
    try:
        theirs = read_json(path / "config.json")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        theirs = None
    return isinstance(theirs, dict) and "model_type" in theirs or (path / hugging_face.WEIGHTS).exists()


def find_bitmask(path):
    try:
        file = bitmask.open_file(path)
        tensors = {name: partial(bitmask.read, file, name) for name in bitmask.names(file)}
        facts = known(path)
        sizes = read_json(path / ORIGIN)["sizes"]
        sizes = GPTConfig(**{f.name: sizes[f.name] for f in fields(GPTConfig)})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a bitmask export: {error}") from None
    hugging_face.require_plausible(sizes, path / ORIGIN)
    return Found(path, "bitmask", sizes, tensors, **facts)


def known(path):
    """What an exported folder says of its origin, as fields of Found; {} for folders of other tools."""
    try:
        origin = read_json(path / ORIGIN)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    known = isinstance(origin, dict) and [origin.get("config"), origin.get("tokenizer")]
    if not known or not all(isinstance(part, dict | None) for part in known):
        raise UserError(f"{path / ORIGIN}: is not as an export writes it: export again")
    config = origin.get("config")
    return {"config": config and run_config(config, path / ORIGIN), "origin": facts_in(origin)}


def facts_in(origin):
    """What a manifest or an origin.json says of the run, as far as it is of its kind."""
    step, val_loss = origin.get("step"), origin.get("val_loss")
    facts = {"step": step} if type(step) is int and 0 <= step < 2**53 else {}
    facts |= {"val_loss": val_loss} if is_number(val_loss) else {}
    return facts | {"data": shard_rows(origin.get("data")), "tokenizer": description_in(origin.get("tokenizer"))}


def shard_rows(data):
    """[[name, ...], ...] of training shards, as this version or earlier ones list them; [] where it is no such list."""
    rows = data.get("shards", data.get("train")) if isinstance(data, dict) else data
    rows = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else []
    return [row for row in rows if row and isinstance(row[0], str)]


def run_config(values, where):
    """The Config of a run from a manifest. UserError names the first value that this version does not know or take."""
    problems = []
    config = Config(**checked(values, f"{where}: ", problems))
    if problems := problems or [f"{where}: {line}" for line in out_of_range(config, {})]:
        raise UserError(problems[0])
    return config


def sizes_in(config):
    """The GPTConfig of a run's Config."""
    return GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)})


def build(found, device):
    """The GPT of what was found, in evaluation mode on `device`. UserError where names, shapes or bytes are not the
    model's."""
    try:
        with torch.device("meta"):
            model = GPT(found.sizes)
        model = model.to_empty(device=device)
    except RuntimeError as error:
        raise UserError(f"{found.folder}: no room for a model of its sizes: {first_line(error)}") from None
    model.lm_head.weight = model.transformer.wte.weight
    parameters = model.tensors()
    if parameters.keys() != found.tensors.keys():
        odd = sorted(parameters.keys() ^ found.tensors.keys())[:4]
        raise UserError(f"{found.folder}: holds other parameters than its config: {odd} are in one only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = read(found, name)
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"{found.folder}: {name} is {list(tensor.shape)}, its config says {list(parameter.shape)}"
                )
            parameter.copy_(tensor)
    return model.eval()


def read(found, name):
    """The tensor `name` of what was found; UserError where the file is damaged."""
    try:
        return found.tensors[name]()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{found.folder}: {name} cannot be read: {first_line(error)}") from None


def tokenizer_of(found, data_dir=None):
    """The Tokenizer of the model: as its folder says, else as the data's meta.json does. UserError where neither
    knows."""
    if found.kind == "hf" and not found.origin.get("tokenizer"):
        path = found.folder / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{found.folder}: holds no tokenizer.json, as save_pretrained of a tokenizer writes it")
        try:
            words = tokenizer.load({"tokenizer": "bpe", "tokenizer_json": path.read_text(encoding="utf-8")})
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{path}: {error}") from None
        if (highest := tokenizer.highest_in_text(words)) >= found.sizes.vocab_size:
            raise UserError(f"{path}: gives tokens up to {highest}, and the model has {found.sizes.vocab_size}")
        return words
    words = tokenizer.load(found.origin.get("tokenizer") or tokenizer_of_data(found, data_dir))
    size = found.sizes.vocab_size
    if words.name == "char" and words.vocab_size == size + 1:  # nanoGPT's characters, without end-of-text
        return replace(words, vocab_size=size, end_of_text=max(0, words.characters.find("\n")))
    if words.vocab_size > size:
        raise UserError(f"{found.folder}: its tokenizer has {words.vocab_size} tokens, the model {size}")
    return words


def tokenizer_of_data(found, data_dir=None):
    """The description of the tokenizer of a checkpoint that does not hold its own: that of its training data.

    UserError where these are not there any more, or others are in their place.
    """
    data_dir = data_dir or (found.config and found.config.data_dir)
    if described := description_in(read_meta(data_dir) if data_dir else None):
        require_trained_on(found, data_dir)
        return described
    if found.sizes.vocab_size >= 50257:  # as shards without a meta.json are
        return {"tokenizer": "gpt2"}
    raise UserError(
        f"{found.folder}: does not hold its tokenizer, and {data_dir}/meta.json, which described it, is not there; "
        "name the folder of the data that it was trained on with --data_dir"
    )


def require_trained_on(found, data_dir):
    """UserError where the training shards in data_dir are not those that the checkpoint lists, if it lists any."""
    if listed := found.origin.get("data"):
        shards = find_shards(data_dir, "train", found.config.data_format if found.config else "shards")
        there = {row[0]: row[1:] for row in listed}
        here = {row[0]: row[1:] for row in describe_data(data_dir, shards)["data"]}
        if there.keys() != here.keys() or not all(checkpoint.same_shard(there[name], here[name]) for name in there):
            raise UserError(
                f"{data_dir}: is not the data that {found.folder} was trained on, so its tokenizer may be another; "
                "name the folder of those with --data_dir"
            )


def origin_of(found, words):
    """What an export keeps of where its weights come from, as JSON; nothing of where things lay on the machine."""
    kept = {name: found.origin[name] for name in ("step", "val_loss", "data") if found.origin.get(name) is not None}
    config = asdict(found.config) if found.config else None
    if config:
        config |= {name: public(config[name]) for name in ("out_dir", "data_dir", "init_from")}
    return {"sizes": asdict(found.sizes), "tokenizer": words.describe(), "config": config, **kept}


def public(path):
    """A path as it may be published: where it lies on this machine is nobody's business."""
    if os.path.isabs(path) or ".." in Path(path).parts:
        return os.path.basename(os.path.abspath(path))
    return path


def load_run(path, device):
    """(Found, model) of anything that `find` finds, the model in evaluation mode on `device`."""
    found = find(path)
    return found, build(found, device)
