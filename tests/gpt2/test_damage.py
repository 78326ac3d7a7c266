"""Damaged and hostile files: what is read from a disk is what was written, or passed over, or refused in a line."""

import errno
import json
import os
import random
import shutil
import struct

import pytest
import torch

from gpt2 import checkpoint, hellaswag, hugging_face, load, report, shards, writer
from gpt2.errors import UserError
from gpt2.files import Lines
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from tests.conftest import PRUNED, SMALL

STEPS = (10, 20)


def folder_of(out_dir, step):
    return out_dir / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """An out_dir with two checkpoints, and step -> (manifest, name -> tensors) of them."""
    out_dir, torch_random = tmp_path_factory.mktemp("intact"), torch.Generator().manual_seed(0)
    with writer.Writer(out_dir, keep=2) as out:
        for step in STEPS:
            files = {name: {"w": torch.randn(30, 4, generator=torch_random)} for name in checkpoint.FILES}
            out.save(step, files, config={"n_layer": 2, "learning_rate": 1e-3}, val_loss=1.25 + step)
    return out_dir, {
        step: loaded(folder_of(out_dir, step), checkpoint.verify(folder_of(out_dir, step))) for step in STEPS
    }


def loaded(path, manifest):
    tensors = {name: checkpoint.open_tensors(path, name) for name in checkpoint.FILES}
    return manifest, {name: {key: t[...].tolist() for key, t in parts.items()} for name, parts in tensors.items()}


