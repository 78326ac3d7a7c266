"""A run that torchrun restarts again and again at one step is stopped: what breaks it there will break it again."""

import contextlib
import os
from pathlib import Path

from gpt2.checkpoint import DAMAGED
from gpt2.errors import UserError
from gpt2.files import read_json, write_json

LIMIT = 3


def count_restart(out_dir, step):
    """Call at each start, on the main rank, with the step it goes on from; UserError at the third restart from there.

    Only torchrun's own restarts count (--max-restarts), never a command given again. The count is kept in out_dir.
    """
    path, restart = Path(out_dir) / ".restarts.json", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restart == 0:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return
    seen = {}
    with contextlib.suppress(*DAMAGED):
        seen = dict(read_json(path))
    count = seen.get("restarts", 0) + 1 if seen.get("step") == step else 1
    with contextlib.suppress(OSError):  # a disk that takes nothing is the log's to tell
        write_json(path, {"step": step, "restarts": count})
    if count >= LIMIT:
        raise UserError(
            f"restarted {count} times at step {step} without reaching the next checkpoint: what ends it there will end "
            "it again, see the errors above; the same command, given again, tries once more"
        )
