"""An image has the same logits whatever it is asked about with, and they are those of the network."""

import numpy as np
import pytest
import torch

from ray_dfml.core import steady
from ray_dfml.core.backbones import BACKBONES
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.steady import steady_logits
from tests.support import card, random_teacher, rounding, unique_images

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


@pytest.mark.parametrize("arch", BACKBONES)
def test_the_bits_do_not_depend_on_the_batch(arch: str) -> None:
    teacher = random_teacher(card(0, arch=arch, way=5, size=32))
    count = steady.MOST + 3 if teacher.net.macs < 1e8 else steady.FEWEST
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    weights = (teacher.net, teacher.theta, teacher.stats)
    with torch.no_grad():
        wanted = teacher.net(teacher.theta, normalise(to_pixels(images), MEAN, STD), teacher.stats)
    found = steady_logits(*weights, images, MEAN, STD)
    assert torch.equal(found, wanted)
    for size in (1, 3):
        some = images[-size:]
        assert torch.equal(steady_logits(*weights, some, MEAN, STD), wanted[-size:])
    floats = images.astype(np.float32) / 255
    assert torch.equal(steady_logits(*weights, floats[:4], MEAN, STD), wanted[:4])


def test_no_images_have_no_logits() -> None:
    teacher = random_teacher(card(0, way=5))
    weights = (teacher.net, teacher.theta, teacher.stats)
    assert steady_logits(*weights, unique_images(0, (3, 16, 16)), MEAN, STD).shape == (0, 5)


def test_the_logits_stay_on_the_device(device: torch.device) -> None:
    images = unique_images(3, (3, 16, 16))
    (here, there) = (random_teacher(card(0, way=5), place) for place in (torch.device("cpu"), device))
    found = steady_logits(there.net, there.theta, there.stats, images, MEAN, STD)
    assert found.device.type == device.type
    wanted = steady_logits(here.net, here.theta, here.stats, images, MEAN, STD)
    torch.testing.assert_close(found.cpu(), wanted, **rounding(device))
