"""Classifiers of torchvision and timm as functions of flat weights. Neither library is imported before it is needed.

A name is `torchvision:NAME` or `timm:NAME`, with a NAME of the library's own registry. Networks are built without
weights and without a download, for the number of channels, the image size and the number of classes of a teacher.
"""

import contextlib
import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ray_dfml.core.layers import Layers, Shapes
from ray_dfml.errors import RejectedError, did_you_mean

LIBRARIES = ("torchvision", "timm")
"""Libraries whose classifiers can be teachers."""

AUXILIARY = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
"""Beginnings of the names of heads that an architecture has in training only."""


def is_hub(arch: str) -> bool:
    """Whether an architecture is one of another library."""
    return arch.partition(":")[0] in LIBRARIES and ":" in arch


@functools.cache
def names(library: str) -> tuple[str, ...]:
    """The classifiers of a library, from its own registry. Raises ValueError if the library is not installed."""
    if library == "torchvision":
        import torchvision

        return tuple(torchvision.models.list_models(module=torchvision.models))
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; install the extra: pip install 'ray-dfml[timm]'") from None
    return tuple(timm.list_models())


def known(arch: str) -> str:
    """The architecture itself. Raises ValueError, with the nearest names, if its library has no such classifier."""
    library, _, name = arch.partition(":")
    if name not in names(library):
        raise ValueError(f"{library} has no classifier {name!r}{did_you_mean(name, names(library))}")
    return arch


