import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from interp.errors import InputError, ShapeError, UnknownNameError
from interp.figures.readouts import readout_map, readout_panels, training_curves
from interp.readouts import ReadoutTask, class_task, picture_task, readout_sweep
from interp.readouts.sweep import explained, right
from interp.readouts.sweep_files import digest
from tests.pipelines import hooked_calls
from tests.readouts.heads import SIZE, model

SITES = ["up.1.resnets.0.hook_branch", "up.3.resnets.2.hook_branch"]
N, N_TRAIN = 24, 16


def world(seed=0):
    """Latents of two classes, and a picture that says which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % 2
    left = torch.cat([torch.ones(4), -torch.ones(4)])
    signs = (2.0 * labels - 1)[:, None, None, None]
    latents = 3 * signs * left + 0.1 * torch.randn(N, 4, *SIZE, generator=generator)
    return latents, labels, (signs * left).expand(N, 1, *SIZE).contiguous()


def sweep(sd, tasks, latents, timesteps=(20, 999), sites=SITES, **options):
    settings = {"n_train": N_TRAIN, "latents": True, "steps": 40, "lr": 1e-2, "progress": False} | options
    return readout_sweep(sd, sites, list(timesteps), latents, tasks, **settings)


def test_what_is_there_is_read_with_little_noise_and_not_from_noise_and_the_model_runs_once_a_timestep():
    sd = model()
    latents, labels, picture = world()
    tasks = [picture_task("picture", picture), class_task("class", labels)]
    with hooked_calls(sd.denoiser) as calls:
        table = sweep(sd, tasks, latents, model_batch=12)
    assert len(calls) == 2 * 2  # two timesteps of two batches, for eight cells
    assert list(table.columns) == ["task", "site", "timestep", "score", "train_score", "loss"]
    assert len(table) == 8
    scores = table.set_index(["task", "site", "timestep"])["score"]
    for site in SITES:
        assert scores["class", site, 20] == 1.0 >= scores["class", site, 999]
    assert scores["picture", SITES[1], 20] > max(0.5, scores["picture", SITES[1], 999] + 0.1)


def test_a_cell_is_the_same_alone_as_in_a_sweep_and_holds_plain_captures():
    sd = model()
    latents, labels, _ = world()
    seen = []

    def score(read, targets, reference):
        seen.append(read.clone())
        return right(read, targets, reference)

    one = class_task("class", labels)
    task = ReadoutTask(one.name, one.targets, one.head, one.loss, score)
    both = sweep(sd, [task], latents, timesteps=(20, 500)).set_index(["site", "timestep"])
    alone = sweep(sd, [task], latents, timesteps=(500,), sites=[SITES[1]]).iloc[0]
    assert both.loc[(SITES[1], 500), "loss"] == pytest.approx(alone["loss"], rel=1e-4)
    # An untrained cell, written out: noise by the seed, one plain call, a bilinear resize.
    quick = ReadoutTask("class", labels, one.head, one.loss, score)
    seen.clear()
    sweep(sd, [quick], latents, timesteps=(500,), sites=[SITES[1]], steps=1, lr=1e-12, model_batch=N)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    alpha = sd.pipeline.scheduler.alphas_cumprod[500]
    acts = sd.capture(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, 500, "", SITES[1])
    maps = F.interpolate(acts[SITES[1]], size=SIZE, mode="bilinear", align_corners=False)
    head = one.head(maps.shape[1], 0)
    head.standardised.measure(maps[:N_TRAIN])
    torch.testing.assert_close(seen[0], head(maps[N_TRAIN:]).detach(), rtol=1e-3, atol=1e-4)


def test_scores_by_hand():
    read, true = torch.tensor([[1.0], [3.0]])[..., None, None], torch.tensor([[1.0], [5.0]])[..., None, None]
    reference = torch.tensor([[2.0], [4.0]])[..., None, None]  # its mean is 3: errors 4 and 4
    assert explained(read, true, reference) == pytest.approx(1 - 4 / 8)
    assert explained(true, true, reference) == 1
    assert right(torch.tensor([[0.0, 1.0], [0.2, 0.1]]), torch.tensor([1, 1]), torch.zeros(1)) == 0.5


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    sd = model()
    latents, labels, _ = world()
    made = []
    plain = class_task("class", labels)

    def head(channels, seed):
        made.append(channels)
        if len(made) == 3:
            raise KeyboardInterrupt
        return plain.head(channels, seed)

    task = ReadoutTask("class", labels, head, plain.loss, plain.score)
    with pytest.raises(KeyboardInterrupt):
        sweep(sd, [task], latents, folder=tmp_path, steps=5)
    with hooked_calls(sd.denoiser) as calls:
        table = sweep(sd, [task], latents, folder=tmp_path, steps=5, model_batch=16)
    assert len(made) == 5 and len(calls) == 2  # two cells were done; their timestep is not captured again
    expected = sweep(sd, [plain], latents, steps=5)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4)
    with pytest.raises(InputError, match="holds a sweep with steps 5, not 6"):
        sweep(sd, [task], latents, folder=tmp_path, steps=6)


def test_a_line_that_was_cut_off_is_done_anew(tmp_path):
    sd = model()
    latents, labels, _ = world()
    tasks = [class_task("class", labels)]
    expected = sweep(sd, tasks, latents, folder=tmp_path, steps=3)
    file = tmp_path / "sweep.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 4
    for cut in (1, 9, len(lines[-1]) - 1):
        file.write_bytes(whole[:-cut])
        with hooked_calls(sd.denoiser) as calls:
            table = sweep(sd, tasks, latents, folder=tmp_path, steps=3)
        assert len(calls) == 2  # two batches at one timestep, for the cell that is missing
        pd.testing.assert_frame_equal(table, expected, rtol=1e-4)
        assert file.read_bytes().splitlines()[:-1] == whole.splitlines()[:-1] and file.read_bytes().endswith(b"}\n")
    file.write_bytes(lines[0][:20])  # killed while its first line was written
    pd.testing.assert_frame_equal(sweep(sd, tasks, latents, folder=tmp_path, steps=3), expected, rtol=1e-4)
    file.write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    with pytest.raises(InputError, match="is damaged"):
        sweep(sd, tasks, latents, folder=tmp_path, steps=3)
    file.write_bytes(b"[]\n")
    with pytest.raises(InputError, match="holds no settings"):
        sweep(sd, tasks, latents, folder=tmp_path, steps=3)


def test_a_sweep_does_not_go_on_with_other_data(tmp_path):
    sd = model()
    latents, labels, picture = world()
    sweep(sd, [class_task("class", labels)], latents, folder=tmp_path, steps=1, timesteps=(20,))
    moved = latents.clone()
    moved[3, 0, 0, 0] += 1e-3
    for changed, words in (
        ({"latents": moved}, "with other images"),
        ({"sd": model(seed=70)}, "with other weights"),
        ({"tasks": [class_task("class", 1 - labels)]}, "other targets, loss or head of 'class'"),
        ({"tasks": [class_task("class", labels, n_heads=2)]}, "other targets, loss or head of 'class'"),
    ):
        given = {"sd": sd, "tasks": [class_task("class", labels)], "latents": latents} | changed
        with pytest.raises(InputError, match=words):
            sweep(**given, folder=tmp_path, steps=1, timesteps=(20,))
    more = [class_task("class", labels), picture_task("picture", picture)]
    assert len(sweep(sd, more, latents, folder=tmp_path, steps=1, timesteps=(20,))) == 4  # another task may join


def test_digests_tell_tensors_apart():
    x = torch.arange(12.0).reshape(3, 4)
    assert digest(x) == digest(x.clone()) == digest(x.T.contiguous().T)
    others = [x.reshape(4, 3), x.double(), x.to(torch.bfloat16), x + torch.eye(3, 4) * 1e-6, x.long(), x[:2]]
    assert len({digest(one) for one in [x, *others]}) == 7


def test_bad_sweeps_are_refused():
    sd = model()
    latents, labels, _ = world()
    task = class_task("class", labels)
    for tasks, options, words in (
        ([task], {"n_train": N}, "n_train=24 of 24"),
        ([task, task], {}, "are not all different"),
        ([], {}, "at least one site"),
        ([class_task("class", labels[:5])], {}, "5 targets for 24"),
        ([task], {"timesteps": (1000,)}, "1000 is out of range"),
    ):
        with pytest.raises(InputError, match=words):
            sweep(sd, tasks, latents, **options)
    for options, words in (({"size": (0, 3)}, "height=0"), ({"model_batch": 0}, "model_batch=0"),
                           ({"batch": 0}, "batch=0"), ({"seed": -1}, "seed=-1")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            sweep(sd, [task], latents, **options)
    for wrong, n in ((labels[:0], None), (labels - 1, None), (labels, 1)):
        with pytest.raises(InputError, match="labels of 'class'"):
            class_task("class", wrong, n)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        sweep(sd, [task], latents, sites=["up.1.resnets.0.hook_branches"])


def test_the_map_shows_every_cell_in_its_place():
    cells = [(site, time) for site in ("b", "a") for time in (900, 100)]
    table = pd.DataFrame(cells, columns=["site", "timestep"]).assign(score=[0.1, 0.2, 0.3, 0.4])
    ax = readout_map(table)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.2, 0.1], [0.4, 0.3]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["100", "900"]
    with pytest.raises(InputError, match="a cell twice"):
        readout_map(pd.concat([table, table]))
    with pytest.raises(InputError, match="no column 'error'"):
        readout_map(table, value="error")
    with pytest.raises(InputError, match="not finite"):
        readout_map(table[:-1])


def test_curves_and_panels_draw_what_they_are_given():
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [4.0, 2.0, 1.0], "score": [np.nan, 0.5, np.nan]})
    ax = training_curves(history)
    assert ax.lines[0].get_ydata().tolist() == [4, 2, 1]
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([4, 3, 7 / 3])
    assert ax.get_yscale() == "log"
    with pytest.raises(InputError, match="no step"):
        training_curves(history[:0])
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = torch.linspace(-0.5, 0.5, 2 * 18 * 4).reshape(2, 18, 2, 2)
    figure = readout_panels(images, list(maps), {"t = 5": maps}, (-0.5, 0.5))
    axes = np.array(figure.axes).reshape(2, 3)
    np.testing.assert_allclose(axes[1, 0].images[0].get_array(), images[1].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(axes[1, 2].images[0].get_array(), maps[1].amax(dim=0) + 0.5, atol=1e-6)
    assert [ax.get_title() for ax in axes[0]] == ["image", "target", "t = 5"]
    with pytest.raises(ShapeError, match="2 images with 1 of 't = 5'"):
        readout_panels(images, None, {"t = 5": maps[:1]})
