from dataclasses import replace

import pytest
import torch

from interp.errors import InputError
from interp.hyperfeatures import cache, presets, stack
from interp.models.diffusion import Diffusion
from tests.tiny_diffusion import stable_diffusion


def test_a_cache_holds_the_stacks_and_is_computed_once(tmp_path):
    sd = Diffusion(stable_diffusion())
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spec = presets.one_step(sd, seed=4)
    stacks = cache(sd, images, spec, tmp_path, batch=2)
    assert len(stacks) == 3
    expected = torch.cat([stack(sd, images[:2], spec), stack(sd, images[2:], spec)]).half()
    assert all(torch.equal(stacks[index], expected[index]) for index in range(3))
    # A missing file is made again, as it was; the others are not touched.
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    (tmp_path / "000002.safetensors").unlink()
    with pytest.raises(InputError, match=r"000002\.safetensors' cannot be read"):
        stacks[2]
    again = cache(sd, images, spec, tmp_path, batch=2)
    assert torch.equal(again[2], expected[2])
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert [name for name in before if before[name] != after[name]] == ["000002.safetensors"]
    more = torch.cat([images, images[:1].flip(-1)])
    longer = cache(sd, more, spec, tmp_path, batch=2)
    assert len(longer) == 4 and torch.equal(longer[0], stacks[0])
    with pytest.raises(InputError, match="other images, from image 1 on"):
        cache(sd, images[[0, 0, 2]], spec, tmp_path, batch=2)
    with pytest.raises(IndexError, match="image 3 is out of range"):
        stacks[3]


def test_a_cache_of_other_features_is_refused(tmp_path):
    sd = Diffusion(stable_diffusion())
    images = torch.zeros(1, 3, 16, 16)
    spec = presets.one_step(sd)
    cache(sd, images, spec, tmp_path)
    with pytest.raises(InputError, match="holds stacks with seed 0, not 5"):
        cache(sd, images, replace(spec, seed=5), tmp_path)
    with pytest.raises(InputError, match="holds stacks with batch 8, not 2"):
        cache(sd, images, spec, tmp_path, batch=2)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        cache(sd, images, spec, tmp_path)
