"""A GPU that is only pretended: tensors that say cuda:0 and are computed by the CPU, and a count of the host's waits.

    with Gpu() as gpu:
        model.to("cuda"); ...
        with gpu.doing("a step"):
            ...
    assert gpu.waits["a step"] == {}

Programs take their CUDA branches. An operation on tensors of both devices is an error, as on a GPU; what would make the
host wait for one (item, tolist, copies to the host, copies from memory that is not pinned, nonzero, indexing by a mask,
bincount, synchronize) is counted, by what was being done and where. Not pretended: torch.compile, DDP, CUDA's numerics.
"""

import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, ROOT = torch.device("cuda", 0), str(Path(__file__).parent.parent)
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING = {aten._to_copy, aten.copy_}


class OnGpu(torch.Tensor):
    """A tensor whose numbers are those of `host`, a CPU tensor, and which says that it is on cuda:0."""

    @staticmethod
    def __new__(cls, host):
        layout = dict(strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), **layout, device="cpu")
        tensor.host = host
        return tensor

    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (CUDA, True, False))

    def __repr__(self):
        return f"OnGpu({self.host})"

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.host.data_ptr()

    def tolist(self):
        Gpu.here.wait("tolist")
        return self.host.tolist()

    def cpu(self):
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return Gpu.here.compute(operation, args, kwargs or {})


def to_host(tree):
    return tree_map(lambda x: x.host if isinstance(x, OnGpu) else torch.device("cpu") if x == CUDA else x, tree)


def to_gpu(tree):
    return tree_map(lambda x: OnGpu(x) if torch.is_tensor(x) and not isinstance(x, OnGpu) else x, tree)


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


class Functions(TorchFunctionMode):
    """What a program writes with a device: `.to(device)` and device=."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            return Gpu.here.move(*args, **kwargs)
        if function is torch.Tensor.cpu:
            return Gpu.here.move(args[0], "cpu")
        if not on_gpu(kwargs.get("device")):
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            Gpu.here.wait("a tensor from the host's numbers")
        return to_gpu(function(*to_host(args), **(kwargs | {"device": "cpu"})))


class Event:
    def __init__(self, enable_timing=False): ...
    def record(self): ...

    def elapsed_time(self, other):
        return 1.0

    def synchronize(self):
        Gpu.here.wait("Event.synchronize")


class Stream:
    def is_capturing(self):
        return False


class Gpu:
    here = None

    def __init__(self):
        self.now, self.waits = ["elsewhere"], collections.defaultdict(collections.Counter)

    @contextlib.contextmanager
    def doing(self, what):
        self.now.append(what)
        try:
            yield
        finally:
            self.now.pop()

    def during(self, owner, name, what):
        """Count the waits in calls of owner.name under `what`, a string or a function of the first argument."""
        method = getattr(owner, name)

        def inside(*args, **kwargs):
            with self.doing(what(*args[:1]) if callable(what) else what):
                return method(*args, **kwargs)

        self.stack.enter_context(mock.patch.object(owner, name, inside))

    def wait(self, what):
        frame = sys._getframe(1)
        while frame and (not frame.f_code.co_filename.startswith(ROOT) or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename.removeprefix(ROOT + '/')}:{frame.f_lineno}" if frame else "?"
        self.waits[self.now[-1]][f"{what} at {where}"] += 1

    # ---- operations ----

    def compute(self, operation, args, kwargs):
        kind = operation.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if kind not in COPYING | INDEXING and any(not isinstance(x, OnGpu) and x.dim() for x in tensors):
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if kind in WAITING:
            self.wait(str(kind))
        if kind in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.wait("indexing by a mask")
        if kind is aten.copy_ and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu) and args[1].dim():
            self.copied(args[1] if isinstance(args[0], OnGpu) else args[0], len(args) > 2 and args[2])
        out = operation(*to_host(args), **to_host(kwargs))
        places = [i for i, a in enumerate(operation._schema.arguments) if a.alias_info and a.alias_info.is_write]
        written = [args[i] if i < len(args) else kwargs.get(operation._schema.arguments[i].name) for i in places]
        if torch.is_tensor(out) and len(written) == 1:
            return written[0]
        return to_gpu(out)

    def copied(self, on_host, non_blocking):
        if not (non_blocking and on_host.is_pinned()):
            self.wait("a copy that blocks, or of memory that is not pinned")

    def move(self, tensor, *args, **kwargs):
        """Tensor.to."""
        given = [*args, kwargs.get("device"), kwargs.get("dtype")]
        like = next((x for x in given if torch.is_tensor(x)), None)
        dtype = next((x for x in given if isinstance(x, torch.dtype)), tensor.dtype if like is None else like.dtype)
        device = next((torch.device(x) for x in given if isinstance(x, (str, torch.device))), None)
        device = device or (tensor if like is None else like).device
        with torch._C.DisableTorchFunction():
            if on_gpu(device) == isinstance(tensor, OnGpu):
                return torch.Tensor.to(tensor, dtype, copy=kwargs.get("copy", False))
            if device.type == "meta":
                return torch.Tensor.to(tensor, device, dtype)
            self.copied(tensor, kwargs.get("non_blocking", False))
            if isinstance(tensor, OnGpu):
                return tensor.host.to(dtype, copy=True)
            copy = OnGpu(tensor.detach().to(dtype, copy=True))
            return torch.nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copy

    # ---- torch, as it is with a GPU ----

    def __enter__(self):
        Gpu.here, self.stack, pinned = self, contextlib.ExitStack(), set()
        group = torch.utils._foreach_utils._group_tensors_by_device_and_dtype
        autocast, empty = torch.autocast, torch.empty

        def pin(tensor):
            copy = tensor.clone()
            pinned.add(copy.data_ptr())
            return copy

        def empty_pinned(*args, pin_memory=False, **kwargs):
            return pin(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs)

        def grouped(lists, *others):
            device = CUDA if isinstance(lists[0][0], OnGpu) else torch.device("cpu")
            return {(device, dtype): found for (_, dtype), found in group(lists, *others).items()}

        patches = {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
            "torch.cuda.get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.accelerator.current_stream": Stream,
            "torch.cuda.synchronize": lambda *_: self.wait("synchronize"),
            "torch.cuda.Event": Event,
            "torch.Tensor.pin_memory": pin,
            "torch.Tensor.is_pinned": lambda tensor: tensor.data_ptr() in pinned,
            "torch.empty": empty_pinned,
            "torch.autocast": lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs),
            "torch.utils._foreach_utils._group_tensors_by_device_and_dtype": grouped,
            "torch.optim.optimizer._group_tensors_by_device_and_dtype": grouped,
            "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": grouped,
        }
        for name, replacement in patches.items():
            self.stack.enter_context(mock.patch(name, replacement))
        kinds = torch.utils._foreach_utils._foreach_supported_types
        self.stack.enter_context(
            mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", [*kinds, OnGpu])
        )
        swap = torch.__future__.get_swap_module_params_on_conversion()
        self.stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that a tied weight stays tied
        precision = torch.get_float32_matmul_precision()
        self.stack.callback(torch.set_float32_matmul_precision, precision)
        self.stack.enter_context(Functions())
        return self

    def __exit__(self, *error):
        self.stack.close()
        Gpu.here = None
