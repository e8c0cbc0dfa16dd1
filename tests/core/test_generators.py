"""The image generator against plain layers."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_dfml.core.generators import Generator, ThinConv, generator, upsampled_conv
from ray_dfml.core.layers import Layers
from tests.support import PROPERTY, normal


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_the_transposed_convolution_equals_nearest_upsampling_then_convolution(
    device, n, inputs, outputs, height, width, first_order
):
    x, weight = (
        normal(n, inputs, height, width, device=device).requires_grad_(),
        normal(outputs, inputs, 3, 3, seed=1, device=device).requires_grad_(),
    )
    found = upsampled_conv(x, weight, Layers({}, first_order=first_order))
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(found, expected)
    cotangent = normal(*expected.shape, seed=2, device=device)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
def test_the_thin_convolution_equals_the_framework(device, n, inputs, outputs, height, width):
    x, weight = (
        normal(n, inputs, height, width, device=device).requires_grad_(),
        normal(outputs, inputs, 3, 3, seed=1, device=device).requires_grad_(),
    )
    found, expected = ThinConv.apply(x, weight), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(found, expected)
    cotangent = normal(*expected.shape, seed=2, device=device)
    pairs = [torch.autograd.grad(out, (x, weight), cotangent) for out in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "parameters"), [((3, 32, 32), 2_328_899), ((3, 84, 84), 14_730_691), ((1, 28, 28), 1_834_305)]
)
def test_parameter_counts(shape, parameters):
    assert generator(shape, 256, 64).layout.numel == parameters


def test_images_equal_those_of_plain_layers(device):
    net_g, z = Generator((3, 16, 12), 8, 4), normal(6, 8, device=device)
    theta = net_g.init(torch.Generator().manual_seed(0)).to(device).double()
    theta = theta + 0.1 * normal(theta.numel(), seed=1, device=device)
    plain = nn.Sequential(
        nn.Linear(8, 8 * 4 * 3), nn.Unflatten(1, (8, 4, 3)), nn.BatchNorm2d(8),
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid(),
    ).double().to(device)  # fmt: skip
    assert [p.shape for p in plain.parameters()] == list(net_g.layout.shapes.values())
    nn.utils.vector_to_parameters(theta, plain.parameters())
    torch.testing.assert_close(net_g(theta, z), plain(z))


def test_a_conditional_generator_has_a_linear_layer_for_the_label(device):
    """Half of the first channels come from the code, half from the one-hot label behind it."""
    net_g, z, labels = (
        Generator((3, 16, 12), 8, 4, classes=3),
        normal(6, 8, device=device),
        torch.arange(3, device=device).repeat(2),
    )
    theta = net_g.init(torch.Generator().manual_seed(0)).to(device).double() + 0.1 * normal(
        net_g.layout.numel, seed=1, device=device
    )
    parts = net_g.layout.unflatten(theta)
    assert parts["project.weight"].shape == (4 * 4 * 3, 8)
    assert parts["label.weight"].shape == (4 * 4 * 3, 3)
    from_code = z @ parts["project.weight"].T + parts["project.bias"]
    from_label = parts["label.weight"].T[labels] + parts["label.bias"]
    plain = Generator((3, 16, 12), 96, 4)
    shared = {name: value for name, value in parts.items() if not name.startswith(("project", "label"))}
    passing = {
        "project.weight": torch.eye(96, device=device).double(),
        "project.bias": torch.zeros(96, device=device).double(),
    }
    expected = plain(plain.layout.flatten(passing | shared), torch.cat([from_code, from_label], 1))
    torch.testing.assert_close(net_g(theta, torch.cat([z, F.one_hot(labels, 3)], 1)), expected)


@pytest.mark.parametrize("kind", ["init", "reset"])
def test_images_follow_the_label_for_equal_codes(device, kind):
    net_g = Generator((1, 8, 8), 4, 4, classes=2)
    theta, z = (
        getattr(net_g, kind)(torch.Generator().manual_seed(0)).to(device),
        normal(1, 4, device=device).float().expand(4, -1),
    )
    images = net_g(theta, torch.cat([z, F.one_hot(torch.tensor([0, 1, 0, 1], device=device), 2)], 1))
    torch.testing.assert_close(images[0], images[2])
    torch.testing.assert_close(images[1], images[3])
    assert (images[0] - images[1]).abs().max() > 1e-3


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.1, 100))
def test_pixels_are_between_zero_and_one(device, seed, scale):
    net_g = generator((1, 8, 8), 4, 4)
    theta = net_g.init(torch.Generator().manual_seed(seed)).to(device)
    images = net_g(theta * scale, torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(device))
    assert images.shape == (5, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


def test_gradients_reach_weights_and_codes(device):
    net_g = generator((1, 8, 8), 4, 4)
    theta = net_g.init(torch.Generator().manual_seed(0)).to(device).requires_grad_()
    z = normal(5, 4, device=device).float().requires_grad_()
    grads = torch.autograd.grad(net_g(theta, z).square().sum(), (theta, z))
    assert all(g.abs().sum() > 0 for g in grads)


def test_initial_weights_are_uniform_by_fan_in():
    net_g = Generator((3, 16, 16), 64, 16)
    theta = net_g.init(torch.Generator().manual_seed(0))
    parts = net_g.layout.unflatten(theta)
    for name, fan_in in (("project", 64), ("conv1", 9 * 32), ("conv2", 9 * 32), ("conv3", 9 * 16)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < parts[f"{name}.weight"].abs().max() <= bound
        assert parts[f"{name}.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert parts["conv3.bias"].abs().max() <= 1 / math.sqrt(9 * 16)
    assert torch.equal(parts["norm1.weight"], torch.ones(32))
    assert torch.equal(parts["norm1.bias"], torch.zeros(32))
    assert torch.equal(theta, net_g.init(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("classes", [0, 5])
def test_reset_weights_are_normal_around_zero_and_one(classes):
    net_g = Generator((3, 16, 16), 64, 16, classes)
    theta = net_g.reset(torch.Generator().manual_seed(0))
    for name, part in net_g.layout.unflatten(theta).items():
        if name.endswith("bias"):
            assert torch.equal(part, torch.zeros_like(part)), name
            continue
        centre = 1.0 if name.startswith("norm") else 0.0
        spread = 0.02 * 5 / math.sqrt(part.numel())  # five standard errors
        assert part.mean().item() == pytest.approx(centre, abs=spread), name
        assert part.std().item() == pytest.approx(0.02, abs=spread), name
    assert torch.equal(theta, net_g.reset(torch.Generator().manual_seed(0)))
    assert not torch.equal(theta, net_g.reset(torch.Generator().manual_seed(1)))


def test_generators_are_built_once_per_shape_and_condition():
    assert generator((1, 8, 8), 4, 4) is generator((1, 8, 8), 4, 4)
    assert generator((1, 8, 8), 4, 4, 2).classes == 2
    assert generator((1, 8, 8), 4, 4).classes == 0


def test_sizes_not_divisible_by_four_are_errors():
    with pytest.raises(ValueError, match="divisible by 4"):
        Generator((3, 30, 32), 8, 4)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shape", [(3, 16, 12), (1, 28, 28)])
def test_first_order_changes_no_more_than_rounding(device, shape, classes):
    net_g, codes = Generator(shape, 8, 4, classes), normal(6, 8 + classes, device=device)
    theta = net_g.init(torch.Generator().manual_seed(0)).to(device).double() + 0.1 * normal(
        net_g.layout.numel, seed=1, device=device
    )
    cotangent = normal(6, *shape, seed=2, device=device)

    def found(dtype: torch.dtype, *, first_order: bool) -> list[torch.Tensor]:
        leaf, z = theta.to(dtype).requires_grad_(), codes.to(dtype).requires_grad_()
        images = net_g(leaf, z, first_order=first_order)
        grads = torch.autograd.grad((images * cotangent.to(dtype)).sum(), (leaf, z))
        return [part.detach().double() for part in (images, *grads)]

    exact = found(torch.float64, first_order=False)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        for a, b in zip(found(dtype, first_order=True), exact, strict=True):
            assert (a - b).norm() <= bound * b.norm()


def test_calls_from_eight_threads_equal_those_from_one(device):
    net_g, z = generator((3, 16, 16), 8, 4), normal(4, 8, device=device).float()
    thetas = [net_g.init(torch.Generator().manual_seed(seed)).to(device) for seed in range(8)]
    alone = [net_g(theta, z) for theta in thetas]
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # the first product of a thread of its own
        for i, images in enumerate(pool.map(lambda i: net_g(thetas[i % 8], z), range(160))):
            assert torch.equal(images, alone[i % 8])


@pytest.mark.parametrize(
    ("shape", "doublings"), [((1, 28, 28), 2), ((3, 32, 32), 4), ((3, 84, 84), 2), ((3, 64, 32), 4)]
)
def test_a_dcgan_doubles_its_grid_as_often_as_the_size_allows(shape, doublings):
    net_g = Generator(shape, 8, 4, kind="dcgan")
    assert sum(name.startswith("up") for name in net_g.layout.shapes) == doublings
    assert net_g.layout.shapes["project.weight"][0] == min(4 * 2**doublings, 32) * (
        shape[1] * shape[2] >> 2 * doublings
    )
    theta = net_g.reset(torch.Generator().manual_seed(0))
    images = net_g(theta, torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    assert tuple(images.shape) == (3, *shape)
    assert 0 < float(images.min().detach()) < float(images.max().detach()) < 1


@pytest.mark.parametrize("kind", ["dcgan", "transformer"])
def test_the_other_generators_have_the_gradient_of_finite_differences_and_one_value_in_both_ways(kind):
    net_g = Generator((1, 8, 8), 3, 2, kind=kind)
    theta = net_g.init(torch.Generator().manual_seed(0)).double().requires_grad_()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(2)).double()
    (grad,) = torch.autograd.grad(net_g(theta, z).square().sum(), theta)
    eps = 1e-6
    with torch.no_grad():
        rise = net_g(theta + eps * direction, z).square().sum() - net_g(theta - eps * direction, z).square().sum()
    assert float(grad @ direction) == pytest.approx(float(rise) / (2 * eps), rel=1e-4)
    torch.testing.assert_close(net_g(theta, z, first_order=True), net_g(theta, z))
    with pytest.raises(ValueError, match=f"a {kind} generator is not told the label"):
        Generator((1, 8, 8), 3, 2, 2, kind=kind)


@pytest.mark.parametrize(("shape", "parameters"), [((1, 28, 28), 1_899_977), ((3, 32, 32), 2_395_483)])
def test_a_transformer_has_a_token_for_each_patch_and_images_that_stand_alone(shape, parameters):
    net_g = Generator(shape, 256, 64, kind="transformer")
    assert net_g.layout.numel == parameters
    assert net_g.layout.shapes["position.weight"] == (shape[1] * shape[2] // 16, 128)
    for draw in (net_g.init, net_g.reset):
        theta = draw(torch.Generator().manual_seed(0))
        assert torch.equal(theta, draw(torch.Generator().manual_seed(0)))
        z = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
        images = net_g(theta, z)
        assert tuple(images.shape) == (4, *shape)
        assert 0 < float(images.min()) < float(images.max()) < 1
        torch.testing.assert_close(net_g(theta, z[1:3]), images[1:3])
        assert (images[0] - images[1]).abs().max() > 1e-3


def test_the_blocks_of_a_transformer_equal_those_of_the_framework():
    """torch's encoder layer with the norm first has the same tensors in the same order but for their names."""
    net_g, z = Generator((1, 8, 12), 5, 4, kind="transformer"), normal(3, 5)
    theta = net_g.init(torch.Generator().manual_seed(0)).double() + 0.1 * normal(net_g.layout.numel, seed=1)
    own = net_g.layout.unflatten(theta)
    x = F.linear(z, own["project.weight"], own["project.bias"]).view(3, 6, 8) + own["position.weight"]
    for i in range(2):
        block = nn.TransformerEncoderLayer(
            8, 4, 16, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
        ).double()
        names = {
            "self_attn.in_proj": f"heads{i}", "self_attn.out_proj": f"mixed{i}", "linear1": f"wide{i}",
            "linear2": f"narrow{i}", "norm1": f"norm{i}.attention", "norm2": f"norm{i}.mlp",
        }  # fmt: skip
        for theirs, ours in names.items():
            joint = "_" if theirs.endswith("in_proj") else "."
            for part in ("weight", "bias"):
                block.get_parameter(f"{theirs}{joint}{part}").data.copy_(own[f"{ours}.{part}"])
        x = block(x)
    x = F.layer_norm(x, (8,), own["norm.last.weight"], own["norm.last.bias"])
    patches = F.linear(x, own["patch.weight"], own["patch.bias"]).view(3, 2, 3, 8, 4, 4)
    pixels = F.leaky_relu(patches.permute(0, 3, 1, 4, 2, 5).reshape(3, 8, 8, 12), 0.2)
    expected = torch.sigmoid(F.conv2d(pixels, own["last.weight"], own["last.bias"], padding=1))
    torch.testing.assert_close(net_g(theta, z), expected)


def test_a_transformer_of_an_odd_width_is_an_error():
    with pytest.raises(ValueError, match="even width"):
        Generator((1, 8, 8), 3, 3, kind="transformer")
