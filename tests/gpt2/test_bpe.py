"""A tokenizer of one's own: trained from text, it gives the text back, and shards made with it carry it."""

import json
import sys

import pytest

import prepare_fineweb
from gpt2 import bpe, tokenizer
from gpt2.errors import UserError
from tests.test_prepare_fineweb import TEXTS, texts_in, write_jsonl


@pytest.fixture
def trained(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    bpe.main(["--input", str(tmp_path / "a.jsonl"), "--vocab_size", "350", "--to", str(tmp_path / "own" / "t.json")])
    return tmp_path / "own" / "t.json"


def test_shards_made_with_ones_own_tokenizer_carry_it(trained, tmp_path, in_process, capsys):
    command = ["--input", str(tmp_path / "a.jsonl"), "--out_dir", str(tmp_path / "out"), "--tokenizer"]
    prepare_fineweb.main([*command, str(trained)])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["end_of_text"]) == ("bpe", 350, 349)
    trained.rename(tmp_path / "elsewhere.json")
    words = tokenizer.load(meta)
    assert words.decode(words.encode(TEXTS[13]).tolist()) == TEXTS[13] and len(words.encode(TEXTS[13])) < len(TEXTS[13])
    assert texts_in(tmp_path / "out", words) == TEXTS
    prepare_fineweb.main(["--verify", str(tmp_path / "out")])
    assert "tokens below 350, 60 documents; hashes as in meta.json" in capsys.readouterr().out
    prepare_fineweb.main([*command, str(tmp_path / "elsewhere.json")])
    assert "is finished" in capsys.readouterr().out
    bpe.main(["--input", str(tmp_path / "a.jsonl"), "--vocab_size", "300", "--to", str(trained)])
    for name, message in (
        (str(trained), "--tokenizer bpe .*, not bpe "),
        ("gpt5", "expected gpt2, char, byte or the path"),
    ):
        with pytest.raises(SystemExit):
            prepare_fineweb.main([*command, name])
        assert message.split(".*")[0] in capsys.readouterr().err


def test_the_same_text_gives_the_same_tokenizer(trained, tmp_path):
    again = bpe.train(iter(TEXTS), 350)
    assert again == trained.read_text() == bpe.train(iter(TEXTS), 350)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vocab_size", "256"], "--vocab_size 256: expected a number from 257"),
        (["--vocab_size", "x"], "invalid int value"),
        (["--to", "/proc/nowhere/t.json"], "--to /proc/nowhere/t.json: cannot be written"),
        (["--text_column", "body"], "no column 'body'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    with pytest.raises(SystemExit) as end:
        bpe.main(["--input", str(tmp_path / "a.jsonl"), "--to", str(tmp_path / "t.json"), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_without_the_library_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        bpe.train(["text"], 300)
    with pytest.raises(UserError, match="pip install tokenizers"):
        tokenizer.load({"tokenizer": "bpe", "tokenizer_json": "{}"})


def test_a_number_of_two_tokens_is_refused():
    """<|endoftext|> is added behind as many tokens as there are, where a gap has put another."""
    text = json.loads(bpe.train(iter(TEXTS), 300))
    vocabulary = text["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 1
    text["added_tokens"] = []
    with pytest.raises(UserError, match="gives one number to two tokens"):
        tokenizer.load({"tokenizer": "bpe", "tokenizer_json": json.dumps(text)})


def test_a_tokenizer_of_too_many_tokens_is_refused():
    text = json.loads(bpe.train(iter(TEXTS), 300))
    text["model"]["vocab"]["far"] = 2**16
    with pytest.raises(UserError, match="has 65,537 tokens, and uint16 shards hold up to 65,536"):
        tokenizer.load({"tokenizer": "bpe", "tokenizer_json": json.dumps(text)})
