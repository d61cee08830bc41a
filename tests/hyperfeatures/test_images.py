import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from interp.errors import InputError, ShapeError
from interp.hyperfeatures import prepare


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_images_go_through_pillow_first_and_then_through_the_bilinear_resize():
    image = picture(20, 30)
    shrunk = torch.from_numpy(np.asarray(image.resize((8, 12), Image.Resampling.BILINEAR)).copy()).permute(2, 0, 1)
    expected = F.interpolate(shrunk[None] / 127.5 - 1, size=(16, 24), mode="bilinear", align_corners=False)
    found = prepare(image, (12, 8), (16, 24))
    torch.testing.assert_close(found, expected)
    direct = prepare(image, None, (16, 24))
    assert (found - direct).abs().max() > 0.1
    assert prepare([image, image]).shape == (2, 3, 30, 20)


def test_tensors_take_the_same_path_up_to_the_rounding_of_bytes():
    image = picture(20, 30)
    found = prepare(prepare(image), (12, 8), (16, 24))
    # Pillow rounds to whole bytes (half a byte is 0.004 of the range -1 .. 1) between its two passes and after them.
    torch.testing.assert_close(found, prepare(image, (12, 8), (16, 24)), rtol=0, atol=0.012)


def test_images_of_several_sizes_need_a_size():
    mixed = [picture(20, 30), picture(24, 16)]
    assert prepare(mixed, (8, 8)).shape == (2, 3, 8, 8)
    one_by_one = torch.cat([prepare(image, None, (8, 8)) for image in mixed])
    assert torch.equal(prepare(mixed, None, (8, 8)), one_by_one)
    with pytest.raises(ShapeError, match=r"\(30, 20\) and \(16, 24\)"):
        prepare(mixed)
    with pytest.raises(InputError, match="no images"):
        prepare([])
