"""Small finished runs, trained inside the test process, and the commands called inside it too."""

import contextlib
import io

import pytest

import prepare_fineweb
import train_gpt2
from gpt2 import errors
from tests.conftest import PRUNED, SMALL

TEXT = "the cat sat on the mat and the dog sat on the log. Ünder the räin\n" * 300


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """tokenizer -> out_dir of a run of 30 steps, pruned to 50 %, on a small text."""
    runs = {}

    def train(tokenizer):
        if tokenizer not in runs:
            folder = tmp_path_factory.mktemp(tokenizer)
            (folder / "text.txt").write_text(TEXT)
            prepared = ["--input", folder / "text.txt", "--out_dir", folder / "data", "--tokenizer", tokenizer]
            data, out = f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare_fineweb.main([*map(str, prepared), "--val_tokens", "2000"])
                train_gpt2.main([*SMALL, *PRUNED, data, out, "--gradient_accumulation_steps=2"])
            runs[tokenizer] = folder / "run"
        return runs[tokenizer]

    return train


@pytest.fixture
def command(capsys, monkeypatch):
    """Calls a module's main(arguments) as its command does; returns (exit code, stdout, stderr)."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(errors, "exit_at_once", leave)

    def call(module, *arguments):
        code = 0
        capsys.readouterr()
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
