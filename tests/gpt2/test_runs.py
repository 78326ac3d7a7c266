"""A run stands on its own: it can be moved, its data prepared anew or removed; given again, its command is right."""

import json
import os
import shutil

import pytest

import train_gpt2
from gpt2 import checkpoint, data, evaluate, picture, sample
from gpt2.shards import find_shards
from tests.conftest import PRUNED, SMALL, write_shard


@pytest.fixture
def moved(finished_run, tmp_path):
    """The folder of a character run, moved away from its data, and what it was trained with."""
    out_dir = finished_run("char")
    shutil.copytree(out_dir, tmp_path / "moved")
    return tmp_path / "moved"


def edit_manifests(out_dir, change):
    """Change the manifests of a run, as an earlier version would have written them: without format and checksum."""
    for path in out_dir.glob("checkpoints/step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["format"], manifest["checksum"]
        change(manifest)
        path.write_text(json.dumps(manifest))


def other_data(folder, characters):
    """Data of as many tokens as those of `finished_run`'s, by other letters."""
    folder.mkdir()
    for split, number in (("val", 0), ("train", 1)):
        write_shard(folder / f"text_{split}_{number:06d}.bin", [1, 2, 3] * 800)
    meta = {"tokenizer": "char", "characters": characters, "vocab_size": len(characters) + 1}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_moved_run_is_sampled_without_its_data(moved, command):
    edit_config_of_data(moved, "/nowhere")
    code, output, _ = command(sample, moved, "--prompt", "the", "--max_new_tokens", 5, "--device", "cpu")
    assert code == 0 and output.startswith("the")


def edit_config_of_data(out_dir, data_dir):
    edit_manifests(out_dir, lambda manifest: manifest["config"].update(data_dir=str(data_dir)))


def test_data_prepared_anew_with_other_letters_are_refused(moved, command, tmp_path):
    letters = json.loads(newest_manifest(moved).read_text())["tokenizer"]["characters"]
    other_data(tmp_path / "anew", "".join(chr(ord(letter) + 1) for letter in letters))
    code, _, errors = command(evaluate, moved, "--data_dir", tmp_path / "anew", "--device", "cpu")
    assert code == 2 and "prepared with the tokenizer char" in errors and errors.count("\n") == 1


def newest_manifest(out_dir):
    return sorted(out_dir.glob("checkpoints/*/manifest.json"))[-1]


def test_a_checkpoint_without_its_tokenizer_asks_its_data_if_they_are_still_the_same(moved, command, tmp_path):
    edit_manifests(moved, lambda manifest: manifest.pop("tokenizer"))
    arguments = (sample, moved, "--max_new_tokens", 5, "--device", "cpu")
    assert command(*arguments)[0] == 0
    data_dir = json.loads(newest_manifest(moved).read_text())["config"]["data_dir"]
    other_data(tmp_path / "anew", "abc")
    code, _, errors = command(*arguments, "--data_dir", tmp_path / "anew")
    assert code == 2 and "is not the data that" in errors and "--data_dir" in errors
    for path in moved.glob("checkpoints/*/manifest.json"):
        path.write_text(path.read_text().replace(data_dir, str(tmp_path / "nowhere")))
    code, _, errors = command(*arguments)
    assert code == 2 and "does not hold its tokenizer" in errors and errors.count("\n") == 1


def test_other_tokens_of_equal_number_are_other_data(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    before = data.describe_data(tmp_path / "data", find_shards(tmp_path / "data", "train"))
    path = tmp_path / "data" / "toy_train_000002.bin"
    changed = bytearray(path.read_bytes())
    changed[2000] ^= 1
    path.write_bytes(changed)
    after = data.describe_data(tmp_path / "data", find_shards(tmp_path / "data", "train"))
    same = [checkpoint.same_shard(b[1:], a[1:]) for b, a in zip(before["data"], after["data"], strict=True)]
    assert same == [True, False, True]
    assert checkpoint.same_shard([5], [5, "sha256:x"]) and not checkpoint.same_shard([5], [6, "sha256:x"])


def test_of_large_data_meta_json_or_samples_are_asked(data_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SCAN_TOKENS", 1)
    shutil.copytree(data_dir, tmp_path / "data")
    shards = find_shards(tmp_path / "data", "train")
    sampled = data.describe_data(tmp_path / "data", shards)["data"]
    assert all(row[2].startswith("samples:") for row in sampled) and len({row[2] for row in sampled}) == 3
    meta = {
        "tokenizer": "byte",
        "shards": [{"name": row[0], "tokens": row[1], "documents": 1, "sha256": "abc"} for row in sampled],
    }
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    assert [row[2] for row in data.describe_data(tmp_path / "data", shards)["data"]] == ["sha256:abc"] * 3


def arguments_of(out_dir, tokenizer="char"):
    data_dir = json.loads((out_dir / "config.json").read_text())["data_dir"]
    return [*SMALL, *PRUNED, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--gradient_accumulation_steps=2"]


@pytest.mark.parametrize("data_are_gone", [False, True])
def test_a_finished_run_says_so_and_gets_its_picture(data_are_gone, moved, command, tmp_path):
    (moved / "training.png").unlink()
    arguments = arguments_of(moved) + ([f"--data_dir={tmp_path / 'nowhere'}"] if data_are_gone else [])
    code, output, errors = command(train_gpt2, *arguments)
    assert code == 0 and not errors
    assert "is finished (30 of 30 steps) at 50.00% sparsity" in output and ", val_loss" in output
    assert (moved / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_sequences_in_other_micro_batches_are_the_same_run(moved, command):
    arguments = arguments_of(moved)
    changed = [*arguments, "--batch_size=1", "--gradient_accumulation_steps=4"]
    assert command(train_gpt2, *changed)[0] == 0
    code, _, errors = command(train_gpt2, *arguments, "--batch_size=4")
    assert code == 2 and "batch_size is 2 there, 4 here" in errors


def test_files_are_as_readable_as_the_umask_says(finished_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in finished_run("char").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and len(files) > 6


def test_the_picture_of_a_run_under_way(tmp_path, command):
    lines = [{"step": step, "train_loss": 4.0 - step / 10, "sparsity": step / 100} for step in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "train_lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    code, output, _ = command(picture, tmp_path)
    assert code == 0 and output.strip().endswith("training.png") and (tmp_path / "training.png").exists()
    code, _, errors = command(picture, tmp_path / "nowhere")
    assert code == 2 and "holds no metrics.jsonl" in errors


def test_sparsity_lies_behind_the_curves_in_steps_and_the_legend_outside():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    lines = [
        {"step": step, "train_loss": 1.0, "sparsity": sparsity} for step, sparsity in ((0, 0), (10, 0.5), (20, 0.5))
    ]
    (area,) = picture.plot_sparsity(axis, lines)
    behind = next(other for other in figure.axes if other is not axis)
    assert behind.get_zorder() < axis.get_zorder() and not axis.patch.get_visible()
    heights = {round(y) for x, y in area.get_paths()[0].vertices if x < 10}
    assert heights == {0}, "nothing rises before the update"
    plt.close(figure)
