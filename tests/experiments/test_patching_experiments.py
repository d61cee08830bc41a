"""The patching experiments on the models that ship, as small as they get: tables against direct calls."""

import json
import sys

import pandas as pd
import pytest
import torch

from interp import patching
from interp.cli import load_experiment
from interp.errors import InputError, UnknownNameError
from interp.metrics import first_token_ids
from interp.patching.contrasts import contrasts, task_pairs, vision_model
from interp.patching.knockout import windows_of
from interp.prompts import XTV
from interp.runs import Run
from interp.task_prompts import few_shot_prompts, instructed_prompts, query_prompts
from interp.task_vectors import from_examples, from_instruction
from interp.tasks import draw_exemplars
from interp.transfer import score_patches
from interp.zoo.creatures import SPECIES, draw_scenes, render
from interp.zoo.diffusion.classifier import load_classifier
from interp.zoo.readouts import estimator

MODEL = "zoo:tiny-llava"
TASK = "country-capital"
COMMON = {"model": MODEL, "tasks": TASK, "prompts": 2, "seed": 3}
SMALL = {
    "task-location": COMMON | {"shots": 1, "direction": "denoise"},
    "head-mediation": COMMON | {"shots": 2, "heads": 3, "controls": 1},
    "image-crossing": COMMON | {"window": 8, "edges": "image -> last, task -> last"},
    "answer-phases": COMMON | {"shots": 2},
    "override-conflict": COMMON | {"shots": 2, "controls": 1},
}
DIFFUSION = {"model": "zoo:tiny-diffusion", "pairs": 2, "steps": 4, "window": 4, "guidance_scale": 3.0,
             "sites": "*.cross.hook_k", "seed": 0}  # fmt: skip
KINDS = ["colour, by prompt", "layout, by prompt", "pose, by seed"]


@pytest.fixture(scope="module")
def vlm():
    return vision_model(MODEL)


def made(name: str, root, **changes) -> Run:
    settings = DIFFUSION if name == "diffusion-patching" else SMALL[name]
    load_experiment(name)(**{**settings, **changes}, out=str(root))
    (folder,) = root.iterdir()
    run = Run.open(folder)
    assert run.provenance["status"] == "done" and run.config == settings | changes
    for figure in folder.glob("*.png"):
        assert figure.with_suffix(".pdf").is_file()
    return run


def same(table: pd.DataFrame, direct: pd.DataFrame) -> None:
    """Every column of a direct call is in the table; sweeps of other batches round differently."""
    assert len(table) == len(direct)
    for column in direct:
        if direct[column].dtype.kind == "f":
            assert table[column].tolist() == pytest.approx(direct[column].tolist(), abs=1e-4, nan_ok=True), column
        else:
            assert table[column].astype(str).tolist() == direct[column].astype(str).tolist(), column


# ------------------------------------------------------------ prompts


def test_contrasts_differ_in_the_task_alone_and_the_model_answers_both(vlm) -> None:
    pairs = task_pairs(f"{TASK}, country-currency")
    assert [(task.name, other.name) for task, other in pairs.values()] == [
        (TASK, "country-currency"),
        ("country-currency", TASK),
    ]
    for context in ("examples", "instruction"):
        made = contrasts(vlm, pairs, "image", n=2, n_shots=2, seed=1, context=context)
        assert made.tasks == (TASK, TASK, "country-currency", "country-currency") and made.tried >= 4
        for item, clean, corrupt, wrong in zip(made.items, made.clean, made.corrupt, made.wrong, strict=True):
            assert clean.images == corrupt.images and clean.text != corrupt.text
            assert item.output != wrong
            for prompt, answer in ((clean, item.output), (corrupt, wrong)):
                with torch.no_grad():
                    given = int(vlm(vlm.prepare([prompt])).logits[0, -1].argmax())
                assert given == first_token_ids(vlm.tokenizer, prompt, answer)[0]
    with pytest.raises(InputError, match="37 are needed"):
        contrasts(vlm, task_pairs(TASK), "text", n=37, n_shots=1, seed=0)


def test_task_pairs_are_of_one_category() -> None:
    pairs = task_pairs("")
    assert len(pairs) == 6 and all(task.category == other.category for task, other in pairs.values())
    assert all(task.name == name != other.name for name, (task, other) in pairs.items())
    with pytest.raises(UnknownNameError, match="Did you mean 'country-capital'"):
        task_pairs("country-capitol")


