"""Image sources: range, sizes, draws, and what their images look like on average."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.sources import SOURCES, Source
from ray_dfml.core.sources.dip import _placed
from ray_dfml.core.sources.draws import GROUP, axes, channel_mixed, grouped, pick, standardised, uniform
from ray_dfml.core.sources.mutants import _altered, _joined, mutants
from ray_dfml.core.sources.shapes import _depth
from ray_dfml.core.sources.strokes import _bernstein, _distance, _hats, _points
from ray_dfml.core.sources.warp import Warp, augment, crop, recolour, warp, zoom

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (4, 9, 17)]
EACH = pytest.mark.parametrize("name", SOURCES)
FIRST = [name for name, source in SOURCES.items() if not source.parents]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str, shape: tuple[int, int, int], count: int, seed: int = 0) -> Tensor:
    """Images of any source; those of `mutants` have ten parents of noise and two labels."""
    rng, source = seeded(seed), SOURCES[name]
    if source.parents:
        return source.function(rng, count, torch.rand(10, *shape, generator=seeded(99)), torch.arange(10) % 2)
    return source.function(rng, count, shape)


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_pixels_of_the_shape_and_number_asked_for(name, shape):
    for count in (0, 1, GROUP + 1):
        x = made(name, shape, count)
        assert x.shape == (count, *shape)
        assert x.dtype == torch.float32
        assert not x.requires_grad
        assert bool(((x >= 0) & (x <= 1)).all())


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("size", [64, 84])
def test_large_images_look_like_small_ones(name, size):
    """What is drawn scales with the image. Fine textures differ; darkness and contrast do not."""
    small, large = (made(name, (1, side, side), GROUP, seed=3) for side in (28, size))
    assert abs(float(small.mean() - large.mean())) < 0.04
    assert abs(float(small.std() - large.std())) < 0.06


@EACH
def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(name):
    before = torch.random.get_rng_state()
    one = made(name, (1, 28, 28), 40)
    torch.rand(7)
    assert torch.equal(one, made(name, (1, 28, 28), 40))
    torch.random.set_rng_state(before)
    made(name, (1, 28, 28), 40)
    assert torch.equal(torch.random.get_rng_state(), before)


@EACH
def test_more_threads_give_the_same_bits(name):
    one = made(name, (3, 32, 32), 10)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(made(name, (3, 32, 32), 10), one)
    finally:
        torch.set_num_threads(threads)


@EACH
def test_the_first_images_of_a_longer_call_are_those_of_a_shorter_one(name):
    assert torch.equal(made(name, (1, 12, 12), GROUP + 5)[:7], made(name, (1, 12, 12), 7))


@EACH
def test_images_of_two_seeds_and_of_one_call_are_all_different(name):
    x = torch.cat([made(name, (1, 28, 28), 60, seed) for seed in (0, 1)]).flatten(1)
    apart = torch.cdist(x, x) + torch.eye(len(x))
    assert float(apart.min()) > 1e-3
    centred = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    assert abs(float((centred[:60] @ centred[60:].T).mean())) < 0.3


@EACH
def test_a_source_says_what_it_assumes(name):
    source = SOURCES[name]
    assert isinstance(source, Source)
    assert len(source.assumption.split()) > 4
    assert "assumes" in (source.function.__doc__ or "")


@pytest.mark.parametrize("name", FIRST)
def test_images_below_eight_pixels_are_refused(name):
    with pytest.raises(ValueError, match="at least 8, got 7x28"):
        made(name, (1, 7, 28), 1)


STATISTICS = {
    ("dip", 1): (0.27, 0.43, 0.24, 0.36), ("dip", 3): (0.44, 0.56, 0.22, 0.34),
    ("dipw", 1): (0.14, 0.28, 0.17, 0.29), ("dipw", 3): (0.2, 0.36, 0.18, 0.3),
    ("dipc", 1): (0.05, 0.13, 0.13, 0.24), ("dipc", 3): (0.08, 0.17, 0.15, 0.27),
    ("shapes", 1): (0.11, 0.2, 0.2, 0.3), ("shapes", 3): (0.45, 0.55, 0.17, 0.27),
    ("strokes", 1): (0.03, 0.09, 0.13, 0.22), ("strokes", 3): (0.02, 0.07, 0.1, 0.18),
}  # fmt: skip
"""Bounds of the mean pixel, and of the mean over images of their standard deviation."""


@pytest.mark.parametrize(("name", "channels"), STATISTICS)
def test_darkness_and_contrast(name, channels):
    x = made(name, (channels, 28, 28), 4 * GROUP)
    low, high, flat, rough = STATISTICS[name, channels]
    assert low < float(x.mean()) < high
    assert flat < float(x.std((1, 2, 3)).mean()) < rough
    assert float((x.std((1, 2, 3)) < 0.01).float().mean()) < 0.1, "too many images are of one grey"


@pytest.mark.parametrize(("name", "dark"), [("dipw", 0.6), ("dipc", 0.9), ("shapes", 0.9), ("strokes", 0.9)])
def test_the_border_is_dark_where_the_source_assumes_a_dark_ground(name, dark):
    x = made(name, (1, 28, 28), 2 * GROUP)
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], -1)
    assert float((border < 0.25).float().mean()) > dark
    assert float(x[:, :, 8:20, 8:20].mean()) > 1.5 * float(border.mean())


def test_dip_is_smooth_at_some_scale_and_its_networks_differ():
    x = made("dip", (1, 28, 28), 8 * GROUP)
    centred = x - x.mean((1, 2, 3), keepdim=True)
    alike = (centred[..., 1:] * centred[..., :-1]).mean((1, 2, 3)) / centred.square().mean((1, 2, 3))
    of_groups = alike.view(8, GROUP).mean(1)
    assert float(of_groups.mean()) > 0.3
    assert float(of_groups.std()) > 0.05


def test_channels_of_colour_share_most_of_their_variance_but_not_all():
    x = made("dip", (3, 32, 32), 4 * GROUP).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(x)[[0, 0, 1], [1, 2, 2]]
    assert bool(((correlation > 0.6) & (correlation < 0.95)).all())
    mixed = torch.corrcoef(channel_mixed(seeded(), 3, 20000))
    assert bool(((mixed[[0, 0, 1], [1, 2, 2]] - 0.8).abs() < 0.02).all())
    assert abs(float(channel_mixed(seeded(), 3, 20000).var()) - 1) < 0.03
    assert abs(float(channel_mixed(seeded(), 1, 20000).var()) - 1) < 0.03


def test_draws():
    x = uniform(seeded(), 20000, low=-2, high=4)
    assert float(x.min()) >= -2
    assert float(x.max()) < 4
    assert abs(float(x.mean()) - 1) < 0.05
    assert {pick(rng, "abc") for rng in [seeded()] for _ in range(50)} == {"a", "b", "c"}
    found = standardised(torch.randn(4, 3, 5, 5, generator=seeded()).double() * 7 + 2, (0, 2, 3))
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3, dtype=torch.double), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3, dtype=torch.double), atol=1e-5, rtol=0)
    assert torch.equal(standardised(torch.full((2, 1, 3, 3), 0.5), (1, 2, 3)), torch.zeros(2, 1, 3, 3))


def test_no_group_is_made_for_no_images():
    assert grouped(lambda: pytest.fail("a group was made"), 0, (1, 8, 8)).shape == (0, 1, 8, 8)


def test_pixel_centres_lie_inside_and_symmetrically():
    x, y = axes(3, 4)
    torch.testing.assert_close(x.flatten(), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-2 / 3, 0.0, 2 / 3]))


def test_a_piece_of_a_collage_only_shrinks():
    """White pieces, rotated, shrunk and shifted by less than a half-width, are never larger than they were."""
    placed = _placed(seeded(), torch.ones(400, 1, 28, 28))
    area = placed.mean((1, 2, 3))
    assert float(area.max()) <= 1.0 + 1e-6
    assert float(area.min()) > 0.005
    assert 0.1 < float(area.mean()) < 0.5


def test_a_warp_of_no_strength_is_the_image():
    x = torch.rand(5, 3, 9, 14, generator=seeded())
    for fill in ("zero", "edge"):
        torch.testing.assert_close(warp(seeded(), x, Warp(), fill=fill), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(zoom(seeded(), torch.ones(3, 1, 8, 8), 0.5, 3.0, fill="edge"), torch.ones(3, 1, 8, 8))
    torch.testing.assert_close(recolour(seeded(), x, 0.0), x, atol=1e-6, rtol=0)


def test_mirrors_are_images_or_their_mirror_about_half_the_time():
    x = torch.rand(1, 1, 8, 8, generator=seeded()).expand(200, 1, 8, 8)
    found = warp(seeded(), x, Warp(mirror=True))
    same = (found - x).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (found - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same ^ mirrored).all())
    assert 70 < int(mirrored.sum()) < 130


def test_a_shift_moves_the_middle_by_at_most_its_bound():
    x = torch.zeros(300, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 1
    moved = warp(seeded(), x, Warp(shift=0.25))
    across, down = axes(28, 28)
    total = moved.sum((1, 2, 3))
    for axis in (across, down):
        middle = (moved * axis).sum((1, 2, 3)) / total
        assert 0.2 < float(middle.abs().max()) <= 0.25 + 1e-3
        assert abs(float(middle.mean())) < 0.03


def test_a_scale_changes_the_area_by_the_square_of_its_exponential():
    x = torch.zeros(200, 1, 60, 60)
    x[:, :, 20:40, 20:40] = 1
    area = warp(seeded(), x, Warp(scale=0.3)).sum((1, 2, 3)) / 400
    assert float(area.max()) <= math.exp(0.6) * 1.02
    assert float(area.min()) >= math.exp(-0.6) * 0.98
    assert float(area.max()) > 1.6
    turned = warp(seeded(), x, Warp(rotation=3.0)).sum((1, 2, 3)) / 400
    torch.testing.assert_close(turned, torch.ones(200), atol=0.03, rtol=0)


def test_an_elastic_warp_bends_but_invents_no_values():
    x = 0.2 + 0.6 * torch.rand(20, 2, 28, 28, generator=seeded())
    found = warp(seeded(), x, Warp(elastic=0.1), fill="edge")
    assert float((found - x).abs().mean()) > 0.02
    assert 0.2 - 1e-6 <= float(found.min()) <= float(found.max()) <= 0.8 + 1e-6


def test_an_edge_fill_keeps_a_white_page_white_and_a_zero_fill_does_not():
    page, strength = torch.ones(50, 1, 12, 12), Warp(rotation=1.0, scale=0.5, shift=0.5, elastic=0.2)
    torch.testing.assert_close(warp(seeded(), page, strength, fill="edge"), page)
    assert float(warp(seeded(), page, strength).min()) < 0.1


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_zoom_of_no_positive_factor_is_an_error(bounds):
    with pytest.raises(ValueError, match="0 < low <= high"):
        zoom(seeded(), torch.zeros(1, 1, 8, 8), *bounds)


def test_a_zoom_magnifies_by_the_factors_asked_for():
    x = torch.zeros(300, 1, 84, 84)
    x[:, :, 32:52, 32:52] = 1
    grown = zoom(seeded(), x, 1.5, 2.0)
    width = grown[:, 0, 42].sum(1) / 20
    assert 1.5 * 0.97 <= float(width.min()) < 1.6
    assert 1.9 < float(width.max()) <= 2.0 * 1.03


def test_colour_changes_stay_in_range_and_leave_grey_images_of_one_channel_their_order():
    x = torch.rand(50, 1, 8, 8, generator=seeded()) * 0.2 + 0.4
    found = recolour(seeded(), x, 0.3)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert float((found.mean((1, 2, 3)) - x.mean((1, 2, 3))).std()) > 0.02
    order = x[:, 0, 0].argsort(1)
    assert bool((found[:, 0, 0].gather(1, order).diff(dim=1) >= -1e-6).all())


def test_bytes_and_pixels_have_the_same_mutants():
    stored = torch.randint(0, 256, (9, 1, 10, 10), dtype=torch.uint8, generator=seeded())
    labels = torch.arange(9) % 3
    assert torch.equal(mutants(seeded(), 20, stored, labels), mutants(seeded(), 20, stored.float() / 255, labels))


def test_parents_of_rare_labels_are_as_likely_as_others():
    """99 black images of one label and a white one of the other: 70 % of the mutants have a white parent."""
    parents = torch.zeros(100, 1, 16, 16)
    parents[-1] = 1
    x = mutants(seeded(), 8 * GROUP, parents, (torch.arange(100) == 99).long())
    bright = float((x.amax((1, 2, 3)) > 0.2).float().mean())
    assert 0.5 < bright < 0.7


def test_labels_may_skip_numbers_and_no_parents_are_an_error():
    assert mutants(seeded(), 3, torch.rand(2, 1, 8, 8, generator=seeded()), torch.tensor([7, 2])).isfinite().all()
    with pytest.raises(ValueError, match="at least one parent"):
        mutants(seeded(), 3, torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))


def test_two_parents_are_joined_in_five_ways_at_their_rates():
    n = 4000
    one, other = torch.full((n, 1, 8, 8), 0.8), torch.full((n, 1, 8, 8), 0.4)
    found = _joined(seeded(), one, other)
    flat = (found.amax((1, 2, 3)) - found.amin((1, 2, 3))) < 1e-6
    value = found[:, 0, 0, 0]
    alone_or_larger = (flat & ((value - 0.8).abs() < 1e-6)).float().mean()
    blended = (flat & (value > 0.53) & (value < 0.67)).float().mean()
    taken_away = (flat & ((value - 0.44).abs() < 1e-6)).float().mean()
    cut = (~flat).float().mean()
    assert 0.57 < float(alone_or_larger) < 0.66  # 0.6, and the cuts that leave nothing of the second
    assert abs(float(blended) - 0.15) < 0.02
    assert abs(float(taken_away) - 0.1) < 0.02
    assert 0.12 < float(cut) < 0.16


def test_images_are_dilated_blurred_or_sharpened_at_their_rates():
    n = 4000
    x = torch.zeros(n, 1, 9, 9)
    x[:, :, 4, 4] = 0.6
    found, blurred = _altered(seeded(), x), F.avg_pool2d(x, 3, 1, 1)
    ways = [F.max_pool2d(x, 3, 1, 1), blurred, (x - 0.4) * 2 + 0.3, x]
    rates = [float(((found - way).abs().amax((1, 2, 3)) < 1e-6).float().mean()) for way in ways]
    assert max(abs(rate - p) for rate, p in zip(rates, (0.15, 0.1, 0.1, 0.65), strict=True)) < 0.02


def test_strokes_pass_through_their_ends_and_lines_through_all_knots():
    time = torch.linspace(0, 1, 9)
    for weights in (_bernstein(time), _hats(time)):
        torch.testing.assert_close(weights.sum(1), torch.ones(9))
        assert weights[0].tolist() == [1, 0, 0, 0, 0]
        assert weights[-1].tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(_hats(time)[::2], torch.eye(5))
    torch.testing.assert_close(_bernstein(torch.tensor([0.5]))[0] * 16, torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]))


def test_the_distance_is_that_of_the_nearest_point():
    points = torch.tensor([[[14.5, 14.5], [20.5, 3.5]]])
    found = _distance(points, 28, 28)[0, 0]
    assert float(found[14, 14]) == 0
    assert float(found[3, 20]) == 0
    assert float(found[14, 18]) == 4
    assert float(found[0, 24]) == 5
    every = _distance(_points(seeded()), 28, 28)
    assert every.isfinite().all()
    assert float(every.amin((1, 2, 3)).max()) < 8


def test_a_shape_is_as_deep_as_its_smaller_half_axis_and_negative_outside():
    depth = _depth(seeded(), (1, 56, 56), low=4, high=9, centre=(14, 14))
    deepest = depth.amax((1, 2, 3))
    assert float(deepest.max()) <= 9
    assert float(deepest.min()) > 1.5  # a triangle is half as deep
    corners = depth[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.max()) < 0


def test_a_crop_is_a_part_of_the_padded_image_and_each_image_has_its_own() -> None:
    """Of an image of distinct pixels the crop tells its offsets; all of them occur, and 0 padding changes nothing."""
    x = torch.arange(30.0).view(1, 1, 5, 6).repeat(400, 1, 1, 1)
    found = crop(seeded(), x, 2)
    assert torch.equal(crop(seeded(), x, 0), x)
    padded = F.pad(x[:1], (2, 2, 2, 2), mode="replicate")[0, 0]
    parts = {(dy, dx): padded[dy : dy + 5, dx : dx + 6] for dy in range(5) for dx in range(5)}
    met = [next(where for where, part in parts.items() if torch.equal(part, one[0])) for one in found]
    assert set(met) == set(parts)


def test_augment_changes_colour_images_by_themselves_and_only_crops_grey_ones() -> None:
    x = torch.rand(1, 3, 16, 16, generator=seeded()).repeat(40, 1, 1, 1)
    found = augment(seeded(), x)
    assert found.shape == x.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert len({one.numpy().tobytes() for one in found}) == 40
    same_draws = crop(seeded(), x, 2)
    mirrored = [
        float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.5
        for one, other in zip(found, same_draws, strict=True)
    ]
    assert 8 <= sum(mirrored) <= 32
    grey = torch.rand(9, 1, 28, 28, generator=seeded())
    assert torch.equal(augment(seeded(), grey), crop(seeded(), grey, 3))


def test_augment_only_crops_grey_images_among_colour_ones() -> None:
    """Grey ones have equal channels, or nearly so after a normalisation; the colour ones have the same draws."""
    colour = torch.rand(8, 3, 16, 16, generator=seeded())
    grey = (colour[:, :1] + torch.tensor([0.0, 1e-6, -1e-6]).view(3, 1, 1)).clamp(0, 1)
    is_grey = (torch.arange(8) % 2 == 0).view(-1, 1, 1, 1)
    found = augment(seeded(), torch.where(is_grey, grey, colour))
    expected = torch.where(is_grey, crop(seeded(), grey, 2), augment(seeded(), colour))
    assert torch.equal(found, expected)
