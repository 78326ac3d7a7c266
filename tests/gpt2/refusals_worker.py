"""Run by torchrun: what each rank's training refuses, one case after the other in the same processes.

argv: a folder; cases.json in it lists [name, arguments of train_gpt2.py, arguments of rank 1 instead]. Each rank writes
refusals-RANK.json there.
"""

import json
import os
import sys
from pathlib import Path

import train_gpt2
from gpt2 import parallel
from gpt2.errors import UserError
from gpt2.writer import Writer


def refusal(arguments):
    """(whether every rank was told, message) of what train_gpt2.py refuses."""
    try:
        config = train_gpt2.load_config(arguments, {})
        train_gpt2.train(config, Writer(config.out_dir, 1))
    except UserError as error:
        return error.shared, str(error)
    finally:
        parallel.stop()


folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
cases = json.loads((folder / "cases.json").read_text())
found = {name: refusal(other if rank == 1 and other else arguments) for name, arguments, other in cases}
(folder / f"refusals-{rank}.json").write_text(json.dumps(found))
