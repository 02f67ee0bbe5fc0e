"""Parts: of all sizes and places, as large as the images that they are of."""

import torch

from quant.parts import PARTS, SIDES, add_parts, enlarge


def test_parts_are_of_all_sizes_and_places_and_not_distorted():
    across, down = torch.linspace(0, 1, 64).expand(40, 64), torch.linspace(0, 1, 40)[:, None].expand(40, 64)
    parts = enlarge(torch.stack([across, down, across]).expand(50, 3, 40, 64), torch.Generator())
    assert parts.shape == (50, 3, 40, 64)
    wide = parts[:, 0].diff(dim=2)[..., 16:48].mean((1, 2)) * 63  # 1 in the whole image
    high = parts[:, 1].diff(dim=1)[:, 10:30].mean((1, 2)) * 39
    assert SIDES[0] * 0.9 < wide.min() < 0.35 and 0.65 < wide.max() < SIDES[1] * 1.1
    torch.testing.assert_close(wide, high, rtol=0, atol=0.04)
    middles = parts[:, :2, 20, 32]
    assert middles.std(dim=0).min() > 0.1 and torch.corrcoef(middles.T)[0, 1].abs() < 0.5


def test_a_part_has_no_value_that_the_image_has_not():
    images = torch.rand(8, 3, 16, 16).round()
    assert enlarge(images, torch.Generator()).aminmax() == images.aminmax()


def test_parts_of_each_image_are_added_and_always_the_same():
    images = torch.stack([torch.zeros(3, 8, 8), torch.rand(3, 8, 8) + 1])
    more = add_parts(images)
    assert torch.equal(more, add_parts(images)) and torch.equal(more[:2], images)
    dark, light = more[2::2], more[3::2]
    assert len(dark) == len(light) == PARTS and not dark.any() and light.min() >= 1
    assert not torch.equal(light[0], light[1])


def test_other_parts_are_drawn_each_time():
    images, random = torch.rand(4, 3, 16, 16), torch.Generator()
    assert not torch.equal(enlarge(images, random), enlarge(images, random))


def test_an_image_of_one_pixel_is_its_own_part():
    image = torch.rand(1, 3, 1, 1)
    torch.testing.assert_close(enlarge(image, torch.Generator()), image)
