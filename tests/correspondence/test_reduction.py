"""The joint PCA against an eigendecomposition."""

import pytest
import torch

from interp.correspondence import joint_pca
from interp.errors import InputError, ShapeError


def test_components_are_the_joint_eigenvectors():
    a, b = torch.randn(6, 4, 5) * torch.arange(1, 7)[:, None, None], torch.randn(6, 3, 3) + 2
    reduced = joint_pca([a, b], 2)
    rows = torch.cat([a.flatten(1).T, b.flatten(1).T]).double()
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    expected = rows @ vectors.flip(1)[:, :2]
    found = torch.cat([one.flatten(1).T for one in reduced]).double()
    assert [one.shape for one in reduced] == [(2, 4, 5), (2, 3, 3)]
    # float32 against float64; the sign of an eigenvector is free.
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.square().sum(dim=0), values.flip(0)[:2], atol=0, rtol=1e-4)
    again = joint_pca([a, b], 2)
    assert all(torch.equal(one, other) for one, other in zip(reduced, again, strict=True))


def test_refusals():
    with pytest.raises(ShapeError, match=r"\[3, 4\]"):
        joint_pca([torch.randn(3, 2, 2), torch.randn(4, 2, 2)], 1)
    with pytest.raises(InputError, match="dim is 5; 8 positions of 3 channels allow 1 to 3"):
        joint_pca([torch.randn(3, 2, 2), torch.randn(3, 2, 2)], 5)
