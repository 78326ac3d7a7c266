"""FineWeb-Edu, or your own text, as token shards for train_gpt2.py.

    python prepare_fineweb.py                                      # FineWeb-Edu, the 10-billion-token sample
    python prepare_fineweb.py --input 'books/*.txt' --out_dir data/books --val_tokens 1_000_000
    python prepare_fineweb.py --input a.parquet b.jsonl.gz --tokenizer byte --out_dir data/mine

Documents are streamed, tokenized by --workers processes in order, and written as shards in llm.c's format, each document
behind an end-of-text token. The first shard is the validation set.
"""

import argparse
import collections
import glob
import gzip
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2 import tokenizer
from gpt2.data import MAGIC, VERSION
from gpt2.errors import UserError, one_line_errors
from gpt2.files import write_atomically, write_json

BATCH_CHARACTERS = 2**20  # of text that a worker gets at a time


def documents(args):
    """Texts of the source, in its order, as they are read."""
    if not args.input:
        yield from hub_documents(args)
    for path in input_files(args.input or []):
        yield from file_documents(path, args)


def input_files(patterns):
    """The files that --input names: files, globs, or folders' contents, sorted within each. UserError where one names none."""
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern))
        if not found:
            raise UserError(f"--input {pattern}: no such file")
        files += found
    return files


def file_documents(path, args):
    """Texts of one file, by its ending."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(path)
        if args.text_column not in table.schema_arrow.names:
            raise UserError(f"{path}: no column {args.text_column!r}; it has {', '.join(table.schema_arrow.names)}: give one with --text_column")
        for batch in table.iter_batches(batch_size=256, columns=[args.text_column]):
            yield from batch.column(0).to_pylist()
    elif name.endswith((".jsonl", ".txt")):
        with open_text(path) as file:
            if name.endswith(".txt"):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)[args.text_column]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}:{number}: not a JSON object with a {args.text_column!r}") from None
    else:
        raise UserError(f"{path}: expected .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt")


def open_text(path):
    if path.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8")
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8")


def hub_documents(args):
    """Texts of a dataset of the Hugging Face hub, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(args.dataset, name=args.name, split=args.split, streaming=True)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{args.dataset}: the hub cannot be reached or has no such dataset ({type(error).__name__}); "
                        "give files of your own with --input") from None
    for row in rows:
        yield row[args.text_column]


def batches(texts):
    """Lists of consecutive non-empty texts of about BATCH_CHARACTERS together."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_worker(name, characters):
    global words
    words = tokenizer.load(name, characters)


def encode(batch):
    """(tokens of the batch's documents as one uint16 array, number of documents), in a worker."""
    return np.concatenate([np.array([words.end_of_text, *words.encode(text)], dtype=np.uint16) for text in batch]), len(batch)


def encoded(texts, args, characters):
    """What `encode` gives for each batch of texts, in order, from args.workers processes; a few batches ahead, not more."""
    with ProcessPoolExecutor(args.workers, initializer=start_worker, initargs=(args.tokenizer, characters)) as workers:
        waiting = collections.deque()
        for batch in batches(texts):
            waiting.append(workers.submit(encode, batch))
            if len(waiting) > 2 * args.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def shard_bytes(tokens):
    """llm.c's shard: 256 int32 of header, then the tokens as uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def prepare(args):
    out_dir = Path(args.out_dir)
    if out_dir.is_dir() and any(out_dir.glob("*.bin")):
        raise UserError(f"--out_dir {out_dir}: holds shards already; remove them or choose another")
    if args.tokenizer == "char" and not args.input:
        raise UserError("--tokenizer char needs --input: it reads the text twice, first for its characters")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(out_dir / ".writable", b"")
        (out_dir / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out_dir {out_dir}: cannot be written: {error}") from None
    characters = "".join(sorted(set().union(*map(set, documents(args))))) if args.tokenizer == "char" else ""
    words = tokenizer.load(args.tokenizer, characters)
    if words.vocab_size > 2**16:
        raise UserError(f"a vocabulary of {words.vocab_size} does not fit into uint16 shards")

    shards, parts, have, count = [], [], 0, 0

    def write(tokens):
        split = "val" if not shards else "train"
        data = shard_bytes(tokens)
        name = f"{out_dir.name}_{split}_{len(shards):06d}.bin"
        write_atomically(out_dir / name, data)
        shards.append({"name": name, "tokens": len(tokens), "sha256": hashlib.sha256(data).hexdigest()})

    with tqdm(unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        for tokens, number in encoded(documents(args), args, characters):
            bar.update(len(tokens))
            count += number
            while have + len(tokens) >= (size := args.shard_size if shards else args.val_tokens or args.shard_size):
                parts.append(tokens[: size - have])
                tokens = tokens[size - have :]
                write(np.concatenate(parts))
                parts, have = [], 0
            parts.append(tokens)
            have += len(tokens)
    if have:
        write(np.concatenate(parts))
    if len(shards) < 2:
        total = sum(shard["tokens"] for shard in shards)
        for shard in shards:
            (out_dir / shard["name"]).unlink()
        raise UserError(f"the source has {total} tokens, which all went into the validation set: give a smaller --val_tokens")
    meta = {"tokenizer": words.name, "vocab_size": words.vocab_size, "end_of_text": words.end_of_text, "characters": words.characters,
            "source": args.input or f"{args.dataset}/{args.name}/{args.split}", "documents": count, "shards": shards}
    write_json(out_dir / "meta.json", meta)
    print(f"{count:,} documents, {sum(shard['tokens'] for shard in shards):,} tokens in {len(shards)} shards in {out_dir}")


def number(text):
    return int(text.replace("_", ""))


def main():
    parser = argparse.ArgumentParser(prog="prepare_fineweb.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="FILE_OR_GLOB", help="your own text instead of the hub's: .parquet, .jsonl(.gz|.zst), .txt")
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="dataset of the Hugging Face hub")
    parser.add_argument("--name", default="sample-10BT", help="its configuration")
    parser.add_argument("--split", default="train")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--out_dir", default="data/fineweb_edu")
    parser.add_argument("--tokenizer", choices=tokenizer.NAMES, default="gpt2")
    parser.add_argument("--shard_size", type=number, default=100_000_000, help="tokens a shard")
    parser.add_argument("--val_tokens", type=number, help="tokens of the validation shard, the first (default: --shard_size)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with one_line_errors(parser.prog):
        prepare(args)


if __name__ == "__main__":
    main()
