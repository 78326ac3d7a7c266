"""A compiler that fails costs speed, not the run."""

import pytest
import torch

from gpt2 import compiling
from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.explain import machine_errors


@pytest.fixture
def broken(monkeypatch):
    def fail(graph, inputs):
        raise OSError("g++: cannot execute\nmany more lines")

    monkeypatch.setattr(compiling, "inductor", fail)
    monkeypatch.setattr(compiling, "said", [])
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_it_falls_back_with_one_warning(broken, capsys):
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU()), torch.randn(2, 3)
    model(inputs).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for _ in range(2):
        model.zero_grad()
        compiled = torch.compile(model, backend=compiling.backend_of(True))
        compiled(inputs).sum().backward()
        for parameter, gradient in zip(model.parameters(), expected):
            assert torch.equal(parameter.grad, gradient)
        torch.compiler.reset()
    assert capsys.readouterr().err == (
        "warning: torch.compile failed and is left away, which is slower: OSError: g++: cannot execute\n"
    )


def test_a_compiler_that_fails_is_found_before_the_model_is_traced(broken, capsys):
    assert compiling.compiles_for(torch.device("cpu")) is False
    assert capsys.readouterr().err == (
        "warning: torch.compile failed and is left away, which is slower: OSError: g++: cannot execute\n"
    )


def test_required_it_stops_in_one_line(broken):
    compiled = torch.compile(torch.nn.Linear(3, 3), backend=compiling.backend_of("require"))
    with pytest.raises(UserError, match="^compile=require: torch.compile failed: OSError: g.*execute$"):
        with machine_errors(Config()):
            compiled(torch.randn(2, 3))
