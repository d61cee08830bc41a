import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.hyperfeatures import concatenate, single, singles

CHANNELS = (2, 3)


def stack():
    return torch.randn(2, 4, 5, 3, 3, generator=torch.Generator().manual_seed(0))


def test_concatenation_joins_steps_and_within_them_layers():
    features = stack()
    joined = concatenate(features)
    assert joined.shape == (2, 20, 3, 3)
    assert torch.equal(joined[:, 5 * 2 + 3], features[:, 2, 3])
    assert torch.equal(concatenate(features, [3]), features[:, 3])
    unit = concatenate(features, [1, 2], channels=CHANNELS)
    torch.testing.assert_close(unit[:, 5:7].norm(dim=1), torch.ones(2, 3, 3))
    part = features[:, 2, 2:]
    torch.testing.assert_close(unit[:, 7:], part / part.norm(dim=1, keepdim=True))


def test_every_single_map_comes_out_of_one_stack():
    features = stack()
    found = list(singles(features, CHANNELS))
    assert [(step, layer) for step, layer, _ in found] == [(s, n) for s in range(4) for n in range(2)]
    assert torch.equal(found[5][2], features[:, 2, 2:])
    assert torch.equal(single(features, CHANNELS, layer=0, step=3), features[:, 3, :2])


def test_what_the_stack_lacks_is_refused():
    with pytest.raises(InputError, match="step 4 is out of range: the stack has 4 steps"):
        concatenate(stack(), [4])
    with pytest.raises(InputError, match="no steps"):
        concatenate(stack(), [])
    with pytest.raises(InputError, match="layer 2 is out of range"):
        single(stack(), CHANNELS, layer=2, step=0)
    with pytest.raises(ShapeError, match="make 6, the stack has 5"):
        single(stack(), (3, 3), layer=0, step=0)
