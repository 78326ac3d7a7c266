"""Any runs side by side, those that differ in their seeds alone as one: python -m lenet.plot_comparison FILES..."""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

from gpt2.errors import Parser, one_line_errors
from lenet.plots import NAMES, compare_models, load


def main(arguments):
    with one_line_errors("python -m lenet.plot_comparison", OSError):
        parser = Parser(
            prog="python -m lenet.plot_comparison",
            description="Draws accuracy, loss, sparsity and compression of several runs.",
        )
        parser.add_argument("files", nargs="+", type=Path, help="metrics that lenet.train or lenet.compare wrote")
        parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the picture")
        args = parser.parse_args(arguments)
        groups = load(args.files)
        optimizers = dict.fromkeys(NAMES[group.optimizer] for group in groups)
        compare_models(groups, ", ".join(optimizers), args.out)
        print(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
