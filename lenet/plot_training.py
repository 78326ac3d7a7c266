"""The picture of one run: python -m lenet.plot_training FILE"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

from gpt2.errors import Parser, one_line_errors
from lenet.plots import load, training_plot


def main(arguments):
    with one_line_errors("python -m lenet.plot_training", OSError):
        parser = Parser(
            prog="python -m lenet.plot_training", description="Draws loss, accuracy and sparsity of one run."
        )
        parser.add_argument("file", type=Path, help="metrics that lenet.train wrote")
        parser.add_argument("--out", type=Path, help="the picture (default: training_plot.png beside the file)")
        args = parser.parse_args(arguments)
        out = args.out or args.file.parent / "training_plot.png"
        training_plot(load([args.file])[0], out)
        print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
