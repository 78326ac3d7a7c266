"""Pruning while training, from the statistics the optimizer keeps. See pruning/README.md."""

from pruning.pruner import Pruner
from pruning.scores import NotFiniteError

__all__ = ["NotFiniteError", "Pruner"]
