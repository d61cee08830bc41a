"""Options of the readout and guidance experiments that are refused before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest

import interp
from interp.cli import main

GUIDANCE = ("guidance-spatial", "guidance-drag", "guidance-appearance")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(interp.Diffusion, "from_pretrained", refuse)


def message(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["run", *words])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    # A line of our own, or one below the usage that the parser prints.
    assert "Traceback" not in shown and len(shown.strip().splitlines()) <= 4
    return shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--end", "0"), "start < end"),
        (("--end", "0.01", "--steps", "20"), "hold no step of a run of 20"),
        (("--end", "1.5"), "--end"),
        (("--trials", "0"), "--trials"),
        (("--trials", "-3"), "--trials"),
        (("--trials", "many"), "--trials"),
        (("--batch", "0"), "--batch"),
        (("--steps", "0"), "--steps"),
        (("--step-size", "nan"), "step_size=nan"),
        (("--step-size", "0"), "nothing moves"),
        (("--guidance-scale", "-3"), "guidance_scale=-3.0"),
        (("--guidance-scale", "nan"), "guidance_scale=nan"),
        (("--seed", "-1"), "--seed"),
    ],
)
@pytest.mark.parametrize("name", GUIDANCE)
def test_settings_of_guidance(capsys: Any, tmp_path: Path, name: str, words: tuple[str, ...], expected: str) -> None:
    assert expected in message(capsys, name, *words, "--out", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", (*GUIDANCE, "readout-heads", "readout-sweep"))
def test_an_out_that_is_a_file(capsys: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        assert "file' is a file" in message(capsys, name, "--out", str(tmp_path / place))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("readout-heads", "--samples", "100,100"), "samples=(100, 100): one is there twice"),
        (("readout-heads", "--samples", "0"), "samples=(0,)"),
        (("readout-heads", "--samples", "-5"), "whole numbers with commas"),
        (("readout-heads", "--samples", ""), "whole numbers with commas"),
        (("readout-heads", "--dim", "24"), "dim=24, width=12: give multiples of 8"),
        (("readout-heads", "--dim", "-8"), "--dim"),
        (("readout-heads", "--steps", "0"), "--steps"),
        (("readout-heads", "--held-out", "-1"), "--held-out"),
        (("readout-heads", "--seed", "-1"), "--seed"),
        (("readout-heads", "--properties", "pose,pose"), "names a head twice"),
        (("readout-sweep", "--timesteps", "1,1"), "--timesteps has an entry twice"),
        (("readout-sweep", "--timesteps", "-5"), "whole numbers with commas"),
        (("readout-sweep", "--properties", "pose,pose"), "--properties has an entry twice"),
        (("readout-sweep", "--properties", "colour"), "no property 'colour'"),
        (("readout-sweep", "--train", "0"), "--train"),
        (("readout-sweep", "--steps", "-1"), "--steps"),
        (("guidance-drag", "--way", "nan"), "way"),
        (("guidance-drag", "--way", "-8"), "--way"),
    ],
)
def test_other_options(capsys: Any, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert expected in message(capsys, *words, "--out", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
