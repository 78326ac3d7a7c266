"""The weights that a run starts from: another run's, an exported folder's, or GPT-2's as Hugging Face has them."""

from pathlib import Path

from gpt2 import checkpoint, load
from gpt2.config import ARCHITECTURE, nearest
from gpt2.errors import UserError, first_line, warn
from gpt2.files import from_json
from gpt2.hub import reachable
from gpt2.tokenizer import description_in

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"  # a bare "gpt2" would be the folder of that name where the command is given
STARTS = ("auto", "scratch", "resume")  # those that name no weights
POSITIONS = "transformer.wpe.weight"


def folder_of(init_from):
    """The folder of the weights that init_from names; published ones are fetched, unless the cache has them."""
    name = init_from.removeprefix(f"{OWNER}/")
    if name in PUBLISHED:
        return published(name)
    if not Path(init_from).is_dir():
        names = (*STARTS, *PUBLISHED)
        raise UserError(
            f"init_from={init_from}: no such folder{nearest(init_from, names)}; expected one with weights, or one of "
            + ", ".join(names)
        )
    return Path(init_from)


def published(name):
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"init_from={name}: needs the package huggingface_hub: pip install huggingface_hub") from None
    files = ("model.safetensors", "config.json")
    try:
        for file in files:
            path = hf_hub_download(f"{OWNER}/{name}", file, local_files_only=True)
    except LocalEntryNotFoundError:
        elsewhere = (
            f"give the folder of a copy with --init_from=FOLDER, or set HF_HOME to a cache that has {OWNER}/{name}"
        )
        if not reachable():
            raise UserError(f"init_from={name}: the Hugging Face hub cannot be reached: {elsewhere}") from None
        try:
            for file in files:
                path = hf_hub_download(f"{OWNER}/{name}", file)
        except Exception as error:  # its kinds change with its HTTP library
            raise UserError(f"init_from={name}: cannot be fetched: {first_line(error)}: {elsewhere}") from None
    return Path(path).parent


def sizes(config):
    """The sizes of the weights that init_from names, as options; {} where it names none.

    A run that has begun has them written down: it goes on without the weights it began from, and resumes at its sizes.
    """
    if config.init_from in ("auto", "scratch"):
        return {}
    try:
        begun = from_json((Path(config.out_dir) / "config.json").read_text())
        if config.init_from in ("resume", begun["init_from"]):
            return {name: begun[name] for name in ARCHITECTURE}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if config.init_from == "resume":
        return {}
    found = load.find(folder_of(config.init_from)).sizes
    return {name: getattr(found, name) for name in ARCHITECTURE}


def require_room(config, tokens):
    """UserError where the vocabulary is smaller than the `tokens` of the data's tokenizer."""
    if not 0 < config.vocab_size < tokens:
        return
    if config.init_from in ("auto", "scratch"):
        raise UserError(
            f"vocab_size={config.vocab_size} is smaller than the {tokens} of the tokenizer of {config.data_dir}; "
            "leave it away"
        )
    raise UserError(
        f"data_dir={config.data_dir}: its tokenizer has {tokens} tokens, the weights of init_from={config.init_from} "
        f"{config.vocab_size}: prepare the data with the tokenizer of the weights"
    )


def load_into(model, config, words):
    """Copy the weights that init_from names, if it does, into the model; of positions only as many as it has.

    words: the data's tokenizer as `describe_data` has it; a warning where the weights know another. Returns 0,
    the step before the first.
    """
    if config.init_from in STARTS:
        return 0
    found = load.find(folder_of(config.init_from))
    theirs = tokenizer_of(found)
    if words and theirs and theirs != words:
        warn(
            f"init_from={config.init_from} was trained with another tokenizer ({theirs['tokenizer']}) than that of "
            f"{config.data_dir} ({words['tokenizer']}): its embeddings are of other tokens"
        )
    tensors = {name: load.read(found, name) for name in found.tensors}
    tensors[POSITIONS] = tensors[POSITIONS][: config.block_size]
    checkpoint.load_model(model, tensors)
    return 0


def tokenizer_of(found):
    """The description of the tokenizer of what `load.find` found, or None where nobody knows."""
    if found.kind == "hf" and found.sizes.vocab_size == 50257:
        return {"tokenizer": "gpt2"}
    return description_in(found.origin.get("tokenizer"))


def tokenizer_so_far(config, run):
    """The description of the tokenizer of the run that `checkpoint.find_run` found, or of the weights it begins from;
    None where they name none. Data without a meta.json leave it to them."""
    if run:
        return description_in(run[1].get("tokenizer"))
    if config.init_from in STARTS:
        return None
    try:
        return load.tokenizer_of(load.find(folder_of(config.init_from))).describe()
    except UserError:
        return None
