"""FineWeb-Edu, or your own text, as token shards for train_gpt2.py.

    python prepare_fineweb.py                                      # FineWeb-Edu's 10-billion-token sample: 20 GB of shards
    python prepare_fineweb.py --input 'books/*.txt' --out_dir data/books --val_tokens 1_000_000
    python prepare_fineweb.py --input a.parquet b.jsonl.gz --tokenizer byte --out_dir data/mine
    python prepare_fineweb.py --verify data/books

Documents are streamed, tokenized by --workers processes, and written in their order as shards in llm.c's format, each
document behind an end-of-text token; the first shard is for validation. Interrupted in any way, the same command goes on
after the last whole shard. The shards do not depend on the number of workers or interruptions.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2 import tokenizer
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import sync, write_json
from gpt2.hub import Hub
from gpt2.progress import progress
from gpt2.shards import HEADER_BYTES, PROGRESS, check_header, header, read_meta
from gpt2.sources import Files, pieces
from gpt2.verify import verify
from gpt2.workers import pool

FINEWEB = "HuggingFaceFW/fineweb-edu"
BATCH = 2**20  # bytes of text that a worker gets at a time, or a little more
BYTES_PER_TOKEN = {
    "gpt2": 5,
    "char": 4,
    "byte": 1,
}  # at most, in a text of some length: for guessing how much room shards need


class Batch(NamedTuple):
    """Consecutive pieces of text, [(text, whether a document starts), ...], of `size` bytes together, read from `position` on."""

    pieces: list
    size: int
    position: dict
    done: float | None


def batches(records):
    """The records' texts as Batches of BATCH bytes or a little more; which ones depends on where reading began alone."""
    texts, size, first = [], 0, None
    for record in records:
        first = first or record
        texts.append((record.text, record.starts))
        size += len(record.text)
        if size >= BATCH:
            yield Batch(texts, size, first.position, first.done)
            texts, size, first = [], 0, None
    if texts:
        yield Batch(texts, size, first.position, first.done)


def encode(name, characters, texts):
    """The tokens of a Batch's pieces in one uint16 array, in a worker."""
    words = tokenizer.load(name, characters)
    start = np.array([words.end_of_text], np.uint16)
    return np.concatenate(
        [array for text, starts in texts for array in ([start] * starts + [words.encode(text.decode())])]
    )


