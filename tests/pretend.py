"""A device that is not there: its tensors compute on the CPU, and refuse what a GPU refuses.

In `with pretend("cuda")`, `.to("cuda")` and `zeros(..., device="cuda")` give tensors that say they
are on cuda:0. Refused are, as on a GPU: tensors of the host beside them, `.numpy()`, a generator of
the host, in fused Adam even numbers of the host, and on "mps" float64. So a fault that would end a
run on a GPU ends a test. Not shown: memory, speed, kernels that round otherwise, several devices.
"""

import threading
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

# A GPU takes these from the host: copies; and indices, which it copies itself.
OPS = torch.ops.aten
WITH_HOST = {OPS.copy_.default, OPS.index.Tensor, OPS._index_put_impl_.default}
WITH_HOST |= {OPS.index_put.default, OPS.index_put_.default}


class OnDevice(torch.Tensor):
    """A tensor on the device that is not there. `host` holds its numbers."""

    kind = "cuda"
    waits = 0  # how often a number went to the host, which waits for it
    device = property(lambda self: torch.device(self.kind, 0))
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        if cls.kind == "mps" and host.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, **layout)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Every operation on such a tensor, below autograd and autocast."""
        kwargs, fused = kwargs or {}, "fused" in func.name()
        for x in tree_leaves((args, kwargs)):
            is_strange = isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)
            if is_strange and (x.dim() > 0 or fused) and func not in WITH_HOST:
                raise RuntimeError(
                    f"{func}: all tensors must be on one device, not cpu, {cls.kind}"
                )
        OnDevice.waits += func is OPS._local_scalar_dense.default
        out = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
        if func is OPS.copy_.default:
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map(to_device, out))

    def numpy(self, **_):
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()"
        )

    __array__ = numpy

    def tolist(self):
        OnDevice.waits += 1
        return self.host.tolist()

    def __reduce_ex__(self, protocol):  # in a file, a tensor's device matters little
        return self.host.__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnDevice({self.host})"


def to_host(x):
    return x.host if isinstance(x, OnDevice) else x


def to_device(x):
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


class Upload(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: OnDevice(x.detach().clone()))
    backward = staticmethod(lambda ctx, grad: to_host(grad))


class Download(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.host.detach().clone())
    backward = staticmethod(lambda ctx, grad: to_device(grad))


class Calls(TorchFunctionMode):
    """Every call that may name a device, above autograd."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return self.move(name, *args, **kwargs)
        if torch.device(kwargs.get("device") or "cpu").type != OnDevice.kind:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{OnDevice.kind}' generator, but found 'cpu'")
        return to_device(func(*map(to_host, args), **kwargs | {"device": "cpu"}))

    def move(self, name, x, *args, **kwargs):
        """x.to(device, dtype), x.to(dtype), x.to(other), x.cpu(), x.cuda()."""
        named = [name] if name != "to" else [*args, kwargs.get("device"), kwargs.get("dtype")]
        for given in named:
            if isinstance(given, torch.Tensor):
                named += [given.device, given.dtype]
        for given in named:
            if isinstance(given, torch.dtype):
                x = torch.Tensor.to(x, given)
        devices = [torch.device(d).type for d in named if isinstance(d, (str, torch.device))]
        if devices and (devices[-1] == "cpu") == isinstance(x, OnDevice):
            return (Download if devices[-1] == "cpu" else Upload).apply(x)
        return x


def run_there(thread, run=threading.Thread.run):
    """A thread of a process with the device sees it too."""
    with Calls():
        run(thread)


@contextmanager
def pretend(kind="cuda", bfloat16=True):
    """A device of this kind is there until the block ends. bfloat16: can it multiply such?"""
    autocast, future = torch.autocast, torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, before)

        def put(where, **functions):
            for name, function in functions.items():
                stack.enter_context(patch.object(where, name, function))

        put(OnDevice, kind=kind)
        put(torch, autocast=lambda kind, *rest, **named: autocast("cpu", *rest, **named))
        there = torch.cuda if kind == "cuda" else torch.backends.mps
        put(there, is_available=lambda: True)
        if kind == "cuda":
            put(there, set_device=lambda device: None, max_memory_allocated=lambda: 0)
            put(there, mem_get_info=lambda: (2**37, 2**37))
            put(there, is_bf16_supported=lambda including_emulation=True: bfloat16)
        stack.enter_context(Calls())
        put(threading.Thread, run=run_there)
        yield
