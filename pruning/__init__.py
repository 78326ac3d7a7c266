"""Pruning while training, from the statistics the optimizer keeps. See pruning/README.md."""

from pruning.density_lr import DensityLR
from pruning.pruner import Pruner
from pruning.regrow import Regrow
from pruning.scores import NotFiniteError
from pruning.straight_through import StraightThrough

__all__ = ["DensityLR", "NotFiniteError", "Pruner", "Regrow", "StraightThrough"]
