"""On a pretended GPU: how often the host waits for the device, and what a GPU would refuse."""

import pytest
import torch

import train_gpt2
from gpt2.data import to_device
from pruning import Pruner
from tests.conftest import SMALL
from tests.pretended_gpu import Gpu
from tests.pruning.helpers import adam_with, linears, zeros_of

RUN = {
    "--device": "cuda",
    "--max_iters": 12,
    "--log_interval": 4,
    "--eval_interval": 6,
    "--checkpoint_interval": 12,
    "--gradient_accumulation_steps": 3,
    "--criterion": "bitter7",
    "--prune_begin": 3,
    "--prune_end": 9,
    "--prune_interval": 3,
}
UPDATES, LOOKS, EVALUATIONS = 3, 4, 2  # of that run


def waits(gpu, phase):
    return sum(gpu.waits[phase].values())


def test_in_a_run_the_host_waits_only_where_numbers_are_looked_at(data_dir, tmp_path):
    options = [option for option in SMALL if option.partition("=")[0] not in RUN]
    options += [f"{name}={value}" for name, value in RUN.items()]
    config = train_gpt2.load_config([*options, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"], {})
    with Gpu() as gpu:
        gpu.during(train_gpt2, "place", "set-up")
        gpu.during(train_gpt2, "evaluate", "evaluation")
        gpu.during(train_gpt2, "save", "checkpoint")
        gpu.during(Pruner, "mask_gradients", "mask_gradients")
        gpu.during(Pruner, "step", lambda pruner: "update" if pruner.due(pruner.seen + 1) else "no update")
        gpu.during(torch.nn.utils, "clip_grad_norm_", "clip")
        with gpu.doing("loop"):
            train_gpt2.train(config)
    assert waits(gpu, "set-up") > 0  # the pretended GPU notices what it should
    assert not any(waits(gpu, phase) for phase in ("mask_gradients", "no update", "clip"))
    assert 0 < waits(gpu, "update") <= 10 * UPDATES
    assert waits(gpu, "evaluation") <= 2 * EVALUATIONS
    assert waits(gpu, "loop") <= 4 * LOOKS + 2  # two after the first step, once in a run, for the clock


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("kept", [0, 2**20])
def test_an_update_waits_a_few_times_for_any_number_of_layers(allocation, kept, monkeypatch):
    monkeypatch.setattr("pruning.scores.KEPT", kept)

    def pruned(device):
        model = linears(*[(9, 16)] * 20).to(device)
        states = [torch.rand(9, 16).round(decimals=1).to(device) for _ in range(20)]  # with ties
        optimizer = adam_with(model, exp_avg_sq=states)
        pruner = Pruner(model, optimizer, "variance_quarter", 0.6, allocation=allocation, max_layer_sparsity=0.62)
        for sparsity in (0.3, 0.6):
            pruner.prune_to(sparsity)
        return model

    expected = zeros_of(pruned("cpu"))
    with Gpu() as gpu:
        with gpu.doing("updates"):
            model = pruned("cuda")
        found = torch.cat([(p == 0).flatten().cpu() for p in model.parameters()]).numpy()
    moved = 2 * 20  # weights and states, to the device
    assert (found == expected).all() and waits(gpu, "updates") - moved <= 2 * 10


def test_only_pinned_memory_is_copied_without_waiting():
    tokens = torch.arange(4)
    with Gpu() as gpu:
        for tensor, times in ((tokens.pin_memory(), 0), (tokens, 1)):
            with gpu.doing(times):
                assert to_device(tensor, torch.device("cuda")).tolist() == [0, 1, 2, 3]
        assert waits(gpu, 0) == 1 and waits(gpu, 1) == 2  # one of each is tolist


def test_a_tensor_left_on_the_host_is_refused():
    with Gpu(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
