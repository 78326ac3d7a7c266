"""Our tokenizers as the files that transformers' AutoTokenizer reads, and the bytes that each token stands for."""

import json
from functools import lru_cache

from gpt2.files import write_atomically, write_json
from gpt2.tokenizer import END_OF_TEXT, gpt2_encoding


def write(folder, words, block_size):
    """Write tokenizer.json and tokenizer_config.json, and for GPT-2 its vocab.json and merges.txt, into `folder`."""
    made = as_library_tokenizer(words)
    end = made.id_to_token(words.end_of_text) if has_end(words) else None
    write_atomically(folder / "tokenizer.json", made.to_str(pretty=True).encode())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer" if words.name == "gpt2" else "PreTrainedTokenizerFast",
            "model_max_length": block_size,
            "bos_token": end,
            "eos_token": end,
            "unk_token": END_OF_TEXT if words.name == "gpt2" else None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    if words.name == "gpt2":
        vocabulary, merges = gpt2_vocabulary()
        write_json(folder / "vocab.json", vocabulary | {END_OF_TEXT: words.end_of_text})
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())


def as_library_tokenizer(words):
    """A tokenizers.Tokenizer with the same tokens for every text as `words`, one of gpt2/tokenizer.py's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if words.name == "bpe":
        made = tokenizers.Tokenizer.from_str(words.tokenizer_json)
    elif words.name == "char":
        vocabulary = {character: number for number, character in enumerate(words.characters)}
        made = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    else:
        vocabulary, merges = gpt2_vocabulary() if words.name == "gpt2" else (byte_vocabulary(), [])
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.name == "gpt2")
        made.decoder = decoders.ByteLevel()
    if has_end(words):
        made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if (size := 1 + max(made.get_vocab().values())) != words.vocab_size:  # numbers may have gaps
        raise ValueError(f"{size} tokens there, {words.vocab_size} here")
    return made


def has_end(words):
    """Whether end-of-text is a token of its own, and not a character that stands for it, as nanoGPT's newline does."""
    return words.end_of_text >= len(words.characters)


def byte_letters():
    """The letter by which byte-level tokenizers write each of the 256 bytes: itself where it is printable, else one
    from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def byte_vocabulary():
    return {letter: byte for byte, letter in enumerate(byte_letters())}


@lru_cache
def gpt2_vocabulary():
    """(token -> number, [(left, right), ...] in order of rank) of GPT-2's byte pairs, written in letters for bytes.

    tiktoken keeps the ranks of whole tokens alone. The pair of which a token was made is what is left of its bytes when
    all merges of a lower rank have been applied.
    """
    ranks, letters = gpt2_encoding()._mergeable_ranks, byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)
    merges = [tuple(map(spell, parts(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    return {spell(token): rank for token, rank in ranks.items()}, merges


def parts(token, ranks):
    """The two tokens, both of lower rank, that merge into `token`."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [left + right for left, right in zip(pieces, pieces[1:])]
        lowest = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        pieces[lowest : lowest + 2] = [pairs[lowest]]
    return pieces


def token_bytes(words):
    """How many bytes of UTF-8 each token of `words` stands for, a list, end-of-text for none; None where tokens are not
    made of bytes."""
    if words.name == "gpt2":
        counts = [len(gpt2_encoding().decode_single_token_bytes(token)) for token in range(words.vocab_size)]
    elif words.name == "char":
        counts = [len(character.encode()) for character in words.characters] + [0]
    elif words.name == "byte":
        counts = [1] * words.vocab_size
    else:
        described, counts = json.loads(words.tokenizer_json), [0] * words.vocab_size
        if (described.get("decoder") or {}).get("type") != "ByteLevel" or described["model"].get("type") != "BPE":
            return None
        for token, number in described["model"]["vocab"].items():
            counts[number] = len(token)  # one letter a byte
    if has_end(words):
        counts[words.end_of_text] = 0
    return counts
