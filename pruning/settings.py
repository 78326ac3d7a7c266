"""A Pruner's settings: functions by their names, numbers in their ranges."""

import difflib
import functools
from collections.abc import Mapping
from typing import Any


def lookup(choice: Any, table: Mapping[str, Any], what: str) -> tuple[Any, str]:
    """(function, its name) for a name in `table` or a function of the user's own."""
    if callable(choice):
        return choice, name_of(choice)
    return named(choice, table, what, "a function or "), choice


def named(choice: Any, table: Mapping[str, Any], what: str, other: str = "") -> Any:
    """What `table` holds under a name. ValueError, with the nearest one, where it holds no such name."""
    if isinstance(choice, str) and choice in table:
        return table[choice]
    close = difflib.get_close_matches(str(choice), table, n=1)
    raise ValueError(
        f"{what}={choice!r}: expected {other}one of {', '.join(table)}"
        + (f" (did you mean {close[0]}?)" if close else "")
    )


def name_of(function: Any) -> str:
    """What a function is called, the same in every process: of a partial one what it is of, of an object its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_ranges(target_sparsity: float, begin: int, end: int, interval: int, max_layer_sparsity: float) -> None:
    """ValueError for a number out of its range."""
    if not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity={target_sparsity}: expected 0 <= target_sparsity < 1")
    for name, step in (("begin", begin), ("end", end), ("interval", interval)):
        if step != step // 1:
            raise ValueError(f"{name}={step}: expected a whole number of steps")
    if not 1 <= begin <= end:
        raise ValueError(f"begin={begin}, end={end}: expected 1 <= begin <= end")
    if interval < 1:
        raise ValueError(f"interval={interval}: expected interval >= 1")
    if not 0 < max_layer_sparsity <= 1:
        raise ValueError(f"max_layer_sparsity={max_layer_sparsity}: expected 0 < max_layer_sparsity <= 1")
