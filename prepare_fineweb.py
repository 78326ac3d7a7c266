"""FineWeb-Edu, or your own text, as token shards for train_gpt2.py.

    python prepare_fineweb.py                                  # FineWeb-Edu's 10-billion-token sample: 20 GB of shards
    python prepare_fineweb.py --input 'books/*.txt' --out_dir data/books
    python prepare_fineweb.py --input a.parquet b.jsonl.gz --tokenizer byte --out_dir data/mine
    python prepare_fineweb.py --verify data/books

Documents are streamed, tokenized by --workers processes, and written in their order as shards in llm.c's format, each
document behind an end-of-text token. The first --val_tokens are for validation, by default a tenth of all and at most a
shard. Interrupted in any way, the same command goes on after the last whole shard. The shards do not depend on the
number of workers or interruptions.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from gpt2 import tokenizer
from gpt2.encoding import batches, encode, encoded
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import write_json
from gpt2.hub import Hub
from gpt2.progress import progress
from gpt2.shards import CHUNK, HEADER_BYTES, PROGRESS, ShardFile, check_header, read_meta, summary
from gpt2.sources import Files, pieces
from gpt2.verify import verify
from gpt2.workers import pool

FINEWEB = "HuggingFaceFW/fineweb-edu"
# At most, in a text of some length: for guessing how much room shards need.
BYTES_PER_TOKEN = {"gpt2": 5, "bpe": 5, "char": 4, "byte": 1}


class Preparation:
    """The shards in out_dir and how far they reach into the source.

    What is on the disk is always whole shards and, in progress.json, the batch in which the last of them ended, with
    the number of that batch's tokens that it took.
    """

    def __init__(self, args, source, identity, state):
        self.out_dir, self.args, self.source, self.identity = Path(args.out_dir), args, source, identity
        start = {"characters": "", "shards": [], "position": None, "taken": 0, "bytes": 0, "unencoded": 0, "done": 0.0}
        self.state = state or identity | start
        self.shard = None

    def save(self, **changes):
        write_progress(self.out_dir, self.state | changes)

    def size(self, number):
        return self.args.val_tokens or self.args.shard_size if number == 0 else self.args.shard_size

    def path(self, number):
        split = "train" if number else "val"
        return self.out_dir / f"{self.source.name}_{split}_{number:06d}.bin"

    def open_shard(self, done):
        number = len(self.state["shards"])
        self.check_space(self.size(number), done)
        self.shard = ShardFile(self.path(number), self.size(number))

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
        """UserError where the disk has no room for the next `tokens` tokens, or for what is left of a known size."""
        left = self.estimated_tokens(done)
        needed = HEADER_BYTES + 2 * (tokens if left is None else min(tokens, left))
        self.require(needed, f"shard {len(self.state['shards'])}")

    def estimated_tokens(self, done):
        """Tokens at least that are left to write, or None where nothing tells."""
        if None in (self.text_bytes, done) or self.args.min_score is not None or self.args.max_tokens is not None:
            return None
        return int(self.text_bytes * (1 - done) / BYTES_PER_TOKEN[self.words.name])

    def require(self, needed, what):
        free = shutil.disk_usage(self.out_dir).free
        if free < needed:
            raise UserError(
                f"--out_dir {self.out_dir}: {free / 1e9:.3g} GB are free, but {what} needs about {needed / 1e9:.3g} "
                "GB: free some space, then the same command continues, or choose another --out_dir"
            )

    def run(self):
        with pool(self.args.workers) as workers:
            for _ in range(self.args.workers):  # they start while the source is opened
                workers.submit(encode, self.args.description, [(b"", False)])
            self.text_bytes = self.source.text_bytes()
            if self.args.tokenizer == "char" and not self.state["characters"]:
                self.state["characters"] = characters_of(self.source)
            own = {"characters": self.state["characters"]} if self.args.tokenizer == "char" else {}
            self.words = tokenizer.load(self.args.description | own)
            if (left := self.estimated_tokens(self.state["done"])) is not None:
                self.require(2 * left, "the rest of the shards" if self.state["shards"] else "the whole")
            self.save()
            self.write_shards(workers)
        self.part_validation()
        self.finish()

    def write_shards(self, workers):
        self.started, self.before = time.perf_counter(), self.tokens()
        read = batches(pieces(self.source.records(self.state["position"]), self.state["position"]))
        with progress_bar(self.state["done"]) as bar:
            for batch, tokens, failures in encoded(read, workers, self.args.workers, self.words.describe()):
                for number, why in failures:
                    self.source.columns.refuse(f"{batch.places[number]}: cannot be tokenized: {why}")
                self.add(batch, tokens, self.words.end_of_text)
                self.state["unencoded"] += len(failures)  # after what may save it, as of `bytes`
                total = self.tokens()
                rate = (total - self.before) / (time.perf_counter() - self.started)
                advance(bar, batch.done, f"{total / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M/s")
            advance(bar, 1.0)
        if self.shard:
            self.close_shard()

    def tokens(self):
        """In the shards so far, the one being written among them."""
        return sum(shard["tokens"] for shard in self.state["shards"]) + (self.shard.tokens if self.shard else 0)

    def part_validation(self):
        """Without --val_tokens: leave a tenth of all tokens to the first shard, and make its rest the last shard.

        Only where the first shard holds more than that. Begun again after a crash, it ends with the same files.
        """
        shards, total = self.state["shards"], self.tokens()
        wanted = max(1, total // 10)
        if self.args.val_tokens or not shards or shards[0]["tokens"] <= wanted:
            return
        first, last = self.path(0), self.path(len(shards))
        whole = check_header(first)
        if whole.tokens > wanted:
            self.require(2 * whole.tokens, "parting the validation shard")
            for path, start, end in ((last, wanted, whole.tokens), (first, 0, wanted)):
                part = ShardFile(path, end - start)
                for at in range(start, end, CHUNK):
                    part.append(whole.read(at, min(CHUNK, end - at)), self.words.end_of_text)
                part.close()
        listed = [summary(path, self.words.end_of_text) for path in (first, last)]
        self.state["shards"] = [listed[0], *shards[1:], listed[1]]

    def finish(self):
        """meta.json, which says that all is there, and a table."""
        shards, counts = self.state["shards"], dict(self.source.columns.counts)
        counts["skipped"] += self.state["unencoded"]
        if len(shards) < 2:
            for path in [*(self.out_dir / shard["name"] for shard in shards), self.out_dir / PROGRESS]:
                path.unlink()
            all_in = "which all went into the validation set: give a smaller --val_tokens"
            few = "too few for training and validation"
            raise UserError(f"the source has {self.tokens():,} tokens, {all_in if self.args.val_tokens else few}")
        documents = sum(shard["documents"] for shard in shards)
        words = self.words
        own = dict(tokenizer=words.name, vocab_size=words.vocab_size, end_of_text=words.end_of_text) | words.describe()
        found = {"documents": documents, "bytes": self.state["bytes"]} | counts | {"shards": shards}
        write_json(self.out_dir / "meta.json", own | self.identity | found)
        (self.out_dir / PROGRESS).unlink()
        total, seconds = self.tokens(), time.perf_counter() - self.started
        lines = {
            "documents": f"{documents:,}",
            "tokens": f"{total:,}, {shards[0]['tokens']:,} of them for validation",
            "tokens a document": f"{total / max(1, documents):,.1f}",
            "bytes a token": f"{self.state['bytes'] / max(1, total - documents):.3f}",
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
        tokens = sum(shard["tokens"] for shard in meta["shards"])
        return print(
            f"{out_dir} is finished: {len(meta['shards'])} shards, {tokens:,} tokens; "
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
            f"--out_dir {out_dir}: cannot be written: {error.strerror or error}; whole shards are kept: "
            "once it can, the same command continues"
        ) from None


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold the folder for this process, however it ends. UserError where another holds it.

    Where the system has no such locks, all may.
    """
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
    """(progress of an unfinished preparation, meta.json of a finished one), either or both None.

    UserError where there is something else.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir}: is a file")
    try:
        meta, state = read_meta(out_dir), read_progress(out_dir)
        others = (
            sorted(path.name for path in out_dir.iterdir() if not path.name.startswith(".")) if out_dir.exists() else []
        )
    except OSError as error:
        raise UserError(f"--out_dir {out_dir}: cannot be read: {error.strerror}") from None
    if isinstance(meta.get("arguments"), dict) and isinstance(meta.get("source"), dict) and meta.get("shards"):
        return None, meta
    if others and not state:
        raise UserError(
            f"--out_dir {out_dir}: holds something else ({', '.join(others[:3])}): choose another, or empty it"
        )
    return state, None


def write_progress(out_dir, state):
    text = json.dumps(state)
    write_json(out_dir / PROGRESS, state | {"check": hashlib.sha256(text.encode()).hexdigest()})


def read_progress(out_dir):
    """What `write_progress` wrote, or None where it did not. UserError where the file is damaged."""
    path = out_dir / PROGRESS
    try:
        state = json.loads(path.read_text())
        check = state.pop("check")
        if check == hashlib.sha256(json.dumps(state).encode()).hexdigest():
            return state
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged, or an earlier version's: remove {out_dir}, or choose another --out_dir")


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
                f"--out_dir {out_dir}: was begun with other --input files: {path} ({size} bytes) is new, changed, "
                "missing or in another place: give the same files, or another --out_dir"
            )
        if there != here:
            raise UserError(
                f"--out_dir {out_dir}: was begun with --{name} {there}, not {here}: "
                "give the same arguments, or another --out_dir"
            )


def described(name):
    """(name, description) of --tokenizer: of a file the name is its contents', wherever it lies."""
    if name in tokenizer.NAMES:
        return name, {"tokenizer": name, "characters": ""}
    if not os.path.isfile(name):
        raise UserError(f"--tokenizer {name}: expected {', '.join(tokenizer.NAMES)} or the path of a tokenizer.json")
    try:
        text = Path(name).read_text(encoding="utf-8")
        words = tokenizer.load({"tokenizer": "bpe", "tokenizer_json": text})
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"--tokenizer {name}: {error}") from None
    return f"bpe {hashlib.sha256(text.encode()).hexdigest()[:12]}", words.describe()


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
        help="your own text instead of the hub's: files, globs or folders of .parquet, .jsonl, .txt "
        "(the last two also .gz, .zst)",
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
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME_OR_PATH",
        help="gpt2, char, byte, or the path of a tokenizer.json, as gpt2.bpe writes it (default: %(default)s)",
    )
    parser.add_argument("--shard_size", type=number, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument(
        "--val_tokens",
        type=number,
        help="tokens of the first shard, for validation (default: a tenth of all, at most --shard_size)",
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
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name} {value}: expected a number from 1 to {2**31 - 1:,}")
    if args.dataset == FINEWEB and args.name is None:
        args.name = "sample-10BT"
    args.tokenizer, args.description = described(args.tokenizer)
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
