"""Every command: its --help is whole, and what it does not understand is one line."""

import argparse
import importlib
import re

import pytest

import train_gpt2
from gpt2 import errors
from gpt2.config import FIELDS
from tests.conftest import ROOT

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


def test_help_of_training_names_every_option(capsys):
    train_gpt2.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^  --{name}=", text, re.M) for name in FIELDS)