def damage(folder, generator):
    """One thing that disks, copies and people do to the files of two checkpoints in a folder; returns what it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    one, other = generator.sample(files, 2)
    data = one.read_bytes()
    kind = generator.choice(
        ["flip", "flip", "flip", "cut", "grow", "delete", "swap", "zero", "folders", "folder", "copy"]
    )
    if kind == "flip":
        position = generator.randrange(len(data))
        changed = bytearray(data)
        changed[position] ^= 1 << generator.randrange(8)
        one.write_bytes(changed)
    elif kind == "cut":
        one.write_bytes(data[: generator.randrange(len(data))])
    elif kind == "grow":
        one.write_bytes(data + generator.randbytes(generator.randrange(1, 9)))
    elif kind == "delete":
        one.unlink()
    elif kind == "swap":
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "copy":
        one.write_bytes(other.read_bytes())
    elif kind == "zero":
        one.write_bytes(bytes(len(data)))
    elif kind == "folder":
        one.unlink()
        one.mkdir()
    else:
        first, second = sorted(folder.iterdir())
        first.rename(folder / "between")
        second.rename(first)
        (folder / "between").rename(second)
    return kind, str(one)


def test_500_damaged_checkpoints_never_give_wrong_numbers(intact, tmp_path, capfd):
    source, known = intact
    generator, fell_back = random.Random(0), 0
    for number in range(500):
        out_dir = tmp_path / "run"
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.copytree(source, out_dir)
        what = [damage(out_dir / "checkpoints", generator) for _ in range(generator.choice([1, 1, 1, 2]))]
        found = checkpoint.newest(out_dir, put_aside=number % 2 == 0)
        warned = "skipping the damaged checkpoint" in capfd.readouterr().err
        if found is None:
            assert warned, what
            continue
        assert loaded(*found) == known[found[1]["step"]], what
        if found[1]["step"] != STEPS[-1]:
            fell_back += 1
            assert warned or any(kind == "delete" for kind, _ in what), what
    assert fell_back > 100, "the test wants damage that matters"


def test_a_newer_format_is_refused_by_version_and_an_older_one_is_read(intact, tmp_path):
    source, known = intact
    for key, value in (("format", 99), ("format", None)):
        out_dir = tmp_path / str(value)
        shutil.copytree(source, out_dir)
        for step in STEPS:
            path = folder_of(out_dir, step) / "manifest.json"
            manifest = json.loads(path.read_text())
            manifest.pop("checksum")
            manifest.pop(key)
            path.write_text(json.dumps(manifest | ({key: value} if value else {})))
        if value:
            with pytest.raises(UserError, match="format 99, this version reads up to 2"):
                checkpoint.newest(out_dir, put_aside=True)
            assert len(os.listdir(out_dir / "checkpoints")) == 2
        else:
            assert loaded(*checkpoint.newest(out_dir))[1] == known[STEPS[-1]][1]


HOSTILE_JSON = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "no text": b"\xff\xfe\x00{",
    "list": "[1, 2]",
    "huge number": "1" * 10_000,
    "nan": '{"step": NaN, "config": {}, "files": {}}',
    "kinds": '{"step": "1", "config": [], "files": 3}',
    "leaves its folder": '{"step": 20, "config": {}, "files": {"../../../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "absolute": '{"step": 20, "config": {}, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "huge claim": json.dumps(
        {"step": 20, "config": {}, "files": {name: {"bytes": 1 << 70, "sha256": "0"} for name in checkpoint.FILES}}
    ),
    "negative": '{"step": -20, "config": {}, "files": {}}',
}


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_hostile_manifests_are_one_line(kind, intact, tmp_path):
    shutil.copytree(intact[0], tmp_path / "run")
    path, text = folder_of(tmp_path / "run", 20), HOSTILE_JSON[kind]
    (path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        checkpoint.at(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert checkpoint.newest(tmp_path / "run")[1]["step"] == 10


@pytest.mark.parametrize(
    "name, read",
    [
        ("config.json", hugging_face.sizes_of),
        (hugging_face.INDEX, hugging_face.weight_files),
        (load.ORIGIN, load.known),
        ("meta.json", shards.read_meta),
        ("config.json", lambda folder: report.read_run(folder, "run", 0)),
        ("items.jsonl", lambda folder: hellaswag.read_items(folder / "items.jsonl")),
    ],
)
def test_json_that_is_nested_too_deep_is_one_line_wherever_it_lies(name, read, tmp_path):
    for text in (HOSTILE_JSON["deep"], HOSTILE_JSON["deep object"]):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="nested too deep"):
            read(tmp_path)


def sealed(path):
    """Make the manifest agree with the files that lie there, as somebody who wants to be read would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in checkpoint.FILES:
        file = path / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": checkpoint.digest(file)}
    manifest["checksum"] = checkpoint.checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def hostile_headers():
    """safetensors files whose header is not to be trusted."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    pack = lambda header, data=bytes(8): struct.pack("<Q", len(header)) + header + data
    yield "huge header", struct.pack("<Q", 1 << 62) + b"{}"
    yield "deep header", pack(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)
    yield "no text", pack(b"\xff\xfe{}")
    yield "empty", b""
    yield "beyond the end", pack(json.dumps({"w": tensor | {"data_offsets": [0, 1 << 40]}}).encode())
    yield "huge shape", pack(json.dumps({"w": tensor | {"shape": [1 << 62, 1 << 62]}}).encode())
    yield "negative", pack(json.dumps({"w": tensor | {"shape": [-2]}}).encode())
    yield "backwards", pack(json.dumps({"w": tensor | {"data_offsets": [8, 0]}}).encode())
    yield "overlap", pack(json.dumps({"w": tensor, "x": tensor}).encode())
    yield "unknown dtype", pack(json.dumps({"w": tensor | {"dtype": "X9"}}).encode())
    yield "pickle", b"\x80\x04\x95" + bytes(40)
    yield "other names", pack(json.dumps({"w": tensor}).encode())


@pytest.mark.parametrize("kind, data", [*hostile_headers()], ids=[kind for kind, _ in hostile_headers()])
def test_hostile_safetensors_are_one_line(kind, data, intact, tmp_path):
    shutil.copytree(intact[0], tmp_path / "run")
    path, model = folder_of(tmp_path / "run", 20), GPT(GPTConfig(8, 10, 1, 1, 8))
    for name in checkpoint.FILES:
        (path / name).write_bytes(data)
    sealed(path)
    checkpoint.verify(path)
    with pytest.raises(UserError) as refused:
        checkpoint.load_model(model, checkpoint.open_tensors(path, "model.safetensors"))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError):
        optimizer = make_optimizer(model, Settings)
        checkpoint.load_optimizer(optimizer, model.tensors(), checkpoint.open_tensors(path, "optimizer.safetensors"))


class Settings:
    """What make_optimizer asks of a config."""

    optimizer, learning_rate, beta1, beta2, weight_decay, momentum = "adamw", 1e-3, 0.9, 0.95, 0.1, 0.9


def test_states_of_another_shape_are_refused(tmp_path):
    model = GPT(GPTConfig(8, 10, 1, 1, 8))
    states = {f"{name}.exp_avg": torch.zeros(3) for name in model.tensors()}
    with pytest.raises(UserError, match="in the checkpoint"):
        checkpoint.load_optimizer(make_optimizer(model, Settings), model.tensors(), states)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(zygote, data_dir, tmp_path):
    """RLIMIT_FSIZE lets every file grow to 64 KiB alone: the checkpoint of the run does not fit."""
    arguments = [
        *SMALL,
        *PRUNED,
        "--gradient_accumulation_steps=2",
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path / 'run'}",
    ]
    done = zygote.run(*arguments, limits={"RLIMIT_FSIZE": 1 << 16})
    lines = done.refused()
    assert len(lines) == 1 and "step 30 could not be written" in lines[0] and "give the same command again" in lines[0]
    for step in (10, 20, 30):
        assert f"step {step} could not be written" in done.output
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 30
    assert zygote.run(*arguments).codes == [0], "with room again, the same command is right"


def test_metrics_of_a_disk_that_was_full_for_a_while_are_not_lost(tmp_path, monkeypatch, capfd):
    lines = Lines(tmp_path / "metrics.jsonl")

    class Full:
        """A file of which only some bytes fit."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            part, self.room = data[: self.room], max(0, self.room - len(data))
            return self.file.write(part)

        def close(self):
            self.file.close()

    lines.file = Full(lines.file, 10)
    for number in range(3):
        lines.write(f"line {number}\n")
    lines.file.room = 1000
    lines.write("line 3\n")
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "line 0\nline 1\nline 2\nline 3\n"
    assert capfd.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_for_now_is_not_taken_for_a_damaged_one(intact, tmp_path, number, monkeypatch):
    shutil.copytree(intact[0], tmp_path / "run")
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())

    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "digest", fail)
    with pytest.raises(UserError, match="the same command continues once it can"):
        checkpoint.newest(tmp_path / "run", put_aside=True)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before
