"""Every command: its --help is whole, and what it does not understand is one line."""

import argparse
import importlib
import re
import sys

import pytest

import train_gpt2
from gpt2 import errors
from gpt2.config import FIELDS
from gpt2.files import write_atomically
from tests.conftest import ROOT, refused, run

FOLDERS = ("bench", "gpt2", "lenet", "study")
FILES = [ROOT / "prepare_fineweb.py", *sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if re.search(r'^if __name__ == "__main__":\n(    with .*\n    )?    main\(', path.read_text(), re.M)
]


class Parsed(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    """Calls the main of a module, up to where it has made its parser; returns that."""

    def stop(parser, *_, **__):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def call(name):
        module = importlib.import_module(name)
        with pytest.raises(Parsed) as parsed:
            module.main(*([[]] if module.main.__code__.co_argcount else []))
        return parsed.value.args[0]

    return call


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole(parser_of, name):
    pytest.importorskip("pyarrow")
    parser = parser_of(name)
    assert isinstance(parser, errors.Parser), "so that a wrong option is one line"
    assert parser.prog == (f"python -m {name}" if "." in name else f"{name}.py")
    assert parser.description and "usage: " in parser.format_help()
    lacking = [action.dest for action in parser._actions if not action.help]
    assert not lacking, "options without a word"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_value_is_refused_where_it_has_no_meaning(parser_of, name):
    pytest.importorskip("pyarrow")
    parser = parser_of(name)
    for action in parser._actions:
        if action.nargs != 0 and action.default != "" and action.dest not in ("help", "document_separator"):
            with pytest.raises((argparse.ArgumentError, errors.UserError)):
                parser._get_value(action, "")


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("train", ["--rounds", "0"], "--rounds: expected a whole number from 1, not 0"),
        ("train", ["--vocab_size", "65", "-1"], "expected a whole number from 1, not -1"),
        ("ladder", ["--nanogpt", "nowhere"], "nowhere: holds no model.py: expected a checkout of nanoGPT"),
        ("decode", ["--nanogpt", "nowhere"], "expected a checkout of nanoGPT"),
        ("decode", ["--new", "1024"], "--new 1024: expected 0 to 1023"),
        ("lenet", ["--rounds", "none"], "--rounds: expected a whole number from 1, not none"),
        ("prune", ["--steps", "0"], "--steps: expected a whole number from 1"),
        ("prune", ["--tokens", "129"], "--tokens 129: the context of quickstart is 128 tokens"),
        ("select", ["--layers", "0"], "--layers: expected a whole number from 1"),
        ("stops", ["--ranks", "0"], "--ranks: expected a whole number from 1"),
        ("scaling", ["--ranks", "0"], "--ranks: expected a whole number from 1"),
        ("scaling", ["--ranks", "1", "3"], "--ranks 1 3: expected divisors of 16, 1 among them"),
        ("scaling", ["--ranks", "2"], "--ranks 2: expected divisors of 16, 1 among them"),
        ("scaling", ["--to", "file"], "cannot be written"),
        ("safety", ["--to", "file"], "cannot be written"),
        ("prepare", ["--input", "nowhere"], "nowhere: cannot be read"),
        ("prepare", ["--input", "file"], "file: cannot be read"),
        ("gpu", ["same", ".", "one", "other"], "one: no such run"),
    ],
)
def test_what_a_measurement_cannot_take_is_one_line_before_it_begins(name, arguments, words, monkeypatch, tmp_path):
    pytest.importorskip("pyarrow")
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(errors.UserError) as error:
        module.main()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkout_of_nanogpt_that_is_none_is_one_line(monkeypatch):
    from bench import train

    monkeypatch.setenv("NANOGPT", "nowhere")
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(errors.UserError, match="nowhere: holds no model.py"):
        train.main()


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_folder_is_no_file_to_write(path):
    with pytest.raises(IsADirectoryError):
        write_atomically(path, b"")


def test_help_of_training_names_every_option(capsys):
    train_gpt2.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^  --{name}=", text, re.M) for name in FIELDS)


TOO_LONG = "/tmp/" + "x" * 300  # an error even where it is only looked at, as a path that nobody may see


@pytest.mark.parametrize(
    "command",
    [
        ("train_gpt2.py", "--out_dir={}"),
        ("train_gpt2.py", "--data_dir={}"),
        ("train_gpt2.py", "--init_from={}"),
        ("train_gpt2.py", "{}.py"),
        ("prepare_fineweb.py", "--input", "README.md", "--out_dir", "{}"),
        ("prepare_fineweb.py", "--input", "{}"),
        ("prepare_fineweb.py", "--verify", "{}"),
        ("-m gpt2.sample", "{}"),
        ("-m gpt2.evaluate", "{}"),
        ("-m gpt2.export", "{}", "--to", "x"),
        ("-m gpt2.picture", "{}"),
        ("-m gpt2.report", "{}"),
        ("-m gpt2.convert", "{}", "--to", "x"),
        ("-m gpt2.bpe", "--input", "{}", "--to", "x"),
        ("-m gpt2.kjv", "{}"),
        ("-m lenet.train", "--data-dir", "{}"),
        ("-m lenet.plots", "{}"),
        ("-m study.report", "--results", "{}"),
        ("-m study.run", "{}.py"),
    ],
    ids=" ".join,
)
def test_a_path_that_cannot_be_looked_at_is_one_line(command, tmp_path):
    lines = refused(run(*(part.format(TOO_LONG) for part in command), check=False))
    assert len(lines) == 1 and "xxxx" in lines[0]
