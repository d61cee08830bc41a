"""The main experiment on the models that ship: what it must show, what it writes, what it refuses."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from interp.cli import load_experiment
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.zoo.world import tasks

run = load_experiment("task-vector-transfer")
DEFAULTS = {
    "model": "zoo:tiny-llava",
    "language_model": "zoo:tiny-llama",
    "tasks": "",
    "image_root": "",
    "seeds": 3,
    "shots": 5,
    "layer": -1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run as `make demo` makes it, of two seeds instead of three, in a process of its own, without type checks."""
    root = tmp_path_factory.mktemp("runs")
    words = ["run", "task-vector-transfer", "--seeds", "2", "--out", str(root)]
    command = [sys.executable, "-W", "error", "-c", "from interp.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = root.iterdir()
    return made


@pytest.fixture(scope="module")
def table(folder):
    return pd.read_csv(folder / "summary.csv").set_index(["query", "kind", "condition"])["average"]


TASKS = ("country-capital", "country-currency", "animal-latin", "animal-young", "food-color", "food-flavor")

# Means over the paper's six tasks, test items and two seeds; the least that the models that ship must reach.
AT_LEAST = {
    ("text", "prompt", "text examples in the prompt"): 0.95,
    ("image", "prompt", "image examples in the prompt"): 0.90,
    ("image", "patch", "text examples, patched"): 0.85,
    ("image", "patch", "image examples, patched"): 0.85,
    ("text", "patch", "text examples, patched"): 0.80,
    ("text", "patch", "image examples, patched"): 0.75,
    ("image", "patch", "instruction, patched"): 0.60,
    ("image", "patch", "text examples in the language model, patched"): 0.60,
}
AT_MOST = {
    ("text", "prompt", "no context"): 0.40,
    ("image", "prompt", "no context"): 0.40,
    ("text", "control", "random vector of the same norm"): 0.10,
    ("image", "control", "random vector of the same norm"): 0.10,
    ("text", "control", "a task of another category"): 0.10,
    ("image", "control", "a task of another category"): 0.10,
}


@pytest.mark.parametrize("condition", AT_LEAST, ids=" ".join)
def test_task_vectors_cross_modalities(table, condition):
    assert table[condition] >= AT_LEAST[condition]


@pytest.mark.parametrize("condition", AT_MOST, ids=" ".join)
def test_controls_stay_low(table, condition):
    assert table[condition] <= AT_MOST[condition]


@pytest.mark.parametrize("query", ["text", "image"])
def test_a_wrong_task_answers_the_other_task(table, query):
    """The patch of another task of the category gives that task's answer, and not the query's own."""
    theirs = table[query, "control", "... and how often it gives that task's answer"]
    own = table[query, "control", "another task of the category"]
    assert theirs >= 0.75 and own <= 0.10


def test_the_layer_matters(folder):
    validation = json.loads((folder / "validation.json").read_text())
    assert set(validation["by_task"]) == set(TASKS)
    assert max(validation["accuracy"]) - min(validation["accuracy"]) > 0.3


def test_the_run_folder_holds_tables_figures_and_where_they_came_from(folder):
    for name in ("summary", "by-layer", "items", "decodes"):
        assert (folder / f"{name}.csv").stat().st_size and (folder / f"{name}.json").stat().st_size
    for name in ("accuracy-by-layer", "answers", "conditions-image", "conditions-text", "phases", "t-sne", "similarity",
                 "sample-efficiency"):  # fmt: skip
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["seeds"] == 2
    assert json.loads((folder / "provenance.json").read_text())["status"] == "done"


def test_the_summary_follows_from_the_single_answers(folder, table):
    items = pd.read_csv(folder / "items.csv")
    chosen = items.query("query == 'image' and kind == 'patch' and condition == 'text'")
    by_task = chosen.groupby("task")["correct"].mean()
    assert table["image", "patch", "text examples, patched"] == pytest.approx(by_task.mean(), abs=1e-6)
    assert chosen["draw"].nunique() == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "zoo:tiny-lava"}, UnknownNameError, "tiny-llava"),
        ({"model": "zoo:tiny-llama"}, InputError, "reads text only"),
        ({"layer": 99}, InputError, "layers 0 to"),
        ({"tasks": "/nonexistent"}, InputError, "no task files"),
        ({"shots": 500}, InputError, "Cannot draw 500 shots"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, error, words):
    with pytest.raises((error, ShapeError), match=words):
        run(**{**DEFAULTS, "seeds": 1, **change}, out=str(tmp_path))


def own_tasks(folder, names, about=None):
    """Task files in the official format, made of the world that ships."""
    world = tasks(only_paper=True)
    for new, old in zip(names, TASKS, strict=False):
        for split, items in (("val", world[old].validation), ("test", world[old].test[:4])):
            rows = []
            for item in items:
                file = folder / f"{item.id}.png"
                item.image.save(file)
                rows.append({"input": item.input, "output": item.output, "image": file.name})
            (folder / f"{new}_{split}.json").write_text(json.dumps(rows))
    if about is not None:
        (folder / "tasks.json").write_text(json.dumps(about))
    return folder


def test_own_tasks_need_an_instruction_a_category_and_partners_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("interp.cross_modal.specify", lambda *_: pytest.fail("ran before the tasks were checked"))
    settings = {**DEFAULTS, "image_root": str(tmp_path), "out": str(tmp_path / "runs")}
    own_tasks(tmp_path, ["flag-city"])
    with pytest.raises(InputError, match="no instruction"):
        run(**{**settings, "tasks": str(tmp_path)})
    own_tasks(tmp_path, ["flag-city"], {"flag-city": {"instruction": "The city:", "category": "flag"}})
    with pytest.raises(InputError, match="second task of its category"):
        run(**{**settings, "tasks": str(tmp_path)})
    own_tasks(tmp_path, [], ["not", "a", "table"])
    with pytest.raises(InputError, match=r"tasks\.json must hold"):
        run(**{**settings, "tasks": str(tmp_path)})


def test_own_tasks_run_from_the_official_format(tmp_path, monkeypatch):
    # Their figures are those of the tasks that ship.
    monkeypatch.setitem(run.__globals__, "draw_all", lambda *_, **__: {})
    names = ["flag-city", "flag-money", "beast-latin", "beast-baby"]
    about = {name: {"instruction": f"The {name}:", "category": name.split("-")[0]} for name in names}
    own_tasks(tmp_path, names, about)
    run(**{**DEFAULTS, "tasks": str(tmp_path), "seeds": 1, "layer": 1}, out=str(tmp_path / "runs"))
    (made,) = (tmp_path / "runs").iterdir()
    table = pd.read_csv(made / "summary.csv").set_index(["query", "kind", "condition"])
    assert table.loc[("image", "patch", "text examples, patched"), names].mean() >= 0.85