# ------------------------------------------------------------ experiments


def test_task_location(tmp_path, vlm) -> None:
    run = made("task-location", tmp_path)
    pairs = contrasts(vlm, task_pairs(TASK), "text", n=2, n_shots=1, seed=3)
    clean, corrupt = vlm.prepare(list(pairs.clean)), vlm.prepare(list(pairs.corrupt))
    metric = patching.logit_difference(vlm, pairs.answers, list(pairs.wrong), inputs=clean)
    positions = {
        "answers' first tokens": ["output[0].first"],
        "answers' last tokens": ["output[0].last"],
        "after answers": ["separator[0]", "prefix[1]"],
        "query's input": ["input[1]"],
        "query's answer mark": ["joint[1]"],
        "query's delimiter": ["last"],
    }
    sites = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out"]
    direct = patching.activation(vlm, clean, corrupt, metric, sites=sites, positions=positions, seed=3)
    table = run.load_table("effects")
    same(table[table["modality"] == "text"], direct.to_dataframe())
    entering = table[(table["site"] == "hook_resid_pre") & (table["position"] == "query's delimiter")]
    for _, last in entering.groupby("modality"):
        # The delimiter itself says nothing; before the last block it has gathered all.
        assert last["normalised"].iloc[0] == pytest.approx(0, abs=1e-5) and last["normalised"].iloc[-1] > 0.9
        assert len(last) == 8


def test_head_mediation(tmp_path, vlm) -> None:
    run = made("head-mediation", tmp_path)
    task, _ = task_pairs(TASK)[TASK]
    table, transfer = run.load_table("effects"), run.load_table("transfer").set_index(["queries", "condition"])
    prompts = patching.mediation_prompts(
        vlm, task, "image", n_shots=2, n_task=2, n_shuffled=2, corruption="remove", template=XTV, seed=3
    )
    outputs = patching.head_outputs(vlm, prompts.task)
    queries = vlm.prepare(list(prompts.shuffled))
    metric = patching.probability(vlm, prompts.answers, inputs=queries)
    effects = patching.indirect_effects(patching.mediation(vlm, queries, outputs, metric, seed=3))
    of_images = table[table["modality"] == "image"]
    assert of_images["value"].tolist() == pytest.approx(effects.flatten().tolist(), abs=1e-5)
    heads = json.loads((run.folder / "heads.json").read_text())
    assert [tuple(head) for head in heads["image"]] == list(patching.strongest_heads(effects, 3))
    of_texts = torch.tensor(table[table["modality"] == "text"]["value"].tolist())
    agreed = run.load_table("agreement").set_index("measure")
    assert agreed["value"]["rank correlation"] == pytest.approx(
        patching.rank_correlation(of_texts, effects.flatten()).rho, abs=1e-3
    )
    shared = {tuple(head) for head in heads["text"]} & {tuple(head) for head in heads["image"]}
    assert agreed["value"]["shared of 3 heads"] == len(shared)
    assert agreed["by chance"]["shared of 3 heads"] == pytest.approx(9 / 32)
    # Held-out image queries with the image heads' own outputs.
    draws = draw_exemplars(task, 2, seed=3)[:2]
    held_out = vlm.prepare(query_prompts([draw.query for draw in draws], "image", template=XTV))
    answers = [draw.query.output for draw in draws]
    metric = patching.probability(vlm, answers, inputs=held_out)
    put = patching.put_heads(vlm, held_out, {"image": [tuple(head) for head in heads["image"]]}, {"image": outputs},
                             metric, n_controls=0)  # fmt: skip
    row = transfer.loc[("image", "image heads, image outputs")]
    assert row["probability"] == pytest.approx(float(put.values.mean()), abs=1e-5) == row[TASK]
    assert transfer.loc[("image", "query alone"), "probability"] == pytest.approx(float(put.corrupt.mean()), abs=1e-5)
    prompt = vlm.prepare(few_shot_prompts(draws, "image", template=XTV))
    with torch.no_grad():
        few_shot = float(metric(vlm(prompt).logits[:, -1]).mean())
    assert transfer.loc[("image", "examples in the prompt"), "probability"] == pytest.approx(few_shot, abs=1e-5)


