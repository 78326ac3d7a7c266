"""What prepare_fineweb.py promises: the same shards however it was run, and one line for what is wrong."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gpt2 import tokenizer
from gpt2.errors import UserError
from tests.conftest import refused, run, shared_data, start

TEXTS = [
    f"Document {i}: naïve café 東京 🙂 <|endoftext|> 'tis\n\n  " + "the quick brown fox " * (i % 7 * 9) + "\r\nend "
    for i in range(60)
]


def prepare(*arguments, **options):
    return run("prepare_fineweb.py", *arguments, **options)


def read_shard(path):
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    tokens = np.frombuffer(data[1024:], "<u2")
    assert len(tokens) == header[2]
    return tokens


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_in(folder, words=None):
    """The documents that the shards in `folder` hold, in order."""
    meta = json.loads((folder / "meta.json").read_text())
    words = words or tokenizer.load(meta["tokenizer"], meta["characters"])
    shards = meta["shards"]
    if meta["arguments"]["val_tokens"] is None:  # the rest of the first shard lies in the last
        shards = [shards[0], shards[-1], *shards[1:-1]]
    tokens = np.concatenate([read_shard(folder / shard["name"]) for shard in shards])
    assert tokens[0] == words.end_of_text
    starts = [*np.flatnonzero(tokens == words.end_of_text), len(tokens)]
    return [words.decode(tokens[start + 1 : end].tolist()) for start, end in zip(starts, starts[1:])]


def write_parquet(path, texts, row_group_size=10, **columns):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, **columns}), path, row_group_size=row_group_size)


def write_jsonl(path, texts):
    data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    if path.suffix == ".zst":
        data = pyarrow.compress(data[: len(data) // 2], "zstd", asbytes=True) + pyarrow.compress(
            data[len(data) // 2 :], "zstd", asbytes=True
        )
    path.write_bytes(data)


def write_text(path, texts):
    data = "\n---\n".join(texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


WRITERS = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.jsonl.zst": write_jsonl,
    "a.txt": write_text,
    "a.txt.gz": write_text,
}


@pytest.mark.parametrize(
    "name, words", [*((name, "byte") for name in WRITERS), ("a.parquet", "gpt2"), ("a.txt", "gpt2"), ("a.txt", "char")]
)
def test_every_kind_of_file_gives_the_documents_back(name, words, tmp_path):
    WRITERS[name](tmp_path / name, TEXTS)
    prepare(
        "--input",
        tmp_path / name,
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        words,
        "--shard_size",
        1009,
        "--val_tokens",
        100,
        "--document_separator",
        "---",
        "--workers",
        1,
    )
    assert texts_in(tmp_path / "out") == TEXTS
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["documents"] == len(TEXTS) and meta["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert [shard["tokens"] for shard in meta["shards"]][:2] == [100, 1009] and "_val_000000" in meta["shards"][0][
        "name"
    ]
    assert "whole" in prepare("--verify", tmp_path / "out").stdout


def test_folders_globs_and_whole_files(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_text(tmp_path / "in" / "b.txt", TEXTS[:2])
    write_text(tmp_path / "in" / "deep" / "c.txt", TEXTS[2:4])
    (tmp_path / "in" / "notes.md").write_text("not text to train on")
    (tmp_path / "a[1].txt").write_text("odd name")
    prepare(
        "--input",
        tmp_path / "a[1].txt",
        tmp_path / "in",
        tmp_path / "in" / "*.txt",
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--val_tokens",
        5,
    )
    assert texts_in(tmp_path / "out") == ["odd name", "\n---\n".join(TEXTS[:2]), "\n---\n".join(TEXTS[2:4])]


def test_filters_and_bad_rows(tmp_path):
    texts = ["good", None, "", "low", "long", "unscored", "last"]
    write_parquet(
        tmp_path / "a.parquet", texts, score=[3.5, 3, 3, 2.9, 4, None, 3], token_count=[5, 5, 5, 5, 500, 5, 5]
    )
    command = (
        "--input",
        tmp_path / "a.parquet",
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--val_tokens",
        2,
        "--min_score",
        3,
        "--max_tokens",
        499,
    )
    lines = refused(prepare(*command, check=False))
    assert len(lines) == 1 and "a.parquet: row 1: 'text' is null" in lines[0] and "--skip_bad" in lines[0]
    prepare(*command, "--skip_bad")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert texts_in(tmp_path / "out") == ["good", "last"] and (meta["filtered"], meta["skipped"]) == (3, 2)


@pytest.fixture(scope="module")
def novels(tmp_path_factory):
    """(a part of the novels as a file, the arguments that prepare it, their result undisturbed)."""
    folder = tmp_path_factory.mktemp("novels")
    table = pyarrow.parquet.read_table(shared_data("novels") / "novels-00000-of-00004.parquet")
    pyarrow.parquet.write_table(table[:1200], folder / "novels.parquet", row_group_size=300)
    arguments = ["--input", folder / "novels.parquet", "--shard_size", 20_003, "--val_tokens", 5_001]
    prepare(*arguments, "--out_dir", folder / "whole", "--workers", 1)
    return folder, arguments, files_in(folder / "whole")


@pytest.mark.parametrize("workers", [2, 5])
def test_the_shards_do_not_depend_on_the_number_of_workers(workers, novels, tmp_path):
    _, arguments, whole = novels
    prepare(*arguments, "--out_dir", tmp_path / "out", "--workers", workers)
    assert files_in(tmp_path / "out") == whole


def start_preparation(arguments, out_dir):
    return start("prepare_fineweb.py", *arguments, "--out_dir", out_dir, "--workers", 2)


def wait_for_shards(process, folder, count):
    while process.poll() is None and len(list(folder.glob("*.bin"))) < count:
        time.sleep(0.005)


def stopped_after(count, arguments, out_dir, how=signal.SIGKILL):
    """(exit code, stderr, seconds to its end) of a preparation that got the signal `how` at its `count`-th shard."""
    process = start_preparation(arguments, out_dir)
    wait_for_shards(process, out_dir, count)
    sent = time.monotonic()
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors, time.monotonic() - sent


def test_killed_at_twenty_moments_it_ends_with_the_same_bytes(novels, tmp_path):
    _, arguments, whole = novels
    out, draw, kills = tmp_path / "out", random.Random(0), 0
    while kills < 20:
        process = start_preparation(arguments, out)
        if draw.random() < 0.25:
            time.sleep(draw.random())
        else:
            wait_for_shards(process, out, len(list(out.glob("*.bin"))) + 1)
            time.sleep(0.03 * draw.random())
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was too fast: all over again
            shutil.rmtree(out)
            continue
        kills += 1
        there = {name: data for name, data in (files_in(out) if out.exists() else {}).items() if name.endswith(".bin")}
        assert all(whole[name] == data for name, data in there.items())
        assert process.returncode == -signal.SIGKILL
    prepare(*arguments, "--out_dir", out)
    assert files_in(out) == whole


def test_sigterm_ends_it_soon_and_says_how_to_go_on(novels, tmp_path):
    _, arguments, whole = novels
    code, errors, seconds = stopped_after(5, arguments, tmp_path, signal.SIGTERM)
    assert seconds < 5 and code == 130
    assert "the same command continues" in errors.splitlines()[-1] and "Traceback" not in errors
    lines = refused(prepare(*arguments, "--out_dir", tmp_path, "--shard_size", 7, check=False))
    assert len(lines) == 1 and "--shard_size 20003, not 7" in lines[0]
    lines = refused(run("train_gpt2.py", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/run", check=False))
    assert len(lines) == 1 and "is not all there" in lines[0]
    prepare(*arguments, "--out_dir", tmp_path)
    assert files_in(tmp_path) == whole


def test_two_at_once_do_not_write_the_same_folder(novels, tmp_path):
    _, arguments, whole = novels
    first = start_preparation(arguments, tmp_path)
    wait_for_shards(first, tmp_path, 2)
    first.send_signal(signal.SIGSTOP)
    lines = refused(prepare(*arguments, "--out_dir", tmp_path, check=False))
    first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=60) and first.returncode == 0
    assert len(lines) == 1 and "another preparation is writing there" in lines[0] and files_in(tmp_path) == whole


def test_a_damaged_shard_is_not_continued(novels, tmp_path):
    _, arguments, _ = novels
    stopped_after(5, arguments, tmp_path)
    os.truncate(tmp_path / "tokens_train_000001.bin", 5000)
    lines = refused(prepare(*arguments, "--out_dir", tmp_path, check=False))
    assert len(lines) == 1 and "tokens_train_000001.bin: 5000 bytes, expected" in lines[0]


def test_what_failed_before_its_first_shard_leaves_nothing_that_is_in_the_way(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", "text"])
    refused(prepare("--input", tmp_path / "a.jsonl", "--out_dir", tmp_path / "out", "--tokenizer", "byte", check=False))
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    prepare("--input", tmp_path / "b.jsonl", "--out_dir", tmp_path / "out", "--tokenizer", "char", "--val_tokens", 50)
    assert texts_in(tmp_path / "out") == TEXTS


def test_a_full_disk_loses_no_whole_shard(novels, tmp_path):
    _, arguments, whole = novels

    limits = {"RLIMIT_FSIZE": 30_000}  # the validation shard fits, the next does not
    lines = refused(prepare(*arguments, "--out_dir", tmp_path, check=False, limits=limits))
    assert len(lines) == 1 and "cannot be written" in lines[0] and "the same command continues" in lines[0]
    assert [path.name for path in tmp_path.glob("*.bin")] == ["tokens_val_000000.bin"] and not list(tmp_path.glob(".*"))
    prepare(*arguments, "--out_dir", tmp_path)
    assert files_in(tmp_path) == whole


def test_too_little_room_is_said_before_anything_is_read(novels, tmp_path, monkeypatch):
    import prepare_fineweb
    from gpt2.errors import UserError

    _, arguments, _ = novels
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(UserError, match="0.001 GB are free, but the whole needs about 0.00"):
        prepare_fineweb.prepare(prepare_fineweb.parse([*map(str, arguments), "--out_dir", str(tmp_path)]))


def test_a_finished_preparation_is_left_alone(novels):
    folder, arguments, whole = novels
    assert "is finished" in prepare(*arguments, "--out_dir", folder / "whole").stdout
    lines = refused(prepare(*arguments, "--out_dir", folder / "whole", "--tokenizer", "byte", check=False))
    assert len(lines) == 1 and "--tokenizer gpt2, not byte" in lines[0]
    with open(folder / "novels.parquet", "ab") as file:
        file.write(b"x")
    lines = refused(prepare(*arguments, "--out_dir", folder / "whole", check=False))
    os.truncate(folder / "novels.parquet", (folder / "novels.parquet").stat().st_size - 1)
    assert len(lines) == 1 and "novels.parquet" in lines[0] and files_in(folder / "whole") == whole


def test_a_dataset_streamed_by_the_library_datasets_gives_the_same_tokens(novels, tmp_path):
    """The hub's path, on a folder: killed after some shards, its continuation skips what was read."""
    folder, arguments, whole = novels
    (tmp_path / "dataset").mkdir()
    os.link(folder / "novels.parquet", tmp_path / "dataset" / "train.parquet")
    command = ["--dataset", tmp_path / "dataset", *arguments[2:]]
    stopped_after(60, command, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["position"]["number"] > 500
    prepare(*command, "--out_dir", tmp_path / "out")
    result = files_in(tmp_path / "out")
    assert [data for name, data in sorted(result.items()) if "train" in name] == [
        data for name, data in sorted(whole.items()) if "train" in name
    ]
    meta = json.loads(result["meta.json"])
    assert (
        meta["source"]["dataset"] == str(tmp_path / "dataset")
        and meta["documents"] == json.loads(whole["meta.json"])["documents"]
    )


def test_the_default_dataset_is_asked_for_by_its_names(tmp_path, monkeypatch):
    import datasets

    import prepare_fineweb

    write_parquet(tmp_path / "a.parquet", TEXTS)
    asked, load = [], datasets.load_dataset

    def served(*names, revision, **options):
        asked.append((names, options))
        return load("parquet", data_files=str(tmp_path / "a.parquet"), **options)

    monkeypatch.setattr("datasets.load_dataset", served)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare_fineweb.main(
        ["--out_dir", str(tmp_path / "out"), "--tokenizer", "byte", "--val_tokens", "9", "--workers", "1"]
    )
    assert texts_in(tmp_path / "out") == TEXTS and (tmp_path / "out" / "fineweb-edu_train_000001.bin").exists()
    assert set(map(str, asked)) == {
        str((("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True}))
    }


def test_a_finished_dataset_says_so_without_a_network(tmp_path):
    out = tmp_path / "out"
    write_parquet(tmp_path / "a.parquet", TEXTS)
    prepare("--input", tmp_path / "a.parquet", "--out_dir", out, "--tokenizer", "byte", "--val_tokens", "9")
    meta = json.loads((out / "meta.json").read_text())
    meta["source"] = {
        "dataset": "HuggingFaceFW/fineweb-edu",
        "name": "sample-10BT",
        "split": "train",
        "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    }
    (out / "meta.json").write_text(json.dumps(meta))  # as if it had come from the hub
    command = ("--out_dir", out, "--tokenizer", "byte", "--val_tokens", "9")
    assert "is finished" in prepare(*command, env={"HF_HUB_OFFLINE": "1"}).stdout
    lines = refused(prepare(*command, "--name", "sample-100BT", env={"HF_HUB_OFFLINE": "1"}, check=False))
    assert len(lines) == 1 and "--name sample-10BT, not sample-100BT" in lines[0]


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    lines = refused(prepare("--out_dir", tmp_path / "out", env={"HF_HUB_OFFLINE": "1"}, check=False))
    assert (
        len(lines) == 1
        and "HuggingFaceFW/fineweb-edu: the Hugging Face hub cannot be reached" in lines[0]
        and "--input" in lines[0]
    )
    assert not (tmp_path / "out").exists()


def bad_input(kind, folder):
    """Arguments that are wrong in the way `kind`, and what the one line must say."""
    path = folder / "a.jsonl"
    write_jsonl(path, TEXTS)
    if kind == "no such file":
        return [folder / "b.txt"], "b.txt: no such file"
    if kind == "empty glob":
        return [folder / "*.parquet"], "*.parquet: no such file"
    if kind == "empty folder":
        (folder / "empty").mkdir()
        return [folder / "empty"], "empty: no such file, and no folder"
    if kind == "unknown ending":
        (folder / "a.pdf").write_text("x")
        return [folder / "a.pdf"], "a.pdf: expected one of .parquet"
    if kind == "corrupt parquet":
        (folder / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
        return [folder / "a.parquet"], "a.parquet: cannot be read"
    if kind == "damaged parquet":
        write_parquet(folder / "a.parquet", [os.urandom(500).hex() for _ in range(100)])
        data = bytearray((folder / "a.parquet").read_bytes())
        data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
        (folder / "a.parquet").write_bytes(data)
        return [folder / "a.parquet"], "a.parquet: cannot be read"
    if kind == "no JSON":
        path.write_text('{"text": "a"}\n\n{"text": \n')
        return [path], "a.jsonl:3: is no JSON object; --skip_bad"
    if kind == "a list":
        path.write_text('{"text": "a"}\n["text"]\n')
        return [path], "a.jsonl:2: is no JSON object"
    if kind == "nested too deep":
        path.write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
        return [path], "a.jsonl:2: is no JSON object"
    if kind == "a score that is text":
        path.write_text('{"text": "a", "score": 3}\n{"text": "b", "score": "4"}\n')
        return [path, "--min_score", "3"], "a.jsonl:2: 'score' is no number; --skip_bad"
    if kind == "missing column":
        return [
            path,
            "--text_column",
            "body",
        ], "a.jsonl: no column 'body', which --text_column needs; there are id, text"
    if kind == "no score":
        return [path, "--min_score", "3"], "no column 'score', which --min_score needs"
    if kind == "a text without columns":
        (folder / "a.txt").write_text("text")
        return [path, folder / "a.txt", "--max_tokens", "9"], "a.txt: no column 'token_count', which --max_tokens needs"
    if kind == "null":
        path.write_text('{"text": "a"}\n{"text": null}\n')
        return [path], "a.jsonl:2: 'text' is null"
    if kind == "empty":
        path.write_text('{"text": "a"}\n{"text": ""}\n')
        return [path], "a.jsonl:2: 'text' is empty"
    if kind == "empty file":
        (folder / "a.txt").write_text("")
        return [folder / "a.txt"], "a.txt: is empty"
    if kind == "no UTF-8":
        (folder / "a.txt").write_bytes(b"caf\xe9 au lait")
        return [folder / "a.txt"], "a.txt: is not UTF-8 text"
    if kind == "truncated gzip":
        write_jsonl(folder / "a.jsonl.gz", TEXTS)
        os.truncate(folder / "a.jsonl.gz", (folder / "a.jsonl.gz").stat().st_size - 50)
        return [folder / "a.jsonl.gz"], "a.jsonl.gz: cannot be read"
    if kind == "something else there":
        (folder / "out").mkdir()
        (folder / "out" / "thesis.tex").write_text("x")
        return [path], "holds something else (thesis.tex)"
    if kind == "a file as out_dir":
        (folder / "out").write_text("x")
        return [path], "out: is a file"
    if kind == "not writable":
        return [path, "--out_dir", "/proc/nowhere"], "/proc/nowhere: cannot be written"
    if kind == "bad number":
        return [path, "--shard_size", "0"], "--shard_size 0: expected a number from 1"
    if kind == "too little":
        return [path, "--val_tokens", "1_000_000"], "which all went into the validation set"
    return [path, "--tokenizr", "byte"], "--tokenizr"


@pytest.mark.parametrize(
    "kind",
    [
        "no such file",
        "empty glob",
        "empty folder",
        "unknown ending",
        "corrupt parquet",
        "damaged parquet",
        "no JSON",
        "a list",
        "nested too deep",
        "a score that is text",
        "missing column",
        "no score",
        "a text without columns",
        "null",
        "empty",
        "empty file",
        "no UTF-8",
        "truncated gzip",
        "something else there",
        "a file as out_dir",
        "not writable",
        "bad number",
        "too little",
        "flag",
    ],
)
def test_bad_input_is_one_line(kind, tmp_path):
    arguments, expected = bad_input(kind, tmp_path)
    done = prepare(
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--val_tokens",
        2,
        "--input",
        *arguments,
        "--workers",
        1,
        check=False,
    )
    lines = refused(done)
    assert len(lines) == 1 and expected in lines[0], lines


@pytest.mark.parametrize("damage", ["a changed token", "a token too high", "truncated", "missing", "one too many"])
def test_verify_names_the_wrong_file(damage, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare("--input", tmp_path / "a.jsonl", "--out_dir", out, "--tokenizer", "byte", "--shard_size", 3000)
    path = out / "tokens_train_000001.bin"
    data = bytearray(path.read_bytes())
    if damage == "a changed token":
        data[2000:2002] = b"\x01\x00"
    elif damage == "a token too high":
        data[2000:2002] = b"\x01\x01"
    elif damage == "truncated":
        data = data[:-2]
    elif damage == "missing":
        path.unlink()
    else:
        path = out / "tokens_train_000999.bin"
    if damage != "missing":
        path.write_bytes(data)
    lines = refused(prepare("--verify", out, check=False))
    assert len(lines) == 1 and path.name in lines[0]


def test_verify_shows_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare("--input", tmp_path / "a.jsonl", "--out_dir", tmp_path / "out", "--tokenizer", "char", "--shard_size", 3000)
    shown = prepare("--verify", tmp_path / "out").stdout
    assert "Document 0: naïve café 東京 🙂" in shown and f"{len(TEXTS)} documents; hashes as in meta.json" in shown


@pytest.fixture
def main(in_process, capsys):
    """prepare_fineweb.py in this process: main(...) -> (exit code, what it printed, the lines of its errors)."""
    import prepare_fineweb

    def call(*arguments):
        code = 0
        try:
            prepare_fineweb.main([*map(str, arguments), "--workers", "1"])
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, [line for line in output.err.splitlines() if "error:" in line]

    return call


@pytest.mark.parametrize("tokens, sizes", [(95, [9, 86]), (1001, [100, 901]), (2500, [250, 1000, 500, 750])])
def test_without_val_tokens_a_tenth_is_for_validation(tokens, sizes, main, tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(tokens - 1))
    (tmp_path / "a.txt").write_text(text)
    shard_size = 10_000 if tokens < 2000 else 1000
    command = ("--input", tmp_path / "a.txt", "--out_dir", tmp_path / "out", "--tokenizer", "byte", "--shard_size")
    code, shown, errors = main(*command, shard_size)
    assert code == 0 and f"{tokens:,}, {sizes[0]:,} of them for validation" in shown, errors
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [shard["tokens"] for shard in meta["shards"]] == sizes and texts_in(tmp_path / "out") == [text]
    assert main("--verify", tmp_path / "out")[0] == 0


def test_of_ten_shards_and_more_the_first_is_for_validation(main, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 10_000)
    command = ("--input", tmp_path / "a.txt", "--out_dir", tmp_path / "out", "--tokenizer", "byte")
    assert main(*command, "--shard_size", 1000)[0] == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [shard["tokens"] for shard in meta["shards"]] == [1000] * 10 + [1]


@pytest.mark.parametrize("files", [0, 1, 2])
def test_killed_while_the_validation_shard_is_parted_it_ends_with_the_same_bytes(files, main, tmp_path, monkeypatch):
    from gpt2.shards import ShardFile

    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(2499)))
    command = ("--input", tmp_path / "a.txt", "--tokenizer", "byte", "--shard_size", 1000, "--out_dir")
    assert main(*command, tmp_path / "whole")[0] == 0
    close, closed = ShardFile.close, []

    def die(shard):
        if len(closed) == 3 + files:
            raise KeyboardInterrupt
        closed.append(close(shard))
        if len(closed) == 3 + files == 5:
            raise KeyboardInterrupt
        return closed[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "close", die)
        assert main(*command, tmp_path / "out")[0] == 130
    assert main(*command, tmp_path / "out")[0] == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "x"])
def test_too_little_text_says_so(text, main, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" if text else "\n")
    code, _, errors = main("--input", tmp_path / "a.jsonl", "--out_dir", tmp_path / "out", "--tokenizer", "byte")
    if text:
        assert code == 0  # a token for each
    else:
        assert code == 2 and len(errors) == 1 and "has 0 tokens, too few for training and validation" in errors[0]


NASTY = {
    "blanks": " " * 1_100_000 + "word",
    "line breaks": "\n" * 1_100_000 + "word",
    "one letter": "a" * 1_000_000,
    "combining": "e" + "\u0301" * 300_000,
    "zero bytes": "\0" * 100_000,
    "lone surrogates": "a\ud800b\udfff",
    "nested emoji": "👩‍👩‍👧‍👦" * 5000,
    "special": "<|endoftext|>" * 1000,
    "right to left": "\u202e\u2066" * 10_000,
}


def test_no_text_ends_a_preparation(main, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("tiktoken")))
    lines = [json.dumps({"text": text}) + "\n" for text in NASTY.values()]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    code, _, errors = main("--input", tmp_path / "a.jsonl", "--out_dir", tmp_path / "out")
    assert code == 0, errors
    expected = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in NASTY.values()]
    assert texts_in(tmp_path / "out") == expected


def test_a_text_that_cannot_be_tokenized_is_named_and_can_be_left_out(main, tmp_path, monkeypatch):
    class Panic(BaseException):
        pass

    def encode(text):
        if "bad" in text:
            raise Panic("index out of range\nnote: run with RUST_BACKTRACE=1")
        return words.encode(text)

    words = tokenizer.byte()
    monkeypatch.setattr("gpt2.tokenizer.byte", lambda: dataclasses.replace(words, encode=encode))
    tokenizer.built.cache_clear()
    write_parquet(tmp_path / "a.parquet", ["good", "bad", "better"])
    command = ("--input", tmp_path / "a.parquet", "--out_dir", tmp_path / "out", "--tokenizer", "byte")
    code, _, errors = main(*command)
    assert code == 2 and len(errors) == 1
    assert "a.parquet: row 1: cannot be tokenized: Panic: index out of range; --skip_bad" in errors[0]
    code, shown, _ = main(*command, "--skip_bad")
    tokenizer.built.cache_clear()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert code == 0 and meta["skipped"] == 1 and texts_in(tmp_path / "out") == ["good", "", "better"]
    assert "documents skipped" in shown


@pytest.mark.parametrize("damage", ["cut off", "a changed number", "a list", "deep", "no check"])
def test_a_damaged_progress_json_is_named(damage, main, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 5000)
    command = (
        "--input",
        tmp_path / "a.txt",
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--shard_size",
        1000,
    )
    with monkeypatch.context() as patch:
        patch.setattr("gpt2.preparation.Preparation.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(*command)[0] == 130
    path = tmp_path / "out" / "progress.json"
    text = path.read_text()
    state = json.loads(text)
    path.write_text(
        {
            "cut off": text[:-20],
            "a changed number": text.replace('"taken": ', '"taken": 1'),
            "a list": "[1]",
            "deep": "[" * 100_000,
            "no check": json.dumps({name: value for name, value in state.items() if name != "check"}),
        }[damage]
    )
    code, _, errors = main(*command)
    assert code == 2 and len(errors) == 1 and "progress.json: is damaged" in errors[0]
    path.write_text(text)
    assert main(*command)[0] == 0


def test_a_file_that_changed_but_in_size_is_another(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_jsonl(path, TEXTS)
    prepare("--input", path, "--out_dir", out, "--tokenizer", "byte")
    before = files_in(out)
    os.utime(path, (0, 0))
    assert "is finished" in prepare("--input", path, "--out_dir", out, "--tokenizer", "byte").stdout
    path.write_text(path.read_text().replace("brown", "BROWN"))
    lines = refused(prepare("--input", path, "--out_dir", out, "--tokenizer", "byte", check=False))
    assert len(lines) == 1 and "was begun with other --input files" in lines[0] and files_in(out) == before
    meta = json.loads((out / "meta.json").read_text())  # as an older version wrote it, which knew but the size
    meta["source"]["input"] = [file[:2] for file in meta["source"]["input"]]
    (out / "meta.json").write_text(json.dumps(meta))
    assert "is finished" in prepare("--input", path, "--out_dir", out, "--tokenizer", "byte").stdout


def test_what_another_preparation_wrote_before_the_lock_is_not_overwritten(tmp_path, monkeypatch, capsys):
    import prepare_fineweb

    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--out_dir", str(out), "--tokenizer", "byte", "--val_tokens"]
    opened, nested = prepare_fineweb.Files.open, []

    def finished_meanwhile(source):
        opened(source)
        if not nested:
            nested.append(True)
            prepare_fineweb.prepare(prepare_fineweb.parse([*arguments, "9"]))

    monkeypatch.setattr(prepare_fineweb.Files, "open", finished_meanwhile)
    with pytest.raises(UserError, match="another preparation has just written there: give the command again"):
        prepare_fineweb.prepare(prepare_fineweb.parse([*arguments, "9"]))
    assert texts_in(out) == TEXTS
    prepare_fineweb.prepare(prepare_fineweb.parse([*arguments, "9"]))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("option, words", [("--workers=99999", "1 to 1,024"), ("--min_score=nan", "expected a number")])
def test_numbers_that_no_preparation_can_use_are_one_line(option, words, tmp_path):
    lines = refused(prepare("--input", "a.jsonl", "--out_dir", tmp_path / "out", option, check=False))
    assert len(lines) == 1 and words in lines[0]
