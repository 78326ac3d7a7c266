"""What a benchmark keeps: read back, and one line where it is damaged."""

import pytest

from bench.machine import read, write
from gpt2.errors import UserError


def test_what_was_written_is_read_and_nothing_is_nothing(tmp_path):
    path = tmp_path / "speed" / "cpu.json"
    assert read(path) == {}
    write(path, {"rows": [1.5]})
    assert read(path) == {"rows": [1.5]} and [file.name for file in path.parent.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("content", [b"", b'{"rows": [1', b"\xff", b"[]"])
def test_a_damaged_file_is_one_line(content, tmp_path):
    (tmp_path / "cpu.json").write_bytes(content)
    with pytest.raises(UserError, match="cpu.json: .*remove it"):
        read(tmp_path / "cpu.json")
