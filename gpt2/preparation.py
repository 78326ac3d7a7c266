"""Text to token shards: a preparation that is interrupted, in any way, goes on after the last whole shard."""

import hashlib
import json
import shutil
import time
from pathlib import Path

from gpt2 import tokenizer
from gpt2.encoding import batches, encode, encoded
from gpt2.errors import UserError
from gpt2.files import from_json, write_json
from gpt2.progress import progress
from gpt2.shards import CHUNK, HEADER_BYTES, PROGRESS, ShardFile, check_header, summary
from gpt2.sources import pieces
from gpt2.workers import pool

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
        """Write all that is left. OSError where the disk does not take it; UserError where the source is not right."""
        remove_unfinished(self.out_dir)
        if self.state["shards"]:
            print(f"continuing {self.out_dir} after {len(self.state['shards'])} whole shards")
        try:
            with pool(self.args.workers) as workers:
                for _ in range(self.args.workers):  # they start while the source is opened
                    workers.submit(encode, self.args.description, [(b"", False)])
                self.begin()
                self.write_shards(workers)
            self.part_validation()
            self.finish()
        except (OSError, UserError) as error:
            remove_unfinished(self.out_dir)  # it takes room
            if isinstance(error, UserError) and not self.state["shards"]:
                (self.out_dir / PROGRESS).unlink(missing_ok=True)  # nothing to continue: other arguments are as good
            raise

    def begin(self):
        """Look through the source as far as must be known first: its size, and the characters of --tokenizer char."""
        self.text_bytes = self.source.text_bytes()
        if self.args.tokenizer == "char" and not self.state["characters"]:
            self.state["characters"] = characters_of(self.source)
        own = {"characters": self.state["characters"]} if self.args.tokenizer == "char" else {}
        self.words = tokenizer.load(self.args.description | own)
        if (left := self.estimated_tokens(self.state["done"])) is not None:
            self.require(2 * left, "the rest of the shards" if self.state["shards"] else "the whole")
        self.save()

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


def remove_unfinished(out_dir):
    for path in out_dir.glob(".*.tmp"):
        path.unlink()


def write_progress(out_dir, state):
    text = json.dumps(state)
    write_json(out_dir / PROGRESS, state | {"check": hashlib.sha256(text.encode()).hexdigest()})


def read_progress(out_dir):
    """What `write_progress` wrote, or None where it did not. UserError where the file is damaged."""
    path = out_dir / PROGRESS
    try:
        state = from_json(path.read_text())
        check = state.pop("check")
        if check == hashlib.sha256(json.dumps(state).encode()).hexdigest():
            return state
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged, or an earlier version's: remove {out_dir}, or choose another --out_dir")