class _WithoutWeights(TorchFunctionMode):
    """Weights are made on the meta device, where they take no memory. What a network computes from its settings alone,
    such as tables of relative positions, gets values."""

    drawn = (torch.empty, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.drawn and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class HubNet:
    """A classifier of another library without weights, in evaluation mode: dropout is off, and batch norm needs given
    statistics.

    The names in `parameters` and `norms` are those of the library. Raises KeyError for an unknown name, and
    RejectedError if the classifier cannot take images [c h w] of `shape`.
    """

    def __init__(self, arch: str, shape: tuple[int, int, int], ways: int) -> None:
        try:
            library, _, name = known(arch).partition(":")
        except ValueError as error:
            raise KeyError(str(error)) from None
        with warnings.catch_warnings(), refusing(arch, shape):
            warnings.simplefilter("ignore")
            with _WithoutWeights():
                model = (_torchvision if library == "torchvision" else _timm)(name, shape, ways)
            _fill_tables(model)
        self.auxiliary = AUXILIARY.get(arch, ())
        self._model = model.eval().requires_grad_(False)
        self.parameters: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.norms = {
            name: int(part.running_mean.numel())
            for name, part in model.named_modules()
            if isinstance(part, _BatchNorm) and part.running_mean is not None
        }
        statistics = {f"{name}.{part}" for name in self.norms for part in ("running_mean", "running_var")}
        self.constants = {
            name: buffer
            for name, buffer in model.named_buffers()
            if name not in statistics and not name.endswith("num_batches_tracked")
        }
        """Tables that the network computes from its settings. Files may repeat them."""
        self._local = threading.local()
        with refusing(arch, shape):
            self.macs = self._count(arch, shape, ways)
            """Multiply-accumulates of one forward pass of one image."""

    def _count(self, arch: str, shape: tuple[int, int, int], ways: int) -> int:
        """Run the classifier on shapes alone, and count."""
        meta = functools.partial(torch.zeros, device="meta")
        given = {
            f"{name}.{part}": meta(n) for name, n in self.norms.items() for part in ("running_mean", "running_var")
        }
        layers = Layers({name: meta(shape) for name, shape in self.parameters.items()}, given)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = self.logits(layers, meta(1, *shape))
        if logits.shape != (1, ways):
            raise ValueError(f"it gives {list(logits.shape)} for one image, expected {[1, ways]}")
        return counter.get_total_flops() // 2

    def logits(self, layers: Layers, x: Tensor) -> Tensor:
        """Logits [n q] of normalised images [n c h w]. Raises ValueError without statistics for batch norm."""
        if self.norms and layers.given is None:
            raise ValueError("a network of another library is used in evaluation mode only: give its statistics")
        tensors = dict(layers.tensors) | dict(layers.given or {})
        for name, table in self.constants.items():
            tensors[name] = table.to(x.device, x.dtype if table.is_floating_point() else table.dtype)
        own = self._of_this_thread()
        with own.calling(layers):
            return functional_call(own.model, tensors, (x,))

    def _of_this_thread(self) -> "_Copy":
        if not hasattr(self._local, "copy"):
            self._local.copy = _Copy(self._model, tuple(self.norms))
        return self._local.copy


class _Copy:
    """A thread's copy of a module without weights: `functional_call` puts tensors into the module while it runs."""

    def __init__(self, model: nn.Module, norms: tuple[str, ...]) -> None:
        self.model = copy.deepcopy(model)
        self._layers: Layers | None = None
        for name in norms:
            self.model.get_submodule(name).register_forward_pre_hook(functools.partial(self._see, name))
        # Some classifiers of timm remember what they computed from the weights of the last call.
        self._forgetful = [part for part in self.model.modules() if hasattr(part, "attention_bias_cache")]

    @contextlib.contextmanager
    def calling(self, layers: Layers) -> Iterator[None]:
        """A call with these layers, whose `captured` gets the statistics of each input of a batch norm."""
        self._layers = layers if layers.capture else None
        for part in self._forgetful:
            vars(part)["attention_bias_cache"] = {}
        try:
            yield
        finally:
            self._layers = None

    def _see(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._layers is not None:
            self._layers.keep(name, inputs[0])


@contextlib.contextmanager
def refusing(arch: str, shape: tuple[int, int, int]) -> Iterator[None]:
    """Turn what a library raises for images that its network cannot take into a RejectedError of one line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RejectedError(f"{arch} cannot take {'x'.join(map(str, shape))} images: {said}") from None


def _torchvision(name: str, shape: tuple[int, int, int], ways: int) -> nn.Module:
    import torchvision

    channels, height, width = shape
    options: dict[str, Any] = {"num_classes": ways}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("height and width must be equal")
        options["image_size"] = height
    elif name.startswith("maxvit"):
        options["input_size"] = (height, width)
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    model = torchvision.models.get_model(name, weights=None, **options)
    return model if channels == 3 else _with_channels(model, channels)


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """The classifier with a first convolution for another number of channels, as people adapt one to grey images."""
    place, old = next((n, part) for n, part in model.named_modules() if isinstance(part, nn.Conv2d))
    kept = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    new = nn.Conv2d(channels, bias=old.bias is not None, **{option: getattr(old, option) for option in kept})
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _timm(name: str, shape: tuple[int, int, int], ways: int) -> nn.Module:
    import timm

    channels, height, width = shape
    options: dict[str, Any] = {"num_classes": ways, "in_chans": channels}
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = (height, width)
    return timm.create_model(name, pretrained=False, **options)


def _fill_tables(model: nn.Module) -> None:
    """Compute the tables that modules of timm leave empty until they are asked to fill them.

    Some ask a weight where it is, so the weights get memory, which nothing touches, until the tables are there. Raises
    ValueError for tables that only a file has.
    """
    tables = [
        (f"{place}.{name}".strip("."), part, name) for place, part in model.named_modules() for name in _empty(part)
    ]
    for place, part, name in tables:
        if name not in part._non_persistent_buffers_set or not hasattr(part, "init_non_persistent_buffers"):
            raise ValueError(f"{place} is neither a weight nor computed")
    if not tables:
        return
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for part in {id(part): part for _, part, _ in tables}.values():
        part.init_non_persistent_buffers()  # pyright: ignore[reportCallIssue]
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.to("meta"), requires_grad=False))


def _empty(part: nn.Module) -> list[str]:
    return [name for name, table in part.named_buffers(recurse=False) if table.is_meta]