def test_image_crossing(tmp_path, vlm) -> None:
    run = made("image-crossing", tmp_path)
    table = run.load_table("falls")
    pairs = contrasts(vlm, task_pairs(TASK), "image", n=2, n_shots=1, seed=3, context="instruction")
    inputs = vlm.prepare(list(pairs.clean))
    metric = patching.log_probability(vlm, pairs.answers, inputs=inputs)
    groups = {"task": ["instruction[0]", "delimiter[0]", "separator[0]"], "image": "image[0]", "last": "last"}
    windows = windows_of(vlm.n_layers, 8) | {"all": range(vlm.n_layers)}
    direct = patching.knockout(vlm, inputs, ["image -> last", "task -> last"], metric, windows=windows, groups=groups,
                               n_controls=0)  # fmt: skip
    assert table["value"].tolist() == pytest.approx(patching.drops(direct).mean(-1).flatten().tolist(), abs=1e-4)
    assert table["layer"].tolist() == [*map(str, range(8)), "all"] * 2
    assert (table["low"] <= table["value"] + 1e-6).all() and "control random tokens" in table
    # One image token alone: all others cut from the last token in every layer.
    patches = run.load_table("patches")
    assert len(patches) == 9 * 2 and patches["input"].tolist()[:2] == [item.input for item in pairs.items]
    for name, corner in (("image[0] 0,0", 0), ("image[0] 2,2", 8)):
        rest = patching.TokenGroup("rest", "image[0]", vlm.model.config.image_token_id,
                                   tuple(k for k in range(9) if k != corner))  # fmt: skip
        only = patching.knockout(vlm, inputs, [(rest, "last")], metric, windows={"all": range(vlm.n_layers)},
                                 n_controls=0)  # fmt: skip
        got = patches[patches["position"] == name]["value"].tolist()
        assert got == pytest.approx(only.values[0, 0].tolist(), abs=1e-4)


def test_answer_phases(tmp_path, vlm) -> None:
    table = made("answer-phases", tmp_path).load_table("phases")
    task, _ = task_pairs(TASK)[TASK]
    draws = draw_exemplars(task, 2, seed=3)[:2]
    tokens = {
        "input": [first_token_ids(vlm.tokenizer, "Q:", draw.query.input)[0] for draw in draws],
        "task": [first_token_ids(vlm.tokenizer, "The", " capital")[0]] * 2,
        "answer": [first_token_ids(vlm.tokenizer, "A:", draw.query.output)[0] for draw in draws],
    }
    direct = patching.lens(vlm, vlm.prepare(few_shot_prompts(draws, "image")), tokens, seed=3)
    same(table[table["modality"] == "image"], direct.to_dataframe(seed=3))
    assert table.query("phase == 'answer' and layer == '7'")["value"].min() > 0.5


def test_override_conflict(tmp_path, vlm) -> None:
    run = made("override-conflict", tmp_path)
    task, other = task_pairs(TASK)[TASK]
    pairs = contrasts(vlm, {TASK: (task, other)}, "text", n=2, n_shots=1, seed=3, context="instruction")
    asked = vlm.prepare(instructed_prompts(other, list(pairs.items), "text"))
    vectors = {"image examples": from_examples(vlm, task, "image", n_shots=2, seed=3),
               "instruction": from_instruction(vlm, task)}  # fmt: skip
    direct = patching.override(vlm, asked, vectors, pairs.answers, list(pairs.wrong), n_controls=0)
    scores = score_patches(vlm, instructed_prompts(other, list(pairs.items), "text"), pairs.items,
                           list(vectors.values()))  # fmt: skip
    for name, values in (("answers", scores.accuracy), ("logit-differences", direct.mean(normalised=False))):
        table = run.load_table(name)
        for row, vector in enumerate(vectors):
            cells = table[(table["queries"] == "text") & (table["vector"] == vector)]
            assert cells["value"].tolist() == pytest.approx(values[row].tolist(), abs=1e-3)
    given = run.load_table("answers")
    assert given["value"].max() == 1 and given["control random vector"].mean() < 0.2


@pytest.mark.parametrize("name", ["answer-phases", "override-conflict"])
def test_one_prompt_has_no_interval_to_print(tmp_path, capsys, name) -> None:
    made(name, tmp_path, prompts=1, shots=1)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    column = rows[0].index("95 % interval")
    assert len(rows) > 3 and not any("nan" in cell for row in rows for cell in row)
    assert {row[column] for row in rows} == {"95 % interval", ""}


