"""GPT-2 as Hugging Face's transformers lay it out: names, orientation and config, read and written without
transformers.

Differences to our own layout: the weights of c_attn, c_proj and c_fc are kept as [in, out] there (their Conv1D) and as
[out, in] here; biases are always there, zero where our model has none; files of the hub may leave out the prefix
"transformer.".
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gpt2.errors import UserError, first_line
from gpt2.files import read_json
from gpt2.model import GPT, GPTConfig

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Beyond these a config.json is damaged, and the attempt to make such a model would take all the memory or all day.
LARGEST = {"n_layer": 1000, "n_head": 2**14, "n_embd": 2**20, "block_size": 2**24, "vocab_size": 2**24}

# What GPT-2 takes for granted: a config.json that says otherwise describes a model that gpt2/model.py does not compute.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def sizes_of(folder):
    """The GPTConfig of the config.json in `folder`. UserError where it is of another architecture."""
    path = Path(folder) / "config.json"
    try:
        theirs = read_json(path)
        kind = theirs.get("model_type") if isinstance(theirs, dict) else None
        if kind != "gpt2":
            raise UserError(f"{path}: model_type is {kind!r}, expected 'gpt2': only GPT-2 models are read")
        sizes = GPTConfig(
            **{name: theirs[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
            block_size=theirs.get("n_positions") or theirs["n_ctx"],
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}, which a GPT-2 config has") from None
    require_plausible(sizes, path)
    for name, values in FIXED.items():
        if theirs.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {theirs[name]}, and only {values[0]} is supported")
    if theirs.get("n_inner") not in (None, 4 * sizes.n_embd):
        raise UserError(f"{path}: n_inner is {theirs['n_inner']}, and only {4 * sizes.n_embd} is supported")
    return sizes


def require_plausible(sizes, where):
    """UserError where these are not the sizes of a GPT."""
    for name in LARGEST:
        if type(value := getattr(sizes, name)) is not int or not 1 <= value <= LARGEST[name]:
            raise UserError(f"{where}: {name} is {value!r:.40}, expected a whole number from 1 to {LARGEST[name]:,}")
    if type(sizes.bias) is not bool or type(sizes.dropout) not in (int, float) or not 0 <= sizes.dropout < 1:
        raise UserError(f"{where}: expected bias to be true or false, and 0 <= dropout < 1")
    if sizes.n_embd % sizes.n_head:
        raise UserError(f"{where}: n_embd={sizes.n_embd} is not divisible by n_head={sizes.n_head}")


def readers(folder, sizes):
    """name -> function that reads the tensor, by our names and orientation, from the safetensors files of `folder`.

    UserError where a file cannot be read or a parameter is missing. Nothing is read before a function is called.
    """
    folder = Path(folder)
    found = {}
    for path in weight_files(folder):
        file = open_safetensors(path)
        for name in file.keys():
            found["transformer." + name.removeprefix("transformer.")] = (file, name)
    with torch.device("meta"):
        ours = GPT(sizes).tensors()
    if missing := sorted(ours.keys() - found.keys()):
        raise UserError(f"{folder}: lacks the parameter {missing[0]} of GPT-2 ({len(missing)} are missing)")
    return {name: reader(*found[name], transposed=name.endswith(TRANSPOSED)) for name in ours}


def reader(file, name, transposed):
    return lambda: file.get_tensor(name).t() if transposed else file.get_tensor(name)


def weight_files(folder):
    """The safetensors files of a folder: one, or those that its index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        try:
            names = read_json(folder / INDEX)["weight_map"].values()
            return [folder / Path(name).name for name in sorted(set(names))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: does not name files of weights: {first_line(error)}") from None
    raise UserError(
        f"{folder}: holds no {WEIGHTS} (files of other formats can run code when they are read: convert them there)"
    )


def open_safetensors(path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def config_of(sizes, start, end, dtype):
    """The config.json that transformers reads for a model of these sizes, as a dict; start, end: tokens, or None."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name up to transformers 4
        "vocab_size": sizes.vocab_size,
        "n_positions": sizes.block_size,
        "n_ctx": sizes.block_size,
        "n_embd": sizes.n_embd,
        "n_layer": sizes.n_layer,
        "n_head": sizes.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": sizes.dropout,
        "embd_pdrop": sizes.dropout,
        "attn_pdrop": sizes.dropout,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": start,
        "eos_token_id": end,
    }