def encoded(batches, workers, ahead, name, characters):
    """(Batch, its tokens) in order from the pool `workers`, which is kept `ahead` batches ahead, not more."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append((batch._replace(pieces=None), workers.submit(encode, name, characters, batch.pieces)))
        if len(waiting) > ahead:
            batch, result = waiting.popleft()
            yield batch, result.result()
    for batch, result in waiting:
        yield batch, result.result()


class ShardFile:
    """A shard that is being written: beside, under a name that ends in .tmp, until `close` puts it in its place."""

    def __init__(self, path, size):
        self.path, self.beside = path, path.with_name(f".{path.name}.tmp")
        self.tokens, self.room, self.documents = 0, size, 0
        self.file = open(self.beside, "w+b")
        self.file.write(header(size))

    def append(self, tokens, end_of_text):
        self.file.write(tokens.astype("<u2", copy=False).data)
        self.tokens, self.room = self.tokens + len(tokens), self.room - len(tokens)
        self.documents += int(np.count_nonzero(tokens == end_of_text))

    def close(self):
        """What meta.json says of the shard, which is whole and in its place now."""
        self.file.seek(0)
        self.file.write(header(self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256").hexdigest()
        self.file.close()
        os.replace(self.beside, self.path)
        sync(self.path.parent)
        return {"name": self.path.name, "tokens": self.tokens, "documents": self.documents, "sha256": digest}


class Preparation:
    """The shards in out_dir and how far they reach into the source. What is on the disk is always whole shards and, in
    progress.json, the batch in which the last of them ended, with the number of that batch's tokens that it took."""

    def __init__(self, args, source, identity, state):
        self.out_dir, self.args, self.source, self.identity = Path(args.out_dir), args, source, identity
        self.state = state or identity | {
            "characters": "",
            "shards": [],
            "position": None,
            "taken": 0,
            "bytes": 0,
            "done": 0.0,
        }
        self.shard = None

    def save(self, **changes):
        write_json(self.out_dir / PROGRESS, self.state | changes)

    def size(self, number):
        return self.args.val_tokens or self.args.shard_size if number == 0 else self.args.shard_size

    def open_shard(self, done):
        number = len(self.state["shards"])
        self.check_space(self.size(number), done)
        split = "train" if number else "val"
        self.shard = ShardFile(self.out_dir / f"{self.source.name}_{split}_{number:06d}.bin", self.size(number))

    def close_shard(self):
        self.state["shards"].append(self.shard.close())
        self.shard = None

    def add(self, batch, tokens, end_of_text):
        """Write a batch's tokens, of which the shards on the disk have `taken` already."""
        taken, self.state["taken"] = self.state["taken"], 0
        while taken < len(tokens):
            if self.shard is None:
                self.open_shard(batch.done)
            count = min(self.shard.room, len(tokens) - taken)
            self.shard.append(tokens[taken : taken + count], end_of_text)
            taken += count
            if not self.shard.room:
                self.close_shard()
                self.save(position=batch.position, taken=taken, done=batch.done)
        self.state["bytes"] += batch.size

    def check_space(self, tokens, done):
        """UserError where the disk has no room for the next `tokens` tokens, or for what is left of a source of known size."""
        left = self.estimated_tokens(done)
        needed = HEADER_BYTES + 2 * (tokens if left is None else min(tokens, left))
        self.require(needed, f"shard {len(self.state['shards'])}")

    def estimated_tokens(self, done):
        """Tokens at least that are left to write, or None where nothing tells."""
        if None in (self.text_bytes, done) or self.args.min_score is not None or self.args.max_tokens is not None:
            return None
        return int(self.text_bytes * (1 - done) / BYTES_PER_TOKEN[self.args.tokenizer])

    def require(self, needed, what):
        free = shutil.disk_usage(self.out_dir).free
        if free < needed:
            raise UserError(
                f"--out_dir {self.out_dir}: {free / 1e9:.3g} GB are free, but {what} needs about {needed / 1e9:.3g} GB: "
                "free some space, then the same command continues, or choose another --out_dir"
            )

    def run(self):
        with pool(self.args.workers) as workers:
            for _ in range(self.args.workers):
                workers.submit(encode, self.args.tokenizer, "", [(b"", False)])  # they start while the source is opened
            self.text_bytes = self.source.text_bytes()
            if self.args.tokenizer == "char" and not self.state["characters"]:
                self.state["characters"] = characters_of(self.source)
            words = tokenizer.load(self.args.tokenizer, self.state["characters"])
            if (left := self.estimated_tokens(self.state["done"])) is not None:
                self.require(2 * left, "the rest of the shards" if self.state["shards"] else "the whole")
            self.save()
            self.write_shards(words, workers)
        self.finish(words)

    def write_shards(self, words, workers):
        self.started, self.before = time.perf_counter(), self.tokens()
        read = batches(pieces(self.source.records(self.state["position"]), self.state["position"]))
        with progress_bar(self.state["done"]) as bar:
            for batch, tokens in encoded(read, workers, 4 * self.args.workers, words.name, words.characters):
                self.add(batch, tokens, words.end_of_text)
                total = self.tokens()
                advance(
                    bar,
                    batch.done,
                    f"{total / 1e6:,.1f} M tokens, {(total - self.before) / (time.perf_counter() - self.started) / 1e6:.2f} M/s",
                )
            advance(bar, 1.0)
        if self.shard:
            self.close_shard()

    def tokens(self):
        """In the shards so far, the one being written among them."""
        return sum(shard["tokens"] for shard in self.state["shards"]) + (self.shard.tokens if self.shard else 0)

    def finish(self, words):
        """meta.json, which says that all is there, and a table."""
        shards, counts = self.state["shards"], self.source.columns.counts
        if len(shards) < 2:
            for path in [*(self.out_dir / shard["name"] for shard in shards), self.out_dir / PROGRESS]:
                path.unlink()
            raise UserError(
                f"the source has {self.tokens():,} tokens, which all went into the validation set: "
                "give a smaller --val_tokens"
            )
        documents = sum(shard["documents"] for shard in shards)
        write_json(
            self.out_dir / "meta.json",
            dict(
                **words.describe(),
                vocab_size=words.vocab_size,
                end_of_text=words.end_of_text,
                **self.identity,
                documents=documents,
                bytes=self.state["bytes"],
                **counts,
                shards=shards,
            ),
        )
        (self.out_dir / PROGRESS).unlink()
        total, seconds = self.tokens(), time.perf_counter() - self.started
        lines = {
            "documents": f"{documents:,}",
            "tokens": f"{total:,}",
            "tokens a document": f"{total / documents:,.1f}",
            "bytes a token": f"{self.state['bytes'] / (total - documents):.3f}",
            "shards": f"{len(shards)} in {self.out_dir}",
            "seconds": f"{seconds:.1f}",
            "tokens a second": f"{(total - self.before) / seconds:,.0f}",
        }
        lines |= {f"documents {what}": f"{count:,}" for what, count in counts.items() if count}
        print("\n".join(f"{name:20}{value}" for name, value in lines.items()))


