"""What is prunable: the rule, what users choose instead, and what is said of what is left out."""

import contextlib
import warnings

import pytest
import torch
import torch.nn as nn

from pruning import Pruner
from pruning.layers import find_layers


def attention():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


def test_attentions_projections_are_prunable_by_default():
    model = attention()
    layers = find_layers(model)
    assert [layer.name for layer in layers] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), pattern="2:4")
    pruner.prune_to(0.5)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert sum(int((p == 0).sum()) for p in matrices) == sum(p.numel() for p in matrices) // 2


def test_attention_of_other_widths_is_covered_too():
    names = [layer.name for layer in find_layers(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize("criterion", ["bitter7", "magnitude"])
def test_what_is_frozen_is_left_alone(criterion):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())  # which holds it all the same
    with pytest.warns(UserWarning, match=r"128 of 192 matrix weights \(67%\).*left out: 1.weight \(frozen\)"):
        pruner = Pruner(model, optimizer, criterion, 0.9)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    pruner.step()
    assert model[1].weight.all() and pruner.sparsity == pytest.approx(0.9, abs=0.01)


class Conv1D(nn.Module):
    """Not transformers', whose weight has two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3))


@pytest.mark.parametrize("other", [Conv1D, lambda: nn.Linear(8, 8, dtype=torch.complex64)])
def test_what_only_looks_like_a_linear_is_left_out(other):
    with pytest.warns(UserWarning, match="left out: 1.weight"):
        assert [layer.name for layer in find_layers(nn.Sequential(nn.Linear(8, 8), other()))] == ["0.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_none():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(0, 8, bias=False))
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()))
    assert pruner.layer_sparsity() == {"0.weight": 0.0} and "64" in pruner.report()


@pytest.mark.parametrize(
    "make, left",
    [
        (lambda: nn.LSTM(8, 8), "weight_ih_l0, weight_hh_l0"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)), "1.weight"),
    ],
)
def test_one_warning_names_what_the_rule_does_not_cover(make, left):
    model = make()
    choose = lambda name, parameter: parameter.dim() >= 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ValueError):  # where nothing at all is covered
            find_layers(model)
        assert len(find_layers(model, choose)) == sum(p.dim() >= 2 for p in model.parameters())
    assert [left in str(warning.message) for warning in caught] in ([True], []) and (
        caught or isinstance(model, nn.LSTM)
    )


def test_embeddings_count_neither_as_prunable_nor_as_left_out():
    model = nn.ModuleDict(
        dict(embedding=nn.Embedding(1000, 8), head=nn.Linear(8, 1000, bias=False), mlp=nn.Linear(8, 8))
    )
    model["head"].weight = model["embedding"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [layer.name for layer in find_layers(model)] == ["mlp.weight"]
    chosen = find_layers(model, lambda name, parameter: name.startswith("head"))
    assert [layer.name for layer in chosen] == ["embedding.weight"], "asked for by either of its names"


@pytest.mark.parametrize(
    "choose, words",
    [
        (lambda name, p: True, "bias: prunable= asks for it, but it has no two dimensions: .*p"),
        (lambda name, p: name == "2.weight", "2.weight: prunable= asks for it, but it is frozen"),
        (lambda name, p: name == "nothing", r"prunable=, which is called with \(name, parameter\), chose none"),
    ],
)
def test_what_prunable_asks_for_and_cannot_have_is_an_error(choose, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=words):
        Pruner(model, torch.optim.AdamW(model.parameters()), prunable=choose)


def test_sparse_gradients_cannot_be_masked():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0.weight: prunable= asks for it, but its embedding has sparse=True"):
        Pruner(model, torch.optim.SGD(model.parameters()), prunable=lambda name, p: p.dim() > 1)


def test_a_module_may_call_what_it_likes_sparse():
    model = nn.Sequential(nn.Linear(4, 4))
    model.sparse = True
    assert Pruner(model, torch.optim.SGD(model.parameters()), prunable=lambda name, p: p.dim() > 1).prunable == 16


class FullyShardedDataParallel(nn.Module):
    """By its name FSDP's first version, which a process group would be needed for."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_fsdps_first_version_is_refused():
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="FullyShardedDataParallel cuts weights .*fully_shard"):
        Pruner(model, torch.optim.AdamW(model.parameters()))


def test_two_weights_of_one_name_are_refused():
    """Without the marks of wrappers `module.mlp.weight` and `mlp.weight` are one name, and were one to `apply_to`."""
    model = nn.Module()
    model.mlp, model.module = nn.Linear(4, 4), nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="^mlp.weight: 2 weights are called so once module, .* another$"):
        Pruner(model, torch.optim.AdamW(model.parameters()))


def test_any_parameter_of_two_and_more_dimensions_can_be_chosen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5))
            self.table = nn.Embedding(6, 4)
            self.rnn = nn.GRU(4, 4)

    model = Model()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), "magnitude", 0.5, prunable=lambda n, p: p.dim() > 1)
    pruner.prune_to(0.5)
    assert [layer.name for layer in pruner.layers] == [
        "experts",
        "table.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    ]
    assert pruner.pruned == round(0.5 * (60 + 24 + 48 + 48))


def test_a_pattern_that_does_not_fit_names_the_weights_and_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"0.weight: its 3 inputs .* prunable=(.*)") as refused:
        Pruner(model, torch.optim.AdamW(model.parameters()), pattern="2:4")
    choose = eval(str(refused.value).split("prunable=")[1])
    assert Pruner(model, torch.optim.AdamW(model.parameters()), pattern="2:4", prunable=choose).prunable == 576


def test_the_description_says_what_share_of_what():
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8, bias=False))
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), "bitter7", 0.75, begin=10, end=30, interval=5)
    assert pruner.describe().startswith("64 of 864 parameters (7.4%) are prunable; 75.00% of these will be zero")
    assert "from step 10 to 30, every 5" in pruner.describe()
