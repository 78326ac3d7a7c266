"""Whatever stands on the command line or in a config file: a Config that can be, or lines that say what is wrong."""

import dataclasses
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2.config import FIELDS, Config, load_config
from gpt2.errors import UserError

NAMES = {
    "optimizer": ("adamw",),
    "criterion": ("none", "magnitude"),
    "schedule": ("gmp", "cubic"),
    "allocation": ("global",),
}
KEYS = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)
TEXTS = (
    st.text(max_size=20)
    | st.integers(-(2**70), 2**70).map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ["", "True", "none", "1e400", "-0", "nan", "0x10", "1_000", "٣", "\x00", "gmp", "auto", "raw", "[", "=="]
    )
)
VALUES = TEXTS | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)


def loads(arguments):
    """The Config of these arguments, or the lines with which they are refused."""
    try:
        config = load_config(arguments, NAMES)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 20_000
        return None
    assert isinstance(config, Config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert not isinstance(value, float) or math.isfinite(value)
    return config


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, TEXTS).map(lambda pair: f"--{pair[0]}={pair[1]}") | st.text(max_size=10), max_size=5))
def test_150_command_lines(arguments):
    loads(arguments)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=4))
def test_150_config_files(tmp_path, values):
    path = tmp_path / "config.py"
    path.write_text(
        "".join(f"{key} = {value!r}\n" for key, value in values.items()), encoding="utf-8", errors="replace"
    )
    loads([str(path)])
