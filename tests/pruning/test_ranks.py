"""The same pruned set, to the weight, for 1, 2, 3 and 4 ranks under DDP and FSDP2."""

import numpy as np
import pytest

from tests.conftest import run

WORKER = "tests/pruning/ranks_worker.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks1")
    run(WORKER, "ddp", folder, ranks=1)
    return folder


def arrays(folder, name, kind, rank):
    return np.load(folder / f"{name}-{kind}-{rank}.npz")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_mixed"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_world_prunes_the_same_weights(ranks, kind, alone, tmp_path):
    run(WORKER, kind, tmp_path, alone if kind == "ddp" else "", ranks=ranks)
    for rank in range(ranks):
        for part in ("selections", "methods", *(["patterned"] if kind == "ddp" else [])):
            mine, reference = arrays(tmp_path, part, kind, rank), arrays(alone, part, "ddp", 0)
            for name in reference:
                assert (mine[name] == reference[name]).all(), (part, name, rank)
                assert (mine[name] == mine[name.replace("sampled", "bitter7")]).all()
        trained, expected = arrays(tmp_path, "training", kind, rank), arrays(alone, "training", "ddp", 0)
        first = arrays(tmp_path, "training", kind, 0)
        assert all((trained[name] == first[name]).all() for name in first)
        assert trained["zeros"].sum() == expected["zeros"].sum()
        if kind != "fsdp_mixed":
            assert (trained["zeros"] == expected["zeros"]).all()
            assert all(np.allclose(trained[name], expected[name], atol=1e-4) for name in expected)


def test_state_saved_at_two_ranks_loads_at_three_and_one(tmp_path):
    for kind in ("ddp", "fsdp"):
        zeros = []
        for ranks, other in ((2, ""), (3, tmp_path), (1, tmp_path)):
            folder = tmp_path if not other else tmp_path / f"{kind}{ranks}"
            folder.mkdir(exist_ok=True)
            run(WORKER, kind, folder, other, ranks=ranks)
            if other:
                loaded = arrays(folder, "loading", kind, 0)
                assert loaded["pruned"] == round(0.6 * (1 - (1 - 25 / 40) ** 3) * 495)
                zeros.append(loaded["zeros"])
        assert (zeros[0] == zeros[1]).all() and zeros[0].sum() == round(0.6 * (1 - (1 - 30 / 40) ** 3) * 495)
