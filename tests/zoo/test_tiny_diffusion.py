"""The diffusion model that ships: it loads with diffusers alone, and does what its card says; its recipe repeats."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from interp import zoo
from interp.errors import InputError, ShapeError
from interp.models.loading import load as load_language_model
from interp.zoo.creatures import VOCABULARY, draw_scenes, render
from interp.zoo.diffusion import cards, classifier, evaluate, figures, novelty, train
from interp.zoo.diffusion.architecture import new_autoencoder, new_denoiser, new_text_encoder, new_tokenizer
from interp.zoo.diffusion.training import Stage

NAME = "tiny-diffusion"
MEGABYTE = 10**6
# The recipe with so little of everything that it takes seconds.
MINIATURE = train.Recipe(
    pictures=10,
    captioned=8,
    data_seed=5,
    autoencoder=Stage("autoencoder", steps=3, batch=2, rate=1e-3, seed=1),
    denoiser=Stage("denoiser", steps=2, batch=2, rate=1e-3, seed=2),
    decoder=Stage("decoder", steps=2, batch=2, rate=1e-3, seed=3),
    classifier=Stage("classifier", steps=2, batch=2, rate=1e-3, seed=4),
    classified=6,
    classified_seed=6,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    train.train(folder, MINIATURE)
    return folder


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_it_loads_as_any_other_pipeline_in_one_precision() -> None:
    pipeline = DiffusionPipeline.from_pretrained(zoo.path(NAME))
    assert type(pipeline) is StableDiffusionPipeline
    assert {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np"}
    image = pipeline("a red dog", generator=torch.Generator().manual_seed(0), **settings).images
    assert image.shape == (1, 64, 64, 3)
    other = pipeline("a blue bird", generator=torch.Generator().manual_seed(0), **settings).images
    assert abs(image - other).max() > 0.1  # the caption matters, of one grey in 255 that is 25
    half = DiffusionPipeline.from_pretrained(zoo.path(NAME), dtype=torch.float16)
    assert {part.dtype for part in (half.unet, half.text_encoder, half.vae)} == {torch.float16}


def test_its_files_are_small_and_complete_and_name_no_foreign_folder() -> None:
    folder = zoo.path(NAME)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert max(sizes.values()) <= 16 * MEGABYTE
    assert sum(sizes.values()) <= 28 * MEGABYTE
    assert sizes["classifier/model.safetensors"] < MEGABYTE
    wanted = {"model_index.json", "card.json", "README.md", "figures/samples.png", "figures/reconstructions.png"}
    assert wanted <= set(sizes)
    for name in sizes:
        assert not name.endswith((".bin", ".pt", ".pkl", ".ckpt")), name
        if name.endswith(".json"):
            assert "_name_or_path" not in (folder / name).read_text(encoding="utf-8"), name


def test_its_figures_can_be_measured_again() -> None:
    folder, card = zoo.path(NAME), zoo.card(NAME)
    check = card["figures"]["check"]
    model = classifier.load_classifier(folder / "classifier")
    measured = evaluate.measure(evaluate.load(folder), model, evaluate.CHECK)
    assert measured["measured_on"] == {**check["measured_on"], "scales": evaluate.CHECK.scales}
    # The CPU's kernels may add in another order than those that the card was measured with: reconstructions and
    # losses move by rounding, and a picture that the classifier was undecided about may fall on the other side.
    assert measured["psnr"] == pytest.approx(check["psnr"], abs=0.02)
    assert measured["denoising_loss"] == {
        name: pytest.approx(losses, rel=0.01, abs=2e-4) for name, losses in check["denoising_loss"].items()
    }
    one, two = 1.01 / evaluate.CHECK.held_out, 2.01 / evaluate.CHECK.captions
    for name, shares in check["classifier"].items():
        assert measured["classifier"][name] == pytest.approx(shares, abs=one), name
    for name, shares in check["generated"].items():
        assert measured["generated"][name] == pytest.approx(shares, abs=two), name
    assert (folder / "README.md").read_text(encoding="utf-8") == cards.markdown(card)


def test_the_card_reports_what_the_model_is_for() -> None:
    card = zoo.card(NAME)
    measured = card["figures"]
    shown = measured["generated"]["guidance 3"]
    assert min(shown["species"], shown["background"], shown["body"]) >= 0.95
    assert min(shown["head"], shown["legs"]) >= 0.9
    # The one word that it does not follow, and says so.
    assert 0.4 <= shown["facing"] <= 0.6
    assert any("do not steer facing" in limit for limit in cards.limits(card))
    assert measured["classifier"]["held-out renders"]["all"] >= 0.9
    losses = measured["denoising_loss"]
    for informed, blind, linear in zip(*losses.values(), strict=True):
        assert informed < 0.95 * blind
        assert informed < linear < 1
    # Were pictures repeated, they would be as near to training pictures as those pictures' own reconstructions.
    nearest = measured["nearest_training_picture"]
    for name in measured["generated"]:
        assert nearest["pixels"][name]["median"] >= 2 * nearest["pixels"]["training pictures themselves"]["median"]
        assert nearest["latents"][name]["5th percentile"] >= 0.9 * nearest["latents"]["held-out"]["5th percentile"]
    assert measured["psnr"] >= measured["psnr_before_the_decoder_learned_alone"] + 0.5


def test_the_recipe_of_the_card_is_the_one_in_the_code() -> None:
    recipe = zoo.card(NAME)["recipe"]
    expected = json.loads(json.dumps(dataclasses.asdict(train.RECIPE)))
    for name, setting in expected.items():
        if isinstance(setting, dict):
            assert {field: recipe[name][field] for field in setting} == setting
        else:
            assert recipe[name] == setting


def test_a_vlm_is_not_made_of_it() -> None:
    for name in (f"zoo:{NAME}", zoo.path(NAME)):
        with pytest.raises(InputError, match=r"interp\.Diffusion\.from_pretrained"):
            load_language_model(name)


def test_the_tokenizer_covers_any_text_and_has_one_token_for_each_word_of_captions() -> None:
    tokenizer = new_tokenizer()
    shipped = DiffusionPipeline.from_pretrained(zoo.path(NAME)).tokenizer
    assert isinstance(shipped, CLIPTokenizer)
    assert shipped.get_vocab() == tokenizer.get_vocab() == new_tokenizer().get_vocab()
    for word in VOCABULARY:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    texts = evaluate.captions(draw_scenes(30, 7))
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= 32
        assert shipped(text).input_ids == ids
    for text in ("zebra", "naïve café", "恐竜 🐉", "tab\tand\nline", "horse-dog's 42%", "".join(VOCABULARY)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert shipped(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.unk_token_id not in ids
        assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())


def test_new_parts_come_from_their_seed_and_leave_the_global_random_state() -> None:
    tokenizer = new_tokenizer()
    makers = (new_autoencoder, new_denoiser, lambda seed: new_text_encoder(tokenizer, seed), classifier.new_classifier)
    for make in makers:
        before = torch.get_rng_state()
        first, again, other = make(3), make(3), make(4)
        assert torch.equal(torch.get_rng_state(), before)
        assert same(first.state_dict(), again.state_dict())
        assert not same(first.state_dict(), other.state_dict())


def test_the_recipe_gives_the_same_weights_twice(work: Path, tmp_path: Path) -> None:
    train.train(tmp_path, MINIATURE)
    first, again = weights(work), weights(tmp_path)
    assert len(first) == 5  # autoencoder, UNet, text encoder, autoencoder with its last decoder, classifier
    assert first.keys() == again.keys()
    for name in first:
        assert same(first[name], again[name]), name
    other = dataclasses.replace(MINIATURE, decoder=dataclasses.replace(MINIATURE.decoder, seed=9))
    (tmp_path / "decoder" / "stage.json").unlink()
    train.train(tmp_path, other)
    changed = [name for name, part in weights(tmp_path).items() if not same(part, first[name])]
    assert [Path(name).parts[0] for name in changed] == ["decoder"]


def test_the_decoder_learns_alone(work: Path) -> None:
    before, after = (AutoencoderTiny.from_pretrained(work / stage / "vae") for stage in ("autoencoder", "decoder"))
    assert same(before.encoder.state_dict(), after.encoder.state_dict())
    moved = [
        not torch.equal(a, b) for a, b in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True)
    ]
    assert all(moved)
    assert before.config.scaling_factor == after.config.scaling_factor != 1


def test_a_stage_that_has_run_is_not_run_again(work: Path, tmp_path: Path) -> None:
    stamps = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    train.train(work, MINIATURE)
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()} == stamps
    for stage in MINIATURE.stages:
        record = json.loads((work / stage.name / "stage.json").read_text())
        assert record["steps"] == stage.steps
        assert record["final_loss"] > 0
    with pytest.raises(InputError, match="no finished stage autoencoder, denoiser, decoder, classifier"):
        train.install(tmp_path, tmp_path, MINIATURE)


def test_a_model_of_the_recipe_installs_with_card_and_figures(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = evaluate.Measuring(held_out=3, captions=2, scales=(1.0, 2.0), steps=2)
    monkeypatch.setattr(cards, "FULL", little)
    monkeypatch.setattr(cards, "CHECK", little)
    for name, value in {"ROWS": 1, "COLUMNS": 2, "STEPS": 2}.items():
        monkeypatch.setattr(figures, name, value)
    train.install(work, tmp_path, MINIATURE)
    folder = tmp_path / NAME
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    trained = load_file(work / "denoiser" / "unet" / "diffusion_pytorch_model.safetensors")
    shipped = pipeline.unet.state_dict()
    assert same({name: weight.half().float() for name, weight in trained.items()}, shipped)
    card = json.loads((folder / "card.json").read_text())
    assert card["figures"]["generated"].keys() == {"guidance 1", "guidance 2"}
    assert (folder / "README.md").read_text() == cards.markdown(card)
    assert {file.name for file in (folder / "figures").iterdir()} == {
        "samples.png",
        "reconstructions.png",
        "learning.png",
    }


def test_generated_pictures_are_the_pipelines_own(work: Path, tmp_path: Path) -> None:
    train.assemble(work, tmp_path, MINIATURE)
    pipeline = evaluate.load(tmp_path)
    texts = evaluate.captions(draw_scenes(3, 7))
    _, images = evaluate.generate(pipeline, texts, 2.0, 2)
    for index, text in enumerate(texts):
        generator = torch.Generator().manual_seed(evaluate.FIRST_IMAGE_SEED + index)
        own = pipeline(text, guidance_scale=2.0, num_inference_steps=2, generator=generator, output_type="pt").images
        # Alone and in a batch the kernels add in another order.
        assert torch.allclose(images[index], own[0], atol=1e-4)
    assert not torch.allclose(images[0], images[1], atol=0.05)


def test_denoising_loss_and_the_linear_bound_have_their_closed_forms() -> None:
    alphas = evaluate.load(zoo.path(NAME)).scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(1)
    zeros = torch.zeros(200, 1, 4, 4)
    blind = evaluate.denoising_loss(lambda noisy, timesteps: torch.zeros_like(noisy), alphas, zeros)
    assert blind == pytest.approx([1.0] * evaluate.BINS, abs=0.1)  # 3,200 squares of normal numbers: 0.025 each
    exact = evaluate.denoising_loss(
        lambda noisy, timesteps: noisy / (1 - alphas[timesteps])[:, None, None, None].sqrt(), alphas, zeros
    )
    assert exact == pytest.approx([0.0] * evaluate.BINS, abs=1e-6)

    spread = torch.linspace(0.5, 2, 16).reshape(1, 4, 4)
    latents = 0.7 + spread * torch.randn(4000, 1, 4, 4, generator=generator)
    predict = evaluate.linear_predictor(latents, alphas)
    timesteps = torch.tensor([10, 300, 900])
    noisy = torch.randn(3, 1, 4, 4, generator=generator)
    alpha = alphas[timesteps][:, None, None, None]
    wanted = (1 - alpha).sqrt() * (noisy - alpha.sqrt() * 0.7) / (alpha * spread**2 + 1 - alpha)
    # The covariance comes from 4,000 examples: entries are off by up to a few hundredths of the variances.
    assert torch.allclose(predict(noisy, timesteps), wanted, atol=0.15)
    assert not torch.allclose(predict(noisy, timesteps), noisy, atol=0.15)


def test_nearest_finds_the_known_example_and_its_distance() -> None:
    known = torch.randint(0, 256, (5000, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    queries = known[[4321, 7]].float() / 255
    queries[1] += 0.01
    distances, index = novelty.nearest(queries, known, 1 / 255)
    assert index.tolist() == [4321, 7]
    assert distances.tolist() == pytest.approx([0, 0.01], abs=1e-6)
    summary = novelty.summaries({"a": queries[:1], "b": queries[1:]}, known, 1 / 255)
    assert summary["b"] == {"smallest": 0.01, "5th percentile": 0.01, "median": 0.01}
    assert summary["a"]["median"] == 0
    with pytest.raises(ShapeError, match=r"\[3, 4, 2\]"):
        novelty.nearest(queries[..., :2], known)


def test_psnr_of_a_known_error() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    others = images + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert evaluate.psnr(images, others).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_the_classifier_compares_with_scenes_and_survives_its_folder(tmp_path: Path) -> None:
    scenes = draw_scenes(4, 8)
    wanted = classifier.targets(scenes)
    assert classifier.agreement(wanted, scenes) == dict.fromkeys([*classifier.FIELDS, "all"], 1.0)
    wrong = wanted.clone()
    wrong[0, 1] = (wrong[0, 1] + 1) % 8
    found = classifier.agreement(wrong, scenes)
    assert (found["species"], found["body"], found["all"]) == (1.0, 0.75, 0.75)

    model = classifier.new_classifier(0)
    classifier.save_classifier(model, tmp_path)
    images = render(scenes).images
    loaded = classifier.load_classifier(tmp_path)
    for logits, again in zip(model(images), loaded(images), strict=True):
        assert torch.allclose(logits, again, atol=5e-3)  # half precision has eleven bits
    with pytest.raises(InputError, match="no classifier"):
        classifier.load_classifier(tmp_path / "elsewhere")
    content = json.loads((tmp_path / "config.json").read_text())
    content["fields"]["species"].reverse()
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tells other things apart"):
        classifier.load_classifier(tmp_path)


def test_the_card_says_which_words_do_not_steer() -> None:
    shares = {"species": 0.9, "body": 0.2, "head": 0.9, "legs": 0.9, "background": 0.9, "facing": 0.52, "all": 0.3}
    other = {**shares, "body": 0.4}
    told = cards.limits({"figures": {"generated": {"guidance 1": shares, "guidance 3": other}}})
    assert ["facing" in limit for limit in told].count(True) == 1
    assert not any("steer body" in limit for limit in told)
    told = cards.limits({"figures": {"generated": {"guidance 1": shares}}})
    assert any("steer body" in limit for limit in told)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch", -1), ("rate", 0.0), ("seed", -1)])
def test_a_stage_of_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}"):
        dataclasses.replace(MINIATURE.decoder, **{field: value})


def test_more_captions_than_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="captioned is 11"):
        dataclasses.replace(MINIATURE, captioned=11)
