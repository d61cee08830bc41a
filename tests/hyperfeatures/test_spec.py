import json

import pytest

from interp.errors import InputError
from interp.hyperfeatures import FeatureSpec, calls, saved_indices

OFFICIAL = (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)


def test_the_official_indices_become_calls_clean_first_in_both_modes():
    assert calls(OFFICIAL, 50, "inversion") == (0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49)
    assert calls(OFFICIAL, 50, "generation") == OFFICIAL
    assert calls(OFFICIAL[::-1], 50, "generation") == OFFICIAL
    with pytest.raises(InputError, match="saved index 50 is out of range"):
        calls((50,), 50, "inversion")
    with pytest.raises(InputError, match="not 'noise'"):
        calls((0,), 50, "noise")


def test_the_choice_of_steps_scales_and_keeps_both_ends():
    assert saved_indices(50) == OFFICIAL
    assert saved_indices(100) == (99, 90, 80, 70, 60, 50, 40, 30, 20, 10, 0)
    assert saved_indices(25) == (24, 22, 20, 17, 15, 12, 10, 7, 5, 2, 0)
    assert saved_indices(1) == (0,)
    assert saved_indices(3) == (2, 1, 0)
    with pytest.raises(InputError, match="at least 1"):
        saved_indices(0)


def test_a_spec_survives_json():
    spec = FeatureSpec(("a", "b"), saved=(0, 3), timesteps=(-1.0, 40.0), output_size=(8, 6), guidance_scale=2.0)
    assert FeatureSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(InputError, match=r"no field 'outputsize'\. Did you mean 'output_size'"):
        FeatureSpec.from_json(spec.to_json() | {"outputsize": 3})
    with pytest.raises(InputError, match="needs its sites"):
        FeatureSpec.from_json({})


def test_every_cell_of_a_spec_is_a_spec_of_one_map():
    spec = FeatureSpec(("a", "b"), saved=(0, 3, 7), timesteps=(-1.0, 40.0, 120.0), seed=5)
    cells = list(spec.cells())
    assert len(cells) == 6
    assert cells[3] == FeatureSpec(("b",), saved=(3,), timesteps=(40.0,), seed=5)
    noised = FeatureSpec(("a",), mode="noise", timesteps=(10.0, 20.0), n_noises=2)
    assert noised.cell(1, 0) == FeatureSpec(("a",), mode="noise", timesteps=(20.0,), n_noises=2)
    assert noised.n_steps == 2
    with pytest.raises(InputError, match="step 3 of layer 0 is out of range"):
        spec.cell(3, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "at least one name"),
        ({"sites": ("a", "a")}, "each once"),
        ({"mode": "inversed"}, "no mode 'inversed'.*Did you mean 'inversion'"),
        ({"output_size": (0, 4)}, "output_size must be a positive"),
        ({"saved": ()}, "needs the calls to keep"),
        ({"saved": (50,)}, "saved call 50 is out of range: the process has 50 steps"),
        ({"saved": (3, 0)}, "by inversion they rise"),
        ({"saved": (0, 3), "mode": "generation"}, "by generation they fall"),
        ({"timesteps": (1.0, 2.0)}, "2 timesteps are given for 1 saved calls"),
        ({"n_noises": 2}, "only for mode 'noise'"),
        ({"mode": "noise"}, "saved is for inversion and generation"),
        ({"mode": "noise", "saved": ()}, "needs rising timesteps"),
        ({"mode": "noise", "saved": (), "timesteps": (5.0, 5.0)}, "needs rising timesteps"),
        ({"mode": "noise", "saved": (), "timesteps": (5.0,), "n_noises": 0}, "n_noises must be at least 1"),
        ({"mode": "noise", "saved": (), "timesteps": (5.0,), "guidance_scale": 2.0}, "takes no guidance_scale"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FeatureSpec(**{"sites": ("a",), "saved": (0,)} | settings)
