"""Train the small diffusion model, from nothing: ``python -m interp.zoo.diffusion.train``."""

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from interp.errors import InputError
from interp.zoo import MODELS
from interp.zoo.diffusion.architecture import (
    new_autoencoder,
    new_denoiser,
    new_pipeline,
    new_text_encoder,
    new_tokenizer,
)
from interp.zoo.diffusion.cards import write_card
from interp.zoo.diffusion.classifier import load_classifier, new_classifier, save_classifier, train_classifier
from interp.zoo.diffusion.figures import draw_figures
from interp.zoo.diffusion.training import (
    Stage,
    draw_pictures,
    encode,
    train_autoencoder,
    train_decoder,
    train_denoiser,
)

NAME = "tiny-diffusion"


@dataclass(frozen=True)
class Recipe:
    """What the model is made from.

    Attributes:
        pictures: how many the autoencoder learns from.
        captioned: how many of them denoiser and decoder learn from: the first ones.
        data_seed: of the pictures.
        autoencoder: the first stage.
        denoiser: the second stage, with the text encoder.
        decoder: the third stage: the autoencoder's decoder alone. Latents do not change in it.
        classifier: the last stage: what tells generated pictures apart when the model is measured.
        classified: how many pictures the classifier learns from.
        classified_seed: of these pictures.
    """

    pictures: int
    captioned: int
    data_seed: int
    autoencoder: Stage
    denoiser: Stage
    decoder: Stage
    classifier: Stage
    classified: int
    classified_seed: int

    def __post_init__(self) -> None:
        if self.captioned > self.pictures:
            raise InputError(f"captioned is {self.captioned}; expected at most the {self.pictures} pictures.")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order."""
        return (self.autoencoder, self.denoiser, self.decoder, self.classifier)


RECIPE = Recipe(
    pictures=40_000,
    captioned=30_000,
    data_seed=11,
    autoencoder=Stage("autoencoder", steps=4000, batch=16, rate=2e-3, seed=1),
    denoiser=Stage("denoiser", steps=4500, batch=32, rate=1e-3, seed=2),
    decoder=Stage("decoder", steps=4000, batch=4, rate=1e-3, seed=3),
    classifier=Stage("classifier", steps=1800, batch=64, rate=3e-3, seed=4),
    classified=16_384,
    classified_seed=21,
)


def record(work: Path, stage: Stage) -> Path:
    """The file that a stage writes last: its settings, wall time and threads."""
    return work / stage.name / "stage.json"


def finish(work: Path, stage: Stage, started: float) -> None:
    """Mark a stage as done.

    Args:
        work: the stages' folders.
        stage: the stage.
        started: when, in seconds since the epoch.
    """
    losses = (work / stage.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    content = {
        **asdict(stage),
        "seconds": round(time.time() - started, 1),
        "threads": torch.get_num_threads(),
        "final_loss": round(json.loads(losses[-1])["loss"], 4),
    }
    record(work, stage).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(work: Path, recipe: Recipe = RECIPE) -> None:
    """Run every stage that has not run yet.

    Args:
        work: where each stage leaves its model and its log.
        recipe: what to train, and for how long.

    Raises:
        InputError: the recipe asks for no pictures, or for seeds below 0.
    """
    for stage in recipe.stages:
        (work / stage.name).mkdir(parents=True, exist_ok=True)
    if not all(record(work, stage).is_file() for stage in (recipe.autoencoder, recipe.denoiser, recipe.decoder)):
        _train_model(work, recipe)
    stage = recipe.classifier
    if not record(work, stage).is_file():
        started = time.time()
        scenes, pictures = draw_pictures(recipe.classified, recipe.classified_seed)
        classifier = new_classifier(stage.seed)
        train_classifier(classifier, scenes, pictures, stage, work / stage.name)
        save_classifier(classifier, work / stage.name)
        finish(work, stage, started)


def _train_model(work: Path, recipe: Recipe) -> None:
    scenes, pictures = draw_pictures(recipe.pictures, recipe.data_seed)

    stage, folder = recipe.autoencoder, work / recipe.autoencoder.name
    if not record(work, stage).is_file():
        started = time.time()
        autoencoder = new_autoencoder(stage.seed)
        train_autoencoder(autoencoder, pictures, stage, folder)
        autoencoder.save_pretrained(folder / "vae")
        finish(work, stage, started)
    autoencoder = AutoencoderTiny.from_pretrained(folder / "vae")

    started = time.time()
    scenes, pictures = scenes[: recipe.captioned], pictures[: recipe.captioned]
    latents = encode(autoencoder, pictures, autoencoder.config.scaling_factor)
    stage, folder = recipe.denoiser, work / recipe.denoiser.name
    if not record(work, stage).is_file():
        tokenizer = new_tokenizer()
        denoiser, text_encoder = new_denoiser(stage.seed), new_text_encoder(tokenizer, stage.seed)
        train_denoiser(denoiser, text_encoder, tokenizer, scenes, latents, stage, folder)
        denoiser.save_pretrained(folder / "unet")
        text_encoder.save_pretrained(folder / "text_encoder")
        finish(work, stage, started)

    stage, folder = recipe.decoder, work / recipe.decoder.name
    if not record(work, stage).is_file():
        started = time.time()
        train_decoder(autoencoder, pictures, latents, stage, folder)
        autoencoder.save_pretrained(folder / "vae")
        finish(work, stage, started)


def assemble(work: Path, folder: Path, recipe: Recipe = RECIPE) -> None:
    """Write the finished pipeline in half precision; where no dtype is asked for, it loads in single precision.

    Args:
        work: the stages' folders.
        folder: gets the pipeline, and the classifier beside it.
        recipe: whose stages they are.

    Raises:
        InputError: a stage has not run.
    """
    missing = [stage.name for stage in recipe.stages if not record(work, stage).is_file()]
    if missing:
        raise InputError(f"{str(work)!r} has no finished stage {', '.join(missing)}; train it first.")
    autoencoder = AutoencoderTiny.from_pretrained(work / recipe.decoder.name / "vae")
    denoiser = UNet2DConditionModel.from_pretrained(work / recipe.denoiser.name / "unet")
    text_encoder = CLIPTextModel.from_pretrained(work / recipe.denoiser.name / "text_encoder")
    parts = (autoencoder.half(), text_encoder.half(), new_tokenizer(), denoiser.half())
    new_pipeline(*parts).save_pretrained(folder)
    for part in ("text_encoder", "unet", "vae"):
        file = folder / part / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        # The folder of a stage says nothing; the autoencoder sets the other by itself, and logs it where it is given.
        for setting in ("_name_or_path", *(["block_out_channels"] if part == "vae" else [])):
            content.pop(setting, None)
        if part == "text_encoder":
            # Without a dtype, transformers loads in that of the configuration and diffusers in single precision.
            content["dtype"] = "float32"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_classifier(load_classifier(work / recipe.classifier.name), folder / "classifier")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # what diffusers writes can be read by its owner alone


def install(work: Path, models: Path, recipe: Recipe = RECIPE) -> None:
    """Write the model to where it ships from, measure it, and write its card and figures.

    Args:
        work: the stages' folders.
        models: gets the folder ``tiny-diffusion``.
        recipe: whose stages they are.

    Raises:
        InputError: a stage has not run.
    """
    folder = models / NAME
    assemble(work, folder, recipe)
    records = {stage.name: json.loads(record(work, stage).read_text(encoding="utf-8")) for stage in recipe.stages}
    _, pictures = draw_pictures(recipe.captioned, recipe.data_seed)
    first = AutoencoderTiny.from_pretrained(work / recipe.autoencoder.name / "vae")
    write_card(folder, {**asdict(recipe), **records}, pictures, first)
    draw_figures(folder, {name: work / name / "log.jsonl" for name in records})


def main() -> None:
    """Read the command line, train, and install the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo-diffusion"), help="folder of the stages")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that gets the model")
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    if options.fresh and options.work.exists():
        shutil.rmtree(options.work)
    torch.set_num_threads(options.threads)
    train(options.work)
    install(options.work, options.models)


if __name__ == "__main__":
    main()
