"""Kernels are compiled wherever a compiler is, and otherwise are not there."""

import shutil
import warnings

import pytest

from pruning.native import compiled


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_home_that_takes_no_files_costs_the_library_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }')
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="seven are compiled for this process alone"):
        assert compiled(tmp_path / "seven.cpp").seven() == 7
    (tmp_path / "seven.cpp").write_text("no C++")
    with pytest.warns(UserWarning, match="seven are compiled"):
        assert compiled(tmp_path / "seven.cpp") is None


@pytest.mark.parametrize("lacking", ["a compiler", "Linux"])
def test_without_a_compiler_or_linux_there_is_nothing_and_no_warning(lacking, tmp_path, monkeypatch):
    (tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }')
    if lacking == "Linux":
        monkeypatch.setattr("sys.platform", "darwin")
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    with warnings.catch_warnings(action="error"):
        assert compiled(tmp_path / "seven.cpp") is None
