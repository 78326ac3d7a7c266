"""The pages that are made from the code: python docs/make.py writes docs/options.md, and with pdoc docs/api/ of
`pruning`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpt2.config import FIELDS  # noqa: E402
from gpt2.files import write_atomically  # noqa: E402

MODULES = ("criteria", "schedule", "allocation", "memory", "optim", "integrations")  # that users name or import from
HEAD = """# Options

Set them in a config file (plain Python, `n_layer = 6`) or on the command line (`--n_layer=6`); later ones win. A wrong
name, type, value or combination is refused before anything starts, all of them at once. `python train_gpt2.py --help`
prints this table, and `python docs/make.py` writes this page from `gpt2/config.py`.

| option | default | meaning |
|---|---|---|
"""


def options_page():
    rows = (f"| `{name}` | `{field.default}` | {field.metadata['help']} |" for name, field in FIELDS.items())
    return HEAD + "\n".join(row.replace("``", "") for row in rows) + "\n"


def main():
    write_atomically(ROOT / "docs" / "options.md", options_page().encode())
    if importlib.util.find_spec("pdoc"):
        modules = ["pruning", *(f"pruning.{name}" for name in MODULES)]
        subprocess.run([sys.executable, "-m", "pdoc", *modules, "-o", "docs/api"], cwd=ROOT, check=True)
    else:
        print("docs/api needs pdoc: pip install pdoc")


if __name__ == "__main__":
    main()
