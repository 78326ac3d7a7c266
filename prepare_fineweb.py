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

import contextlib
import hashlib
import math
import os
import signal
import sys
from pathlib import Path

from gpt2 import tokenizer
from gpt2.config import shown
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import typed
from gpt2.hub import Hub
from gpt2.lock import locked
from gpt2.preparation import Preparation, read_progress
from gpt2.shards import check_header, read_meta
from gpt2.sources import Files
from gpt2.verify import verify

FINEWEB = "HuggingFaceFW/fineweb-edu"


def prepare(args):
    """Make the shards that `parse` was asked for, or go on making them; where they are all there, say so."""
    out_dir = Path(args.out_dir)
    state, meta = what_is_in(out_dir)
    found = state or meta
    source = Files(args) if args.input else Hub(args, found and found["source"])
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
            f"to check them: prepare_fineweb.py --verify {typed(out_dir)}"
        )
    source.open()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with alone_in(out_dir):
            if what_is_in(out_dir) != (state, meta):
                raise UserError(
                    f"--out_dir {out_dir}: another preparation has just written there: give the command again"
                )
            Preparation(args, source, identity, state).run()
    except OSError as error:
        raise UserError(
            f"--out_dir {out_dir}: cannot be written: {error.strerror or error}; whole shards are kept: "
            "once it can, the same command continues"
        ) from None


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold the folder's lock for this process, however it ends. UserError where another holds it."""
    try:
        descriptor, _ = locked(out_dir)
    except BlockingIOError:
        raise UserError(f"--out_dir {out_dir}: another preparation is writing there") from None
    try:
        yield
    finally:
        os.close(descriptor)


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


def require_same(found, arguments, out_dir):
    """UserError where out_dir was begun with other arguments than these; it names the first that differs."""
    for name in found | arguments:
        if name == "revision_asked":  # its commit is what counts
            continue
        there, here = found.get(name), arguments.get(name)
        if name == "input" and there and here and len(there[0]) == 2:  # an older one, which knows but the sizes
            here = [[path, size] for path, size, _ in here]
        if there != here and name == "input" and there and here:
            path, size, *_ = next(
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
                f"--out_dir {out_dir}: was begun with --{name} {shown(there)}, not {shown(here)}: "
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
    parser = Parser(prog="prepare_fineweb.py", description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="your own text instead of the hub's: files, globs or folders of .parquet, .jsonl, .txt "
        "(the last two also .gz, .zst)",
    )
    parser.add_argument("--dataset", default=FINEWEB, help="dataset of the Hugging Face hub, or a folder of one")
    parser.add_argument("--name", help=f"its configuration (default: sample-10BT of {FINEWEB})")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--revision", help="its commit or tag (default: the newest, which meta.json then names)")
    parser.add_argument("--text_column", default="text", help="column, or key of a JSON line, that holds the text")
    parser.add_argument(
        "--document_separator",
        type=str,
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
    parser.add_argument("--out_dir", default="data/fineweb_edu", help="folder for the shards")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME_OR_PATH",
        help="gpt2, char, byte, or the path of a tokenizer.json, as gpt2.bpe writes it",
    )
    parser.add_argument("--shard_size", type=number, default=100_000_000, help="tokens a shard")
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
    for name, most in (("shard_size", 2**31 - 1), ("val_tokens", 2**31 - 1), ("workers", 1024)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{name} {value}: expected a number from 1 to {most:,}")
    if args.min_score is not None and math.isnan(args.min_score):
        raise UserError("--min_score nan: expected a number")
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
