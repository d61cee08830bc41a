import json

import pytest
import torch

from interp import Add, Function, Interpolate, MeanAblate, Project, Replace, Resample, Scale, Zero
from interp.edit_files import load_edits, save_edits
from interp.errors import InputError
from interp.positions import PerRow
from interp.regions import Region

S = "blocks.1.hook_resid_post"
EDITS = [
    Replace(S, torch.randn(2, 4), at="last", rows=[0, -1], when="every"),
    Add(S, torch.randn(4).to(torch.bfloat16), scale=0.1, at=["delimiter[4]", -1, slice(1, None, 2)], when=3),
    Interpolate(S, torch.randn(4, dtype=torch.float64), 1 / 3, at=PerRow(("last", [0, 1]))),
    Scale("blocks.0.attn.hook_pattern", 2.5, heads=(0, 3), at=(1, 2)),
    Zero(S, heads=1, at=range(3)),
    MeanAblate(S),
    MeanAblate(S, torch.randn(6, 4).T),
    Resample(S, seed=7),
    Project(S, torch.randn(2, 4), onto=True, center=torch.randn(4)),
]


@pytest.mark.parametrize("name", ["edits", "edits.json", "edits.safetensors", "deep/edits.v1"])
def test_edits_come_back_as_they_were(tmp_path, name) -> None:
    save_edits(EDITS, tmp_path / name)
    loaded = load_edits(tmp_path / name)
    assert loaded == EDITS
    assert [type(one.at) for one in loaded] == [type(one.at) for one in EDITS]
    assert loaded[1].value.dtype == torch.bfloat16
    save_edits(EDITS[4], tmp_path / "one")
    assert load_edits(tmp_path / "one") == [EDITS[4]]


def test_code_cannot_be_saved(tmp_path) -> None:
    with pytest.raises(InputError, match="no code"):
        save_edits([EDITS[0], Function(S, torch.tanh)], tmp_path / "edits")
    with pytest.raises(InputError, match="no form on disk"):
        save_edits(Zero(S, at=object()), tmp_path / "edits")
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files(tmp_path) -> None:
    with pytest.raises(InputError, match="no edits at"):
        load_edits(tmp_path / "edits")
    save_edits(EDITS, tmp_path / "edits")
    good, tensors = (tmp_path / "edits.json").read_text(), (tmp_path / "edits.safetensors").read_bytes()
    entries = json.loads(good)
    bad = [good[:-9], "3", '["x"]', "[{}]", json.dumps([{**entries[4], "kind": "Zerro"}])]
    bad += [json.dumps([{**entries[4], "colour": 1}]), json.dumps([{**entries[4], "at": {"set": [1]}}])]
    for text in bad:
        (tmp_path / "edits.json").write_text(text)
        with pytest.raises(InputError):
            load_edits(tmp_path / "edits")
    with pytest.raises(InputError, match="Did you mean 'Zero'"):
        (tmp_path / "edits.json").write_text(bad[4])
        load_edits(tmp_path / "edits")
    (tmp_path / "edits.json").write_text(good)
    for damaged in (tensors[:-20], b"", tensors[:4]):
        (tmp_path / "edits.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            load_edits(tmp_path / "edits")
    (tmp_path / "edits.safetensors").unlink()
    with pytest.raises(InputError, match="no edits at"):
        load_edits(tmp_path / "edits")


def test_regions_steps_and_halves(tmp_path) -> None:
    edits = [
        Scale("up.1.resnets.0.hook_branch", 2.0, at=Region.box(0.0, 0.25, 1.0, 0.5), steps=slice(2, None), half="cond"),
        Zero("up.1.resnets.0.hook_branch", at=Region.mask(torch.eye(3) > 0), steps=[1, 2]),
        Replace("mid.attn.0.blocks.0.self.hook_pattern", torch.ones(4), steps=3, half="uncond", renormalise=True),
    ]
    save_edits(edits, tmp_path / "edits")
    loaded = load_edits(tmp_path / "edits")
    assert loaded == edits
    assert repr(loaded) == repr(edits)
    assert repr(loaded[0]) == (
        "Scale('up.1.resnets.0.hook_branch', at=Region.box(0.0, 0.25, 1.0, 0.5), steps=slice(2, None, None), "
        "half='cond', factor=2.0)"
    )
    for changed in (
        Zero(edits[1].site, at=Region.mask(torch.ones(3, 3) > 0), steps=[1, 2]),
        Zero(edits[1].site, at=edits[1].at, steps=[1, 3]),
        Zero(edits[1].site, at=edits[1].at, steps=[1, 2], half="cond"),
    ):
        assert changed != loaded[1]
