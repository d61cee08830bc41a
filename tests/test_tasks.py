import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from interp.errors import InputError, UnknownNameError
from interp.tasks import INSTRUCTIONS, Item, Task, draw_exemplars, load_task, shuffled_labels


def rows(n: int, start: int = 0) -> list[dict]:
    return [{"input": f"country {i}", "output": f"capital {i}"} for i in range(start, start + n)]


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def task(n_validation: int = 6, n_test: int = 4) -> Task:
    items = [Item(f"in {i}", f"out {i}", id=f"id {i}") for i in range(n_validation + n_test)]
    return Task("t", "Say:", tuple(items[:n_validation]), tuple(items[n_validation:]))


# --- files


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_files_of_a_folder(tmp_path: Path, wrapped: bool) -> None:
    (tmp_path / "images" / "flags").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "flags" / "a.png")
    for part, content in (("val", rows(3)), ("test", rows(2, 3))):
        content = [{**row, "image": "flags/a.png"} for row in content]
        if part == "test":
            content = [{**row, "image": None} for row in content]
        write_json(tmp_path / f"country-capital_{part}.json", {"data": content} if wrapped else content)
    loaded = load_task(tmp_path, name="country-capital", image_root=tmp_path / "images")
    assert loaded.name == "country-capital"
    assert loaded.instruction == INSTRUCTIONS["country-capital"]
    assert loaded.category == "country"
    assert [item.input for item in loaded.validation] == ["country 0", "country 1", "country 2"]
    assert [item.output for item in loaded.test] == ["capital 3", "capital 4"]
    assert loaded.validation[0].image == tmp_path / "images" / "flags" / "a.png"
    assert loaded.test[0].image is None
    assert loaded.validation[0].id == "country 0"


def test_csv_with_every_column(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "fox.png")
    path = write_csv(
        tmp_path / "mine.csv",
        '﻿id,input,output,image,aliases,note\n7,fox,"kit, cub",fox.png,kit|cub ,x\n8,hen,chick,,,\n',
    )
    loaded = load_task(path, validation=1, seed=1, instruction="Young:", category="animal")
    by_id = {item.id: item for item in loaded.validation + loaded.test}
    assert by_id["7"] == Item("fox", "kit, cub", tmp_path / "fox.png", ("kit", "cub"), "7")
    assert by_id["7"].answers == ("kit, cub", "kit", "cub")
    assert by_id["8"] == Item("hen", "chick", None, (), "8")
    assert (loaded.name, loaded.instruction, loaded.category) == ("mine", "Young:", "animal")


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    content = [{**row, "aliases": ["a", "b"]} for row in rows(8)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["input", "output", "aliases"])
        writer.writeheader()
        writer.writerows({**row, "aliases": "a|b"} for row in content)
    write_json(tmp_path / "t.json", content)
    assert load_task(tmp_path / "t.csv") == load_task(tmp_path / "t.json")


def test_two_files(tmp_path: Path) -> None:
    loaded = load_task(write_json(tmp_path / "a.json", rows(3)), write_json(tmp_path / "b.json", rows(2, 3)), name="x")
    assert (len(loaded.validation), len(loaded.test), loaded.name, loaded.instruction) == (3, 2, "x", "")


# --- splits of one file


