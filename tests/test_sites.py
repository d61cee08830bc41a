import pytest

from interp.errors import InputError, UnknownNameError
from interp.sites import SiteName, expand, match, parse, parse_raw

NAMES = [
    f"{t}blocks.{i}.{leaf}" for t in ("vision.", "") for i in range(3) for leaf in ("hook_resid_post", "attn.hook_z")
]
NAMES += ["hook_embed", "projector.hook_out"]


def test_names_come_apart() -> None:
    assert parse("vision.blocks.12.attn.hook_z") == SiteName("vision", 12, "attn.hook_z")
    assert parse("blocks.0.hook_resid_post") == SiteName("", 0, "hook_resid_post")
    assert parse("hook_embed") == SiteName("", None, "hook_embed")
    assert parse("model.layers.0:output") is None
    assert parse_raw("model.layers.0:output") == ("model.layers.0", "output", None)
    assert parse_raw("model.layers.0:input.context") == ("model.layers.0", "input", "context")
    assert parse_raw("model.layers.0:middle") is None
    assert parse_raw("blocks.0.hook_resid_post") is None


def test_patterns() -> None:
    assert match("blocks.*.hook_resid_post", NAMES) == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert match("blocks.[02].attn.*", NAMES) == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    assert match("hook_embed", NAMES) == ["hook_embed"]
    asked = ["hook_embed", "blocks.1.*", "blocks.*.attn.hook_z", "model.norm:output"]
    assert expand(asked, NAMES) == [
        "hook_embed",
        "blocks.1.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.0.attn.hook_z",
        "blocks.2.attn.hook_z",
        "model.norm:output",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.3.hook_resid_post",
            "layer 3 is out of range, this model has 'hook_resid_post' at layers 0 to 2",
        ),
        ("vision.blocks.9.attn.hook_z", "layers 0 to 2"),
        ("blocks.1.hook_resid_pots", "Did you mean 'blocks.1.hook_resid_post'"),
        ("blocks.*.hook_nothing_like_it", "no site matches the pattern"),
        ("projektor.hook_out", "Did you mean 'projector.hook_out'"),
    ],
)
def test_wrong_names_name_the_nearest(name, message) -> None:
    with pytest.raises(UnknownNameError, match=message):
        match(name, NAMES)


def test_no_sites() -> None:
    with pytest.raises(InputError, match="no sites"):
        expand([], NAMES)
