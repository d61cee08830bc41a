"""Run folders: what is written, what is refused, and going on with a run that was cut off."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import interp
from interp import runs
from interp.errors import InputError, UnknownNameError
from interp.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create("probe", {"layers": (0, 1), "model": "zoo:tiny"}, root=tmp_path, seed=[0, 1])


def small_figure() -> Figure:
    figure = Figure(figsize=(2, 1.5))
    figure.subplots().plot([0, 1], [1, 0], label="line")
    return figure


def test_a_new_run_says_what_was_asked_and_by_what(run: Run):
    assert json.loads((run.folder / "config.json").read_text()) == {"layers": [0, 1], "model": "zoo:tiny"}
    assert run.config == {"layers": [0, 1], "model": "zoo:tiny"}
    provenance = json.loads((run.folder / "provenance.json").read_text())
    assert provenance["status"] == "running"
    assert provenance["seeds"] == [0, 1]
    assert provenance["argv"] == sys.argv
    assert provenance["python"] == ".".join(map(str, sys.version_info[:3]))
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["interp"] == interp.__version__


def test_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suffixes = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(runs.secrets, "token_hex", lambda n: next(suffixes))

    class Clock(runs.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(runs, "datetime", Clock)
    first = Run.create("twin", {"n": 1}, root=tmp_path)
    second = Run.create("twin", {"n": 2}, root=tmp_path)
    assert first.folder.name == "twin-20300102-030405-aaaa"
    assert second.folder.name == "twin-20300102-030405-bbbb"
    assert (first.config["n"], second.config["n"]) == (1, 2)


def test_status_follows_how_the_run_ended(run: Run):
    with run:
        assert run.provenance["status"] == "running"
    assert run.provenance["status"] == "done"
    assert run.provenance["seconds"] >= 0
    with pytest.raises(ZeroDivisionError), run:
        1 / 0  # noqa: B018
    assert run.provenance["status"] == "failed"
    assert run.provenance["error"] == "ZeroDivisionError: division by zero"
    with Run.open(run.folder) as again:
        assert again.provenance["status"] == "running"
    assert run.provenance["status"] == "done"
    assert run.provenance["error"] is None


def test_tables_come_back_exactly(run: Run):
    table = pd.DataFrame({"task": ["NA", "b, c"], "accuracy": [1 / 3, np.nan], "n": [3, 4], "flag": [True, False]})
    before = table.copy()
    path = run.save_table("scores", table)
    assert path == run.folder / "scores.csv"
    pd.testing.assert_frame_equal(run.load_table("scores"), table, check_exact=True)
    pd.testing.assert_frame_equal(table, before)
    assert run.load_json("scores") == [
        {"task": "NA", "accuracy": 1 / 3, "n": 3, "flag": True},
        {"task": "b, c", "accuracy": None, "n": 4, "flag": False},
    ]


def test_an_empty_table_keeps_its_columns(run: Run):
    run.save_table("empty", pd.DataFrame({"x": [], "y": []}))
    assert list(run.load_table("empty").columns) == ["x", "y"]
    assert run.load_json("empty") == []


def test_an_index_that_says_something_is_kept(run: Run):
    table = pd.DataFrame({"x": [1, 2]}, index=pd.Index(["p", "q"], name="task"))
    run.save_table("indexed", table)
    assert run.load_table("indexed").to_dict("list") == {"task": ["p", "q"], "x": [1, 2]}


def test_figures_are_saved_twice_and_alike(run: Run):
    figure = small_figure()
    run.save_figure("one", figure)
    run.save_figure("two", figure)
    for suffix in (".pdf", ".png"):
        assert (run.folder / f"one{suffix}").read_bytes() == (run.folder / f"two{suffix}").read_bytes()
    with Image.open(run.folder / "one.png") as image:
        # 200 dots per inch, less the margin cut off around a figure of 2 by 1.5 inches.
        assert 300 < image.width <= 420
    pdf = (run.folder / "one.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # an embedded TrueType font
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    assert plt.get_fignums() == []


def test_tensors_keep_dtype_and_metadata(run: Run):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    tensors["view"] = tensors["a"][:2]
    run.save_tensors("vectors", tensors, {"site": "blocks.1.hook_resid_post"})
    loaded = run.load_tensors("vectors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)


def test_a_run_goes_on_where_it_stopped(run: Run, monkeypatch: pytest.MonkeyPatch):
    run.save_json("first", {"x": 1})
    table = pd.DataFrame({"x": [1]})

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(runs.json, "dumps", fail)
        with pytest.raises(OSError, match="disk full"):
            run.save_table("second", table)
    again = Run.open(run.folder)
    assert again.is_done("first")
    assert not again.is_done("second")
    assert not list(run.folder.glob(".partial*"))
    again.save_table("second", table)
    assert again.is_done("second")
    assert again.load_json("first") == {"x": 1}
    (run.folder / "second.json").unlink()
    assert not again.is_done("second")


def test_results_are_not_overwritten(run: Run):
    run.save_json("scores", [1])
    with pytest.raises(InputError, match="already has a result 'scores'"):
        run.save_table("scores", pd.DataFrame({"x": [2]}))
    assert run.load_json("scores") == [1]
    with pytest.raises(InputError, match="'provenance' is taken"):
        run.save_json("provenance", {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": {"b": [1, {2}]}}, r"config\['a'\]\['b'\]\[1\] is a set"),
        ({"device": torch.device("cpu")}, r"config\['device'\] is a device"),
        ({"x": float("nan")}, r"config\['x'\] is nan"),
        ({"x": {1: 2}}, r"config\['x'\] has the key 1"),
    ],
)
def test_a_config_that_json_cannot_say_is_refused(tmp_path: Path, config: dict, message: str):
    with pytest.raises(InputError, match=message):
        Run.create("bad", config, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_paths_and_numpy_numbers_are_fine_in_a_config(tmp_path: Path):
    run = Run.create("ok", {"data": Path("a/b"), "n": np.int64(3), "p": np.float32(0.5)}, root=tmp_path)
    assert run.config == {"data": "a/b", "n": 3, "p": 0.5}


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b", ".hidden"])
def test_names_are_file_names(tmp_path: Path, run: Run, name: str):
    with pytest.raises(InputError, match="cannot name a file"):
        Run.create(name, {}, root=tmp_path)
    with pytest.raises(InputError, match="cannot name a file"):
        run.save_json(name, 1)


def test_infinite_values_and_unnamed_columns_are_refused(run: Run):
    with pytest.raises(InputError, match=r"scores\['log_prob'\] is -inf"):
        run.save_table("scores", pd.DataFrame({"log_prob": [-np.inf]}))
    with pytest.raises(InputError, match=r"must be strings; these are not: \[0\]"):
        run.save_table("scores", pd.DataFrame([[1.0]]))
    with pytest.raises(InputError, match=r"columns twice: \['x'\]"):
        run.save_table("scores", pd.DataFrame([[1, 2]], columns=["x", "x"]))
    assert not run.is_done("scores")


def test_what_is_no_run_is_refused(tmp_path: Path, run: Run):
    with pytest.raises(InputError, match="no such folder"):
        Run.open(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no config\.json and no provenance\.json"):
        Run.open(tmp_path)
    run.save_json("accuracy", 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        run.load_json("acuracy")
    with pytest.raises(UnknownNameError, match=r"no result 'accuracy' with a \.csv file"):
        run.load_table("accuracy")


def test_the_checkout_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = tmp_path / "work"
    work.mkdir()

    def git(*words: str) -> str:
        identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *words], cwd=work, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.chdir(work)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert Run.create("r", {}, root=tmp_path).provenance["git"]["working_folder"] is None
    git("init", "-q")
    (work / "script.py").write_text("x = 1\n")
    git("add", "script.py")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    clean = Run.create("r", {}, root=tmp_path).provenance["git"]["working_folder"]
    assert clean == {"commit": head, "dirty": False}
    (work / "script.py").write_text("x = 2\n")
    dirty = Run.create("r", {}, root=tmp_path).provenance["git"]["working_folder"]
    assert dirty == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert Run.create("r", {}, root=tmp_path).provenance["git"]["working_folder"] is None
