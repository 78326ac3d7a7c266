"""The texts that plans name, and the shards made of them. A text is known by its sha256, not by where it lies."""

import contextlib
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import prepare_fineweb
from gpt2 import kjv
from gpt2.errors import UserError
from gpt2.shards import read_meta

PLACES = (Path("data"), Path("../shared/data"))


@dataclass(frozen=True)
class Text:
    """files: paths under one of PLACES, in order; sha256: of all in a row; prepare: prepare_fineweb's options.

    characters_per_token: of GPT-2's tokens, where the text is learnt by characters; else 1.
    Without files, shards that prepare_fineweb.py wrote to PLACES/name, and the sha256 of their meta.json.
    """

    name: str
    files: tuple
    sha256: str
    prepare: tuple
    characters_per_token: float = 1.0


TINY_SHAKESPEARE = Text(
    "tinyshakespeare",
    ("tinyshakespeare/input.txt",),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ("--tokenizer=char", "--val_tokens=111_540"),
    1_115_394 / 338_025,
)
KING_JAMES = Text(
    "kjv",
    ("kjv.txt",),
    "a1da2b1ee7b33d399afba046345b72954dc0be82ad8104faa074ce5c7cb7aef2",
    ("--tokenizer=char", "--val_tokens=400_000"),
    4_138_978 / 1_001_553,
)
NOVELS = Text(
    "novels",
    tuple(f"novels/novels-0000{number}-of-00004.parquet" for number in range(4)),
    "0203e6a623ae41e35125eb4195a5eb64464eac4d9c7f761521a0ce97958ef7a1",
    ("--tokenizer=char", "--val_tokens=1_000_000", "--max_tokens=21_000_000"),
    77_566_437 / 19_132_326,
)
FINEWEB_EDU = Text("fineweb_edu", (), "", ())
NOVELS_GPT2 = Text("novels_gpt2", NOVELS.files, NOVELS.sha256, ("--tokenizer=gpt2", "--val_tokens=500_000"))


def prepare(text, folder):
    """Make the shards of `text` in `folder`, once, and return their identity: {"text", "shards"}, sha256 of each.

    UserError where the text is not at hand, or is another one.
    """
    paths = find(text)
    if not text.sha256:
        raise UserError(f"{paths[0]}: the plan must name its data: put sha256={hash_of(paths)!r} into study/data.py")
    if hash_of(paths) != text.sha256:
        raise UserError(f"{paths[0]}: its sha256 is {hash_of(paths)}, the plan is about {text.sha256}")
    folder = Path(folder) if text.files else paths[0].parent
    if not (folder / "meta.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = ["--input", *map(str, paths), f"--out_dir={folder}", *text.prepare]
            prepare_fineweb.prepare(prepare_fineweb.parse(arguments))
    shards = {shard["name"]: hash_of([folder / shard["name"]]) for shard in read_meta(folder)["shards"]}
    return {"text": text.sha256, "shards": shards}


def find(text):
    """The paths of the text's files; the King James Bible is written where it is not there yet."""
    for place in PLACES:
        paths = [place / file for file in text.files or (f"{text.name}/meta.json",)]
        if all(path.exists() for path in paths):
            return paths
    if text is KING_JAMES:
        kjv.write(PLACES[0] / text.files[0])
        return find(text)
    missing = paths[0].relative_to(PLACES[-1])
    raise UserError(f"{text.name}: {missing} is not here; put it at {PLACES[0] / missing}")


def hash_of(paths):
    """sha256 of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