def progress_bar(done=0.0, description=""):
    """A bar over the share of the source that was read."""
    form = "{percentage:3.0f}% |{bar}| {desc}  {elapsed}<{remaining}"
    return progress(1.0, "share", done or 0.0, desc=description, bar_format=form)


def advance(bar, done, description=None):
    if done is None:
        bar.bar_format, bar.total = "{desc}  {elapsed}", None
    if description:
        bar.set_description_str(description, refresh=False)
    bar.update((bar.n if done is None else done) - bar.n)


def characters_of(source):
    """All characters of a source, sorted: the vocabulary of --tokenizer char."""
    found = set()
    with progress_bar(description="looking for all characters") as bar:
        for record in pieces(source.records()):
            found.update(record.text.decode())
            advance(bar, record.done)
    return "".join(sorted(found))


def prepare(args):
    out_dir = Path(args.out_dir)
    state, meta = what_is_in(out_dir)
    found = state or meta
    source = Files(args) if args.input else Hub(args, found and found["source"].get("revision"))
    names = ("tokenizer", "shard_size", "val_tokens", "text_column", "min_score", "max_tokens", "document_separator")
    identity = {"source": source.identity, "arguments": {name: getattr(args, name) for name in names}}
    if found:
        require_same(found["source"] | found["arguments"], identity["source"] | identity["arguments"], out_dir)
        for shard in found["shards"]:
            check_header(out_dir / shard["name"])
    if meta:
        return print(
            f"{out_dir} is finished: {len(meta['shards'])} shards, {sum(shard['tokens'] for shard in meta['shards']):,} tokens; "
            f"to check them: prepare_fineweb.py --verify {out_dir}"
        )
    source.open()
    preparation = Preparation(args, source, identity, state)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with alone_in(out_dir):
            remove_unfinished(out_dir)
            if state:
                print(f"continuing {out_dir} after {len(state['shards'])} whole shards")
            try:
                preparation.run()
            except OSError:
                remove_unfinished(out_dir)  # it takes room
                raise
            except UserError:
                if not preparation.state["shards"]:
                    (out_dir / PROGRESS).unlink(missing_ok=True)  # nothing to continue: other arguments are as good
                raise
    except OSError as error:
        raise UserError(
            f"--out_dir {out_dir}: cannot be written: {error.strerror or error}; whole shards are kept: the same command continues"
        ) from None


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold the folder for this process, however it ends. UserError where another holds it; where the system has no such locks, all may."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"--out_dir {out_dir}: another preparation is writing there") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def remove_unfinished(out_dir):
    for path in out_dir.glob(".*.tmp"):
        path.unlink()


