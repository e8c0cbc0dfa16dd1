"""Classifiers of torchvision and timm as functions of flat weights: they answer as the library's own modules do."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ray_dfml.core import hub
from ray_dfml.core.net import Net, known_teacher, net
from ray_dfml.errors import RejectedError
from tests.support import normal

SMALL = [
    ("resnet18", (3, 40, 48)), ("squeezenet1_1", (3, 32, 32)), ("mobilenet_v3_small", (3, 32, 32)),
    ("shufflenet_v2_x0_5", (3, 32, 32)), ("densenet121", (3, 32, 32)), ("googlenet", (3, 32, 32)),
    ("swin_v2_t", (3, 32, 32)), ("efficientnet_b0", (3, 32, 32)),
]  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """The module with weights and statistics in general position, in evaluation mode and float64."""
    rng = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.add_(0.2 * torch.rand(value.shape, generator=rng))
        elif value.is_floating_point() and "relative_coords" not in name:
            value.add_(0.02 * torch.randn(value.shape, generator=rng))
    return model.eval().double()


def torchvision_model(name: str, ways: int) -> nn.Module:
    """The library's own module with random weights."""
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    return spread(torchvision.models.get_model(name, weights=None, num_classes=ways, **more))


def flat(network: Net, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The weights and the statistics of a module, as `network` takes them."""
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    stats = network.stats_layout.flatten(tensors) if network.stats_layout.numel else torch.zeros(0).double()
    return network.layout.flatten(tensors), stats


@pytest.mark.parametrize(("name", "shape"), SMALL)
def test_logits_statistics_and_gradients_are_those_of_the_library(name: str, shape: tuple[int, int, int]) -> None:
    model, network = torchvision_model(name, 4), net(f"torchvision:{name}", shape, 4)
    theta, stats = flat(network, model)
    x = normal(3, *shape).requires_grad_()
    seen: dict[str, Tensor] = {}

    def keep(at: str) -> Callable[..., None]:
        return lambda part, inputs: seen.update({at: inputs[0].detach()})

    for at in network.network.norms:
        model.get_submodule(at).register_forward_pre_hook(keep(at))
    expected = model(x)
    slopes = torch.autograd.grad(expected.square().sum(), x)
    for logits in (network(theta, x, stats), network.with_stats(theta, x, stats, first_order=True)[0]):
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), x), slopes)
    found = network.with_stats(theta, x, stats)[1]
    assert found.shape == stats.shape
    parts = network.stats_layout.unflatten(found)
    for at, y in seen.items():
        axes = (0, 2, 3) if y.dim() == 4 else (0,)
        torch.testing.assert_close(parts[f"{at}.running_mean"], y.mean(axes))
        torch.testing.assert_close(parts[f"{at}.running_var"], y.var(axes, unbiased=False))


def test_multiply_accumulates_are_those_that_torchvision_states() -> None:
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert net("torchvision:resnet18", (3, 224, 224), 1000).macs == pytest.approx(weights.meta["_ops"] * 1e9, rel=1e-3)


def test_a_batch_of_teachers_under_vmap_equals_the_loop() -> None:
    network = net("torchvision:resnet18", (3, 32, 32), 3)
    models = [torchvision_model("resnet18", 3) for _ in range(2)]
    models[1].fc.weight.data.mul_(3)  # pyright: ignore
    thetas, stats = (torch.stack(parts) for parts in zip(*(flat(network, model) for model in models), strict=True))
    x = normal(2, 4, 3, 32, 32)

    def loss(images: Tensor, theta: Tensor, given: Tensor) -> Tensor:
        logits, found = network.with_stats(theta, images, given)
        return logits.square().sum() + found.square().mean()

    batched = torch.func.vmap(torch.func.grad(loss))(x, thetas, stats)
    for row, images, theta, given in zip(batched, x, thetas, stats, strict=True):
        leaf = images.clone().requires_grad_()
        torch.testing.assert_close(row, torch.autograd.grad(loss(leaf, theta, given), leaf)[0])


def test_calls_from_four_threads_do_not_see_each_other() -> None:
    network = net("torchvision:resnet18", (3, 32, 32), 3)
    theta, stats = flat(network, torchvision_model("resnet18", 3))
    x = normal(2, 3, 32, 32)

    def call(i: int) -> list[Tensor]:
        logits, found = network.with_stats((1 + i % 4 / 10) * theta, x, stats)
        return [logits, found, network(theta, x / (1 + i % 3), stats)]

    alone = [call(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(call, range(12)), alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_network_of_another_library_has_no_parts_of_ours() -> None:
    network = net("torchvision:resnet18", (3, 32, 32), 3)
    theta = torch.zeros(network.layout.numel)
    with pytest.raises(ValueError, match="evaluation mode only: give its statistics"):
        network(theta, torch.zeros(2, 3, 32, 32))
    for call in (lambda: network.features(theta, torch.zeros(2, 3, 32, 32)), lambda: network.init(torch.Generator())):
        with pytest.raises(TypeError, match=r"^torchvision:resnet18 can be a teacher only"):
            call()


@pytest.mark.parametrize(
    ("arch", "shape", "said"),
    [
        ("torchvision:inception_v3", (3, 32, 32), "Calculated padded input size"),
        ("torchvision:vit_b_16", (3, 64, 32), "height and width must be equal"),
        ("torchvision:vit_b_16", (3, 40, 40), "Input shape indivisible by patch size"),
        ("torchvision:maxvit_t", (3, 64, 64), "is not divisible by partition size 7"),
    ],
)
def test_images_that_a_network_cannot_take_are_refused_in_one_line(arch, shape, said) -> None:
    size = "x".join(map(str, shape))
    with pytest.raises(RejectedError, match=rf"^{arch} cannot take {size} images: .*{said}[^\n]*$"):
        Net(arch, shape, 3)


def test_only_classifiers_of_the_registries_are_known() -> None:
    assert known_teacher("torchvision:vit_h_14") == "torchvision:vit_h_14"
    assert known_teacher("conv4") == "conv4"
    for bad in ("torchvision:resnet19", "torchvision:fcn_resnet50", "torchvision:", "torchvision:datasets.MNIST"):
        with pytest.raises(ValueError, match=r"^torchvision has no classifier "):
            known_teacher(bad)
        with pytest.raises(KeyError, match="no classifier"):
            Net(bad, (3, 32, 32), 3)
    with pytest.raises(ValueError, match="unknown architecture 'hub:resnet18'"):
        known_teacher("hub:resnet18")


def test_no_weights_are_allocated() -> None:
    """The largest has 644 million parameters, which would take 2.6 GB."""
    network = Net("torchvision:regnet_y_128gf", (3, 224, 224), 1000)
    assert network.layout.numel == 644_812_894
    assert all(part.is_meta for part in network.network._model.parameters())  # pyright: ignore


def test_grey_images_change_the_first_convolution_alone() -> None:
    grey, colour = (net("torchvision:resnet18", (channels, 32, 32), 3).layout.shapes for channels in (1, 3))
    assert {name for name in colour if grey[name] != colour[name]} == {"conv1.weight"}
    assert grey["conv1.weight"] == (64, 1, 7, 7)


def test_neither_library_is_imported_before_it_is_needed() -> None:
    code = "import sys, ray_dfml.cli, ray_dfml.ops, ray_dfml.data.pool; from ray_dfml.core.net import net\n"
    code += "net('conv4', (3, 32, 32), 5).macs; print('torchvision' in sys.modules or 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet10t", (1, 32, 32)),
        ("vit_tiny_patch16_224", (3, 32, 64)),
        ("levit_128s", (3, 64, 64)),
        ("swin_tiny_patch4_window7_224", (3, 56, 56)),
    ],
)
def test_networks_of_timm_answer_as_its_own(name: str, shape: tuple[int, int, int]) -> None:
    """LeViT remembers its attention biases between calls, and a second teacher must not get those of the first. Swin
    makes its tables where its weights are, which is nowhere while it is built."""
    size = {"img_size": shape[1:]} if name.startswith(("vit", "levit", "swin")) else {}
    network = net(f"timm:{name}", shape, 4)
    x = normal(2, *shape)
    for seed in range(2):
        torch.manual_seed(seed)
        model = spread(timm.create_model(name, pretrained=False, num_classes=4, in_chans=shape[0], **size))
        theta, stats = flat(network, model)
        torch.testing.assert_close(network(theta, x, stats), model(x))


def test_a_name_of_timm_that_would_download_is_unknown() -> None:
    for bad in ("hf-hub:someone/model", "local-dir:/etc", "resnet18.a1_in1k"):
        with pytest.raises(ValueError, match=r"^timm has no classifier "):
            hub.known(f"timm:{bad}")


def test_a_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    hub.names.cache_clear()
    with pytest.raises(ValueError, match=r"^timm is not installed; install the extra: pip install 'ray-dfml\[timm\]'$"):
        known_teacher("timm:resnet18")
