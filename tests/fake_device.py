"""A device that this machine does not have: tensors with shapes but no values, which refuse to meet those of the CPU.

`FakeTensorMode` runs every kernel on shapes alone and checks devices as the kernels do. What code reads of values is
stood in for: every number is 0, every condition holds, and an array is zeros, but only of a tensor that was brought to
the CPU and out of the graph. A shape that depends on values is an error here; on a real device it is a wait.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def find_device() -> torch.device:
    """`cuda`, or `meta` where this build of torch cannot run backward passes of fake `cuda` tensors.

    A build with CUDA on a machine without an accelerator asks for the accelerator's context in every backward pass.
    The rules of devices are the same under both names.
    """
    with FakeTensorMode():
        x = torch.zeros(1, device="cuda", requires_grad=True)
        try:
            torch.autograd.grad(x.sum(), x)
        except RuntimeError:
            return torch.device("meta")
    return torch.device("cuda")


STAND_INS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: _array(x),
    "tolist": lambda x: np.zeros(tuple(x.shape), int).tolist(),
    "item": lambda x: 0,
    "__int__": lambda x: 0,
    "__index__": lambda x: 0,
    "__float__": lambda x: 0.0,
    "__bool__": lambda x: True,
}


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """Every tensor made inside is fake. Real ones that come in from outside are on the CPU."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for name, stand_in in STAND_INS.items():
            for kind in (Tensor, FakeTensor):
                patch.setattr(kind, name, _reader(stand_in, getattr(kind, name)))
        yield


def _reader(stand_in: Callable[[Tensor], Any], real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args: stand_in(x) if isinstance(x, FakeTensor) or x.is_meta else real(x, *args)


def _array(x: Tensor) -> np.ndarray:
    if x.device.type != "cpu":
        raise TypeError(f"a tensor on {x.device} has no array: bring it to the CPU first")
    if x.requires_grad:
        raise RuntimeError("a tensor that requires a gradient has no array: detach it first")
    return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch."))