def what_is_in(out_dir):
    """(progress of an unfinished preparation, meta.json of a finished one), either or both None. UserError where there is something else."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir}: is a file")
    meta = read_meta(out_dir)
    if meta.get("arguments"):
        return None, meta
    try:
        return json.loads((out_dir / PROGRESS).read_text()), None
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise UserError(
            f"{out_dir / PROGRESS}: is damaged ({error}): remove {out_dir}, or choose another --out_dir"
        ) from None
    if out_dir.exists() and (
        others := sorted(path.name for path in out_dir.iterdir() if not path.name.startswith("."))
    ):
        raise UserError(
            f"--out_dir {out_dir}: holds something else ({', '.join(others[:3])}): choose another, or empty it"
        )
    return None, None


def require_same(found, arguments, out_dir):
    """UserError where out_dir was begun with other arguments than these; it names the first that differs."""
    for name in found | arguments:
        there, here = found.get(name), arguments.get(name)
        if there != here and name == "input" and there and here:
            path, size = next(
                file
                for file in [*there, *here]
                if file not in there or file not in here or there.index(file) != here.index(file)
            )
            raise UserError(
                f"--out_dir {out_dir}: was begun with other --input files: {path} ({size} bytes) is new, changed, missing or in another "
                "place: give the same files, or another --out_dir"
            )
        if there != here:
            raise UserError(
                f"--out_dir {out_dir}: was begun with --{name} {there}, not {here}: give the same arguments, or another --out_dir"
            )


def number(text):
    return int(text.replace("_", ""))


def parse(arguments):
    parser = Parser(
        prog="prepare_fineweb.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="your own text instead of the hub's: files, globs or folders of .parquet, .jsonl, .txt (the last two also .gz, .zst)",
    )
    parser.add_argument(
        "--dataset", default=FINEWEB, help="dataset of the Hugging Face hub, or a folder of one (default: %(default)s)"
    )
    parser.add_argument("--name", help=f"its configuration (default: sample-10BT of {FINEWEB})")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--revision", help="its commit or tag (default: the newest, which meta.json then names)")
    parser.add_argument(
        "--text_column",
        default="text",
        help="column, or key of a JSON line, that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--document_separator",
        metavar="LINE",
        help="line between two documents of a .txt (default: a file is one document)",
    )
    parser.add_argument("--min_score", type=float, help="only documents whose column `score` is at least this")
    parser.add_argument("--max_tokens", type=number, help="only documents whose column `token_count` is at most this")
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out documents that are empty, null or no JSON, and count them, instead of stopping",
    )
    parser.add_argument("--out_dir", default="data/fineweb_edu", help="folder for the shards (default: %(default)s)")
    parser.add_argument("--tokenizer", choices=tokenizer.NAMES, default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--shard_size", type=number, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument(
        "--val_tokens", type=number, help="tokens of the first shard, for validation (default: --shard_size)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: as many as cores)")
    parser.add_argument(
        "--verify", metavar="DIR", help="check the shards in DIR, show some of their text, and do nothing else"
    )
    if "--document_separator" in arguments[:-1]:  # its value may begin with a dash
        where = arguments.index("--document_separator")
        arguments = [*arguments[:where], f"--document_separator={arguments[where + 1]}", *arguments[where + 2 :]]
    args = parser.parse_args(arguments)
    for name in ("shard_size", "val_tokens", "workers"):
        if not 1 <= (getattr(args, name) or (1 if name == "val_tokens" and args.val_tokens is None else 0)) < 2**31:
            raise UserError(f"--{name} {getattr(args, name)}: expected a number from 1 to {2**31 - 1:,}")
    if args.dataset == FINEWEB and args.name is None:
        args.name = "sample-10BT"
    return args


def interrupt(*_):
    raise KeyboardInterrupt


def main(arguments=None):
    signal.signal(signal.SIGTERM, interrupt)
    with one_line_errors(
        "prepare_fineweb.py",
        interrupted="interrupted; whole shards are kept: the same command continues",
        leave=sys.exit,
    ):
        args = parse(sys.argv[1:] if arguments is None else arguments)
        verify(args.verify) if args.verify else prepare(args)


if __name__ == "__main__":
    main()
