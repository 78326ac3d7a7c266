"""Whether the shards of a folder are what their meta.json says: header, size, tokens, hashes, and text to look at."""

import hashlib
from pathlib import Path

import numpy as np

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.progress import progress
from gpt2.shards import PROGRESS, check_header, read_meta

SAMPLES, SAMPLE_TOKENS = 3, 60


def verify(folder):
    """Check every shard in `folder`, show the beginnings of some documents, print a summary.

    UserError names all that is wrong.
    """
    folder = Path(folder)
    meta, paths = read_meta(folder), sorted(folder.glob("*.bin"))
    if not paths:
        raise UserError(f"{folder}: holds no shards (*.bin)")
    listed = {shard["name"]: shard for shard in meta.get("shards", [])}
    words = tokenizer.load(meta)
    problems = [
        f"{folder / name}: is missing, though meta.json lists it" for name in listed if not (folder / name).exists()
    ]
    shards = []
    with progress(sum(path.stat().st_size for path in paths), "byte", unit_scale=True) as bar:
        for path in paths:
            try:
                shards.append(check_shard(path, listed.get(path.name), bool(listed), words, bar))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    show(shards, words)
    tokens, documents = (sum(column) for column in zip(*((shard.tokens, count) for shard, count in shards)))
    known = (
        "hashes as in meta.json"
        if listed
        else "no meta.json that lists them"
        + (", and preparation has not ended" if (folder / PROGRESS).exists() else "")
    )
    print(
        f"\n{folder}: {len(shards)} shards are whole: {tokens:,} tokens below {words.vocab_size:,}, "
        f"{documents:,} documents; {known}"
    )


def check_shard(path, listed, expected, words, bar):
    """(Shard, number of documents that start in it). UserError where anything is wrong with it."""
    shard, documents = check_header(path), 0
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(shard.offset))
    for _, tokens in shard.chunks():
        if (highest := int(tokens.max())) >= words.vocab_size:
            raise UserError(f"{path}: holds token {highest}, but the tokenizer {words.name} has {words.vocab_size:,}")
        digest.update(tokens.data)
        documents += int(np.count_nonzero(tokens == words.end_of_text))
        bar.update(tokens.nbytes)
    if expected and listed is None:
        raise UserError(f"{path}: is not listed in meta.json")
    if listed and digest.hexdigest() != listed["sha256"]:
        raise UserError(
            f"{path}: its sha256 is {digest.hexdigest()[:12]}..., not the {listed['sha256'][:12]}... of meta.json: "
            "it was changed or damaged"
        )
    return shard, documents


def show(shards, words):
    """Print the beginnings of documents from shards spread over all."""
    for index in sorted({i * (len(shards) - 1) // (SAMPLES - 1) for i in range(SAMPLES)}):
        shard, _ = shards[index]
        first = first_document(shard, words.end_of_text)
        tokens = shard.read(first, min(1 + SAMPLE_TOKENS, shard.tokens - first))
        print(f"\n{Path(shard.path).name}, from token {first:,}:\n  {words.decode(tokens.tolist())!r}")


def first_document(shard, end_of_text):
    """Where the first document of a Shard starts; 0 where one only goes on."""
    for start, tokens in shard.chunks():
        if (ends := tokens == end_of_text).any():
            return start + int(np.argmax(ends))
    return 0
