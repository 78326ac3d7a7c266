"""Run by torchrun: what each rank's training refuses, one case after the other in the same processes.

argv: a folder; cases.json in it lists [name, arguments of train_gpt2.py, arguments of rank 1 instead]. Each rank writes
refusals-RANK.json there.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

import train_gpt2
from gpt2 import parallel
from gpt2.errors import UserError


def refusal(arguments):
    """(whether every rank was told, message) of what train_gpt2.py refuses."""
    try:
        train_gpt2.train(train_gpt2.load_config(arguments, {}))
    except UserError as error:
        return error.shared, str(error)
    finally:
        dist.barrier()


world = parallel.start("cpu")
parallel.start = lambda *arguments: world  # one process group for all cases
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
cases = json.loads((folder / "cases.json").read_text())
found = {name: refusal(other if rank == 1 and other else arguments) for name, arguments, other in cases}
(folder / f"refusals-{rank}.json").write_text(json.dumps(found))
parallel.stop()
