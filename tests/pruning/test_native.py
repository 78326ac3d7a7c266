"""Kernels are compiled wherever a compiler is, and otherwise are not there."""

import shutil
import warnings

import pytest

from pruning.native import compiled

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def seven(tmp_path, monkeypatch):
    """A source, whose library is kept in a folder of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    return source


@compiler
def test_a_home_that_takes_no_files_costs_the_library_nothing_but_time(seven, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="seven are compiled for this process alone"):
        assert compiled(seven).seven() == 7
    seven.write_text("no C++")
    with warnings.catch_warnings(action="error"):
        assert compiled(seven) is None


@compiler
def test_a_library_is_kept_and_made_anew_where_it_is_damaged(seven, tmp_path, monkeypatch):
    assert compiled(seven).seven() == 7
    (library,) = (tmp_path / "kept").iterdir()
    library.write_bytes(b"")
    assert compiled(seven).seven() == 7 and library.stat().st_size
    monkeypatch.setattr("pruning.native.compile_into", None)  # nothing is compiled twice
    assert compiled(seven).seven() == 7


@compiler
def test_a_command_may_stand_before_the_compiler(seven, monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    assert compiled(seven).seven() == 7
    monkeypatch.setenv("CXX", "")
    assert compiled(seven).seven() == 7


@compiler
def test_what_cannot_be_loaded_is_not_kept(seven, tmp_path):
    seven.write_text('extern "C" int six(); extern "C" int seven() { return six() + 1; }')
    with warnings.catch_warnings(action="error"):
        assert compiled(seven) is None
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("lacking", ["a compiler", "Linux", "a program"])
def test_without_a_compiler_or_linux_there_is_nothing_and_no_warning(lacking, seven, tmp_path, monkeypatch):
    if lacking == "Linux":
        monkeypatch.setattr("sys.platform", "darwin")
    else:
        (tmp_path / "compiler").write_bytes(b"\x7f")
        (tmp_path / "compiler").chmod(0o755)
        monkeypatch.setenv("CXX", "no-such-compiler" if lacking == "a compiler" else str(tmp_path / "compiler"))
    with warnings.catch_warnings(action="error"):
        assert compiled(seven) is None