def test_split_is_disjoint_complete_and_seeded(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", rows(40))
    first = load_task(path, validation=10, seed=3)
    assert len(first.validation) == 10
    inputs = [item.input for item in first.validation] + [item.input for item in first.test]
    assert sorted(inputs) == sorted(row["input"] for row in rows(40))
    order = {row["input"]: i for i, row in enumerate(rows(40))}
    for split in (first.validation, first.test):
        places = [order[item.input] for item in split]
        assert places == sorted(places)
    assert load_task(path, validation=10, seed=3) == first
    assert load_task(path, validation=10, seed=4) != first
    assert len(load_task(path, validation=0.25).validation) == 10


def test_split_keeps_items_of_one_input_together(tmp_path: Path) -> None:
    content = [{**row, "input": f"Animal {i // 3}"} for i, row in enumerate(rows(30))]
    content[0]["input"] = "  animal 0 "
    path = write_json(tmp_path / "t.json", content)
    for seed in range(5):
        loaded = load_task(path, validation=10, seed=seed)
        held = {item.input.lower() for item in loaded.validation}
        assert not held & {item.input.lower() for item in loaded.test}
        assert len(loaded.validation) == 12  # the least multiple of 3 that reaches 10
        ids = [item.id for item in loaded.validation + loaded.test]
        assert len(set(ids)) == 30


@pytest.mark.parametrize("validation", [0, 8, 0.0, 0.99])
def test_a_split_must_not_be_empty(tmp_path: Path, validation: float) -> None:
    with pytest.raises(InputError, match="leaves a split empty"):
        load_task(write_json(tmp_path / "t.json", rows(8)), validation=validation)


def test_one_input_cannot_be_split(tmp_path: Path) -> None:
    content = [{"input": "fox", "output": "kit"}] * 3
    with pytest.raises(InputError, match="1 different input"):
        load_task(write_json(tmp_path / "t.json", content), validation=1)


# --- bad files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "input,answer\na,b\n", "no 'output'.*found input, answer"),
        ("t.csv", "inputs,output\na,b\n", "no 'input'.*Did you mean 'inputs'"),
        ("t.csv", "", "no 'input'.*found nothing"),
        ("t.csv", "input,output\na,b\nc, \n", "line 3: the output is empty"),
        ("t.csv", "input,output\n,b\n", "line 2: the input is empty"),
        ("t.csv", "input,output\na,b,c\n", "line 2 does not have as many cells"),
        ("t.csv", "input,output\na\n", "line 2 does not have as many cells"),
        ("t.csv", "input,output\n", "has no items"),
        ("t.csv", "input,output,id\na,b,1\nc,d,1\n", "line 3 repeats the id '1' of .*line 2"),
        ("t.csv", "input,output,image\na,b,no.png\nc,d,\n", r"line 2: Image '.*no\.png' does not exist"),
        ("t.csv", "input,output,image\na,b,t.csv\nc,d,\n", r"line 2: Image '.*t\.csv' cannot be read"),
        ("t.json", "[{", "not valid JSON"),
        ("t.json", '{"items": []}', "without 'data'.*'items'"),
        ("t.json", "3", "must hold a list"),
        ("t.json", "[]", "has no items"),
        ("t.json", '["a"]', "item 0 must be an object"),
        ("t.json", '[{"input": "a", "output": "b"}, {"input": "c"}]', "item 1 has no 'output'"),
        ("t.json", '[{"input": "a", "output": ""}]', "item 0: the output is empty"),
        ("t.json", '[{"input": "a", "output": 3}]', "item 0: the output must be a text"),
        ("t.json", '[{"input": "a", "output": "b", "aliases": [""]}]', "item 0: aliases must be"),
        ("t.json", '[{"input": "a", "output": "b", "image": 3}]', "item 0: the image must be a path"),
        ("t.txt", "a", "must be a .json or a .csv"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_task(path, validation=1)


def test_images_can_be_left_unchecked(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", [{**row, "image": f"{row['input']}.png"} for row in rows(4)])
    item = load_task(path, check_images=False).test[0]
    assert item.image == tmp_path / f"{item.input}.png"


def test_missing_files_and_tasks(tmp_path: Path) -> None:
    for part in ("val", "test"):
        write_json(tmp_path / f"food-color_{part}.json", rows(2, 0 if part == "val" else 2))
    with pytest.raises(UnknownNameError, match=r"no task 'food-colour'.*Did you mean 'food-color'"):
        load_task(tmp_path, name="food-colour")
    with pytest.raises(InputError, match=r"give the name of a task\. It has: food-color"):
        load_task(tmp_path)
    with pytest.raises(InputError, match=r"no\.json' does not exist"):
        load_task(tmp_path / "no.json")


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    a, b = write_json(tmp_path / "a.json", rows(4)), write_json(tmp_path / "b.json", rows(4, 3))
    with pytest.raises(InputError, match="overlap in 1 inputs: 'country 3'"):
        load_task(a, b)
    with pytest.raises(InputError, match="overlap in 1 ids: '1'"):
        Task("t", "", (Item("a", "b", id="1"),), (Item("c", "d", id="1"),))
    with pytest.raises(InputError, match=r"overlap in 1 images: 'x\.png'"):
        Task("t", "", (Item("a", "b", "x.png"),), (Item("c", "d", Path("x.png")),))
    with pytest.raises(InputError, match="ids occur twice in validation: '1'"):
        Task("t", "", (Item("a", "b", id="1"), Item("c", "d", id="1")), ())


# --- draws


@pytest.mark.parametrize("split", ["validation", "test"])
def test_official_draws_reproduce_the_legacy_stream(split) -> None:
    t = task(8, 7)
    items = t.items(split)
    np.random.seed(2)
    for draw, i in zip(draw_exemplars(t, 3, seed=2, split=split, mode="official"), range(99), strict=False):
        expected = np.random.permutation([j for j in range(len(items)) if j != i])[:3]
        assert draw.query == items[i]
        assert draw.exemplars == tuple(items[j] for j in expected)
    assert i == len(items) - 1


def test_official_draws_as_recorded_once() -> None:
    # RandomState(1).permutation([1, 2, 3, 4]), then .permutation([0, 2, 3, 4]) of the same stream.
    draws = draw_exemplars(task(5, 1), 2, seed=1, split="validation", mode="official")
    assert [item.input for item in draws[0].exemplars] == ["in 4", "in 3"]
    assert len(draws) == 5


def test_clean_draws_come_from_validation_only() -> None:
    t = task()
    draws = draw_exemplars(t, 6, seed=0)
    assert [draw.query for draw in draws] == list(t.test)
    for draw in draws:
        assert sorted(item.input for item in draw.exemplars) == sorted(item.input for item in t.validation)
    assert len({draw.exemplars for draw in draws}) > 1


@pytest.mark.parametrize("mode", ["clean", "official"])
def test_draws_never_show_the_query_and_depend_on_the_seed_alone(mode) -> None:
    t = task()
    np.random.seed(7)
    first = draw_exemplars(t, 5, seed=1, split="validation", mode=mode)
    np.random.seed(8)
    assert draw_exemplars(t, 5, seed=1, split="validation", mode=mode) == first
    assert draw_exemplars(t, 5, seed=2, split="validation", mode=mode) != first
    for draw in first:
        assert draw.query not in draw.exemplars
        assert len(set(draw.exemplars)) == 5


@pytest.mark.parametrize(
    ("n_shots", "split", "mode", "available"),
    [
        (6, "validation", "clean", 5),
        (7, "test", "clean", 6),
        (4, "test", "official", 3),
        (0, "test", "clean", 6),
    ],
)
def test_fewer_items_than_shots(n_shots: int, split, mode, available: int) -> None:
    with pytest.raises(InputError, match=f"Cannot draw {n_shots} shots.*{available} items to draw from"):
        draw_exemplars(task(), n_shots, seed=0, split=split, mode=mode)


# --- shuffled labels


def test_shuffled_labels_leave_no_item_its_answer() -> None:
    items = task(9, 0).validation
    shuffled = shuffled_labels(items, seed=0)
    assert [item.input for item in shuffled] == [item.input for item in items]
    assert sorted(item.output for item in shuffled) == sorted(item.output for item in items)
    assert all(new.output != old.output for new, old in zip(shuffled, items, strict=True))
    assert shuffled_labels(items, seed=0) == shuffled
    assert shuffled_labels(items, seed=1) != shuffled


@pytest.mark.parametrize(
    ("outputs", "kept"), [("aabb", 0), ("aaabbc", 0), ("aaab", 2), ("aaaab", 3), ("abcabc", 0), ("ab", 0)]
)
def test_shared_answers_keep_as_few_as_possible(outputs: str, kept: int) -> None:
    items = [Item(f"in {i}", output, aliases=(output.upper(),)) for i, output in enumerate(outputs)]
    for seed in range(10):
        shuffled = shuffled_labels(items, seed=seed)
        assert sum(new.output == old.output for new, old in zip(shuffled, items, strict=True)) == kept
        assert sorted(item.output for item in shuffled) == sorted(outputs)
        assert all(item.aliases == (item.output.upper(),) for item in shuffled)


def test_one_generator_shuffles_each_draw_differently() -> None:
    generator = np.random.default_rng(0)
    items = task(9, 0).validation
    assert shuffled_labels(items, seed=generator) != shuffled_labels(items, seed=generator)


def test_equal_answers_cannot_be_shuffled() -> None:
    with pytest.raises(InputError, match="Cannot shuffle"):
        shuffled_labels([Item("a", "x"), Item("b", "x")], seed=0)
