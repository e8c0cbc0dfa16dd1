"""Bytes, pixels, normalised values, changes of size, and random views."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ray_dfml.core.images import draw_view, fit, normalise, to_bytes, to_pixels, view
from tests.support import PROPERTY, normal


@PROPERTY
@given(st.integers(0, 10**6))
def test_bytes_differ_from_their_source_by_at_most_half_a_level(device, seed):
    x = torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(seed)).to(device)
    assert (to_pixels(to_bytes(x), device=device) - x).abs().max() <= 1 / 510 + 1e-7


def test_every_byte_survives_the_round_trip(device):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_bytes(to_pixels(levels, device=device)), levels)


def test_pixels_out_of_range_are_clamped(device):
    assert to_bytes(torch.tensor([[[[-0.5, 0.0, 1.0, 7.0]]]], device=device)).tolist() == [[[[0, 0, 255, 255]]]]


def test_pixels_do_not_share_memory_with_read_only_bytes(device):
    images = np.full((1, 1, 2, 2), 51, np.uint8)
    images.flags.writeable = False
    pixels = to_pixels(images, device=device)
    pixels += 1
    assert images.max() == 51
    torch.testing.assert_close(pixels, torch.full((1, 1, 2, 2), 1.2, device=device))


def test_normalise_per_channel_and_per_image(device):
    x = normal(2, 3, 4, 5, device=device)
    mean, std = normal(2, 3, seed=1, device=device), normal(2, 3, seed=2, device=device).exp()
    found = normalise(x, mean, std)
    for i in range(2):
        torch.testing.assert_close(found[i], normalise(x[i], mean[i], std[i]))
        for c in range(3):
            torch.testing.assert_close(found[i, c], (x[i, c] - mean[i, c]) / std[i, c])


def test_images_that_fit_are_the_same_tensor(device):
    x = normal(2, 3, 6, 5, device=device)
    assert fit(x, (3, 6, 5)) is x


def test_one_channel_is_repeated_and_several_become_their_mean(device):
    grey, colour = normal(2, 1, 6, 5, device=device), normal(2, 3, 6, 5, seed=1, device=device)
    assert torch.equal(fit(grey, (3, 6, 5)), torch.cat([grey, grey, grey], 1))
    torch.testing.assert_close(fit(colour, (1, 6, 5))[:, 0], (colour[:, 0] + colour[:, 1] + colour[:, 2]) / 3)
    both = fit(colour, (1, 3, 4))
    torch.testing.assert_close(both, fit(fit(colour, (3, 3, 4)), (1, 3, 4)))


@pytest.mark.parametrize(("given", "wanted"), [(2, 3), (3, 2), (3, 4)])
def test_other_changes_of_channels_are_errors(device, given, wanted):
    with pytest.raises(ValueError, match=f"cannot turn images of {given} channels into {wanted}"):
        fit(normal(1, given, 4, 4, device=device), (wanted, 4, 4))


def test_growing_interpolates_between_the_centres_of_pixels(device):
    line = torch.tensor([0.0, 4.0, 8.0], device=device)
    # quarter and three quarters; the border is repeated
    expected = torch.tensor([0.0, 1.0, 3.0, 5.0, 7.0, 8.0], device=device)
    torch.testing.assert_close(fit(line.expand(1, 1, 3, 3), (1, 3, 6))[0, 0, 0], expected)
    torch.testing.assert_close(fit(line[:, None].expand(1, 1, 3, 3), (1, 6, 3))[0, 0, :, 0], expected)


def test_shrinking_filters_the_frequencies_that_do_not_fit(device):
    """Half the size: a pixel becomes the mean of four with weights 1, 3, 3, 1; without the filter, of two."""
    x = torch.zeros(1, 1, 8, 8, device=device)
    x[..., 3] = 8.0
    torch.testing.assert_close(fit(x, (1, 8, 4))[0, 0, 0], torch.tensor([0.0, 3.0, 1.0, 0.0], device=device))
    stripes = torch.tensor([0.0, 1.0], device=device).repeat(8).expand(1, 1, 16, 16)
    assert (fit(stripes, (1, 16, 5))[..., 1:-1] - 0.5).abs().max() < 0.1


@PROPERTY
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
def test_resizing_keeps_constants_bounds_and_mirrors(device, height, width, new_height, new_width):
    x = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(height * width)).to(device)
    shape = (1, new_height, new_width)
    found = fit(x, shape)
    assert found.shape == (2, *shape)
    assert found.min() >= x.min() - 1e-6
    assert found.max() <= x.max() + 1e-6
    torch.testing.assert_close(fit(x.flip(-1), shape), found.flip(-1))
    torch.testing.assert_close(fit(torch.full_like(x, 0.7), shape), torch.full((2, *shape), 0.7, device=device))


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 7, 5), (1, 5, 4)])
def test_a_change_of_size_and_channels_is_differentiable(device, shape):
    assert gradcheck(lambda x: fit(x, shape), (normal(2, 3, 5, 4, device=device).requires_grad_(),), nondet_tol=1e-12)


@pytest.mark.parametrize("fill", ["edge", "zero"])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_the_centred_view_is_the_image(device, pad, fill):
    x = normal(2, 3, 6, 5, device=device)
    assert torch.equal(view(x, (pad, pad, False), pad=pad, fill=fill), x)


@PROPERTY
@given(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.booleans(), st.sampled_from(["edge", "zero"]))
def test_a_view_is_the_padded_image_cropped_and_mirrored(device, pad, dy, dx, mirror, fill):
    dy, dx = dy % (2 * pad + 1), dx % (2 * pad + 1)
    x = normal(2, 1, 5, 4, device=device)
    border = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded = np.pad(x.cpu().numpy(), border, mode="constant" if fill == "zero" else "edge")
    expected = padded[:, :, dy : dy + 5, dx : dx + 4]
    expected = expected[..., ::-1] if mirror else expected
    assert np.array_equal(view(x, (dy, dx, mirror), pad=pad, fill=fill).cpu().numpy(), expected)


@pytest.mark.parametrize("fill", ["edge", "zero"])
def test_a_view_is_differentiable(device, fill):
    assert gradcheck(
        lambda x: view(x, (3, 0, True), pad=2, fill=fill),
        (normal(2, 1, 4, 3, device=device).requires_grad_(),),
        nondet_tol=1e-12,
    )


def test_an_edge_view_of_a_white_page_is_white(device):
    page = torch.ones(1, 1, 5, 5, device=device)
    assert torch.equal(view(page, (0, 8, False), pad=4, fill="edge"), page)
    assert view(page, (0, 8, False), pad=4, fill="zero").min() == 0


def test_drawn_views_cover_all_offsets_and_mirror_only_if_allowed():
    rng = torch.Generator().manual_seed(0)
    drawn = [draw_view(rng, pad=1, flip=True) for _ in range(300)]
    assert {(dy, dx) for dy, dx, _ in drawn} == {(i, j) for i in range(3) for j in range(3)}
    assert {mirror for *_, mirror in drawn} == {False, True}
    assert not any(draw_view(rng, pad=1, flip=False)[2] for _ in range(50))
    assert {draw_view(rng, pad=0, flip=False) for _ in range(20)} == {(0, 0, False)}


def test_the_drawn_view_depends_on_the_generator_not_on_whether_mirrors_are_allowed():
    one, other = (draw_view(torch.Generator().manual_seed(5), pad=4, flip=flip) for flip in (True, False))
    assert one[:2] == other[:2]
