"""What a machine with GPUs is told, on one that has none."""

import shutil
import sysconfig

import pytest
import torch

from gpt2 import parallel
from gpt2.errors import UserError


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_the_devices_own(name, peak):
    assert parallel.peak_flops(name) == peak


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def test_an_index_under_torchrun_is_refused(gpus):
    gpus.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device=cuda:0: .* --device=cuda$"):
        parallel.start("cuda:0")


def test_a_gpu_that_is_not_there(gpus):
    with pytest.raises(UserError, match="device=cuda:2: there are 2"):
        parallel.start("cuda:2")
    gpus.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 .* there are 2; lower --nproc_per_node"):
        parallel.start("cuda")


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cpu:1", "cpu:x", "xpu", ""])
def test_what_is_no_device_is_refused(gpus, device):
    with pytest.raises(UserError, match=f"device={device}: not on this machine, which has cpu, cuda"):
        parallel.start(device)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_that_is_too_old_does_not_send_the_run_to_the_cpu(monkeypatch, device):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="driver .* CUDA 13.0 .*--device=cpu"):
        parallel.start(device)
    assert parallel.start("cpu").device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden by whoever gave the command
    assert parallel.start("auto").device.type == "cpu"


def test_emulated_bfloat16_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert parallel.compute_dtype("auto", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("capability, native", [("AVX2", False), ("AVX512", True)])
def test_a_processor_held_back_to_plainer_instructions_has_no_bfloat16(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert parallel.compute_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("missing", ["triton", "compiler", "headers"])
def test_on_a_gpu_without_what_triton_needs_auto_says_so_and_does_not_compile(monkeypatch, capsys, missing):
    device = torch.device("cuda")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: None if missing == "triton" else object())
    monkeypatch.setattr(shutil, "which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere" if missing == "headers" else "/there")
    monkeypatch.setattr(parallel.os.path, "exists", lambda path: path.startswith("/there"))
    assert parallel.should_compile("auto", device) is False
    assert "slower" in capsys.readouterr().err
    with pytest.raises(UserError, match="Triton.*leave it away"):
        parallel.should_compile(True, device)


def test_auto_does_not_compile_on_a_cpu(monkeypatch):
    monkeypatch.setattr(parallel, "has_compiler", lambda device: True)
    cpu = torch.device("cpu")
    assert parallel.should_compile("auto", cpu) is False
    assert parallel.should_compile(True, cpu) is True