def test_diffusion_patching(tmp_path) -> None:
    run = made("diffusion-patching", tmp_path)
    table, onwards = (run.load_table(name).set_index("what") for name in ("effects", "effects-from-step-on"))
    # All steps of half of all that is read of the text, the keys alone.
    assert list(table.index) == KINDS == list(onwards.index) and set(table["step"]) == {"0-3"}
    assert table["value"].tolist() == pytest.approx(onwards["value"].tolist(), abs=1e-4)
    for what in KINDS:
        saved = patching.PatchingResult.load(run.folder / f"{what.split(',')[0]}-by-step")
        assert table["value"][what] == pytest.approx(float(saved.values.mean()), abs=1e-5)
        assert (saved.clean > saved.corrupt).all() and saved.about["steps"] == 4
        differ = [set(a.split()) ^ set(b.split()) for a, b in
                  zip(saved.about["clean"], saved.about["corrupt"], strict=True)]  # fmt: skip
        assert all(words <= {*SPECIES, "a", "an"} for words in differ) == (what != KINDS[0])
        assert all(bool(words) for words in differ) == (what != KINDS[2])
    # Two seeds share what is read of one prompt.
    assert table["normalised"][KINDS[2]] == pytest.approx(0, abs=1e-5)
    assert (saved.corrupt <= -4).all()
    assert saved.clean.tolist() == pytest.approx([0, 0], abs=1e-3)
    assert {path.stem for path in run.folder.glob("*.png")} == {"map", "steps"}


def test_pictures_are_measured_by_what_they_show() -> None:
    module = sys.modules[load_experiment("diffusion-patching").__module__]
    scenes = draw_scenes(2, 5)
    pictures = render(scenes).images
    moved, eyes = pictures.roll(6, dims=-1), estimator()
    assert module.distances(eyes, pictures, pictures).tolist() == [0, 0]
    # Keypoints that are far from the frame's sides move with the picture.
    assert module.distances(eyes, moved, pictures).tolist() == pytest.approx([6, 6], abs=2)
    judge = load_classifier(module.judge_folder(DIFFUSION["model"]))
    options = [scene.body for scene in scenes]
    assert (module.probability(judge, "body", options).function(pictures, pictures, moved) > 0.9).all()
    others = [module.other(scene, "body", 0).body for scene in scenes]
    assert (module.probability(judge, "body", others).function(pictures, pictures, moved) < 0.1).all()
    same, apart = (module.overlap().function(one, pictures, moved) for one in (pictures, moved))
    assert same.tolist() == [1, 1] and (apart < 0.9).all()


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("task-location", {"model": "zoo:tiny-llama"}, InputError, "reads text only"),
        ("task-location", {"direction": "both"}, InputError, "denoise, noise"),
        ("task-location", {"tasks": "animal-yung"}, UnknownNameError, "animal-young"),
        ("task-location", {"prompts": 99}, InputError, "99 are needed"),
        ("head-mediation", {"heads": 32}, InputError, "leave some out"),
        ("head-mediation", {"prompts": 99}, InputError, "36 queries"),
        ("image-crossing", {"window": 9}, InputError, "has 8 layers"),
        ("image-crossing", {"edges": "image to last"}, InputError, "is no edge"),
        ("image-crossing", {"edges": "imag -> last"}, UnknownNameError, "Did you mean 'image'"),
        ("answer-phases", {"prompts": 99}, InputError, "36 queries whose answer"),
        ("override-conflict", {"model": "zoo:tiny-lava"}, UnknownNameError, "tiny-llava"),
        ("diffusion-patching", {"window": 9}, InputError, "4 steps"),
        ("diffusion-patching", {"sites": "*.cros.hook_k"}, UnknownNameError, "hook_k"),
        ("diffusion-patching", {"sites": "*.hook_mlp_out"}, InputError, "text_encoder"),
        ("diffusion-patching", {"model": "zoo:tiny-difusion"}, UnknownNameError, "tiny-diffusion"),
    ],
)
def test_bad_options_are_refused(tmp_path, name, change, error, words) -> None:
    with pytest.raises(error, match=words):
        made(name, tmp_path, **change)
    # What can be seen from the options alone is refused before a folder is made.
    assert change == {"prompts": 99} or not list(tmp_path.iterdir())
