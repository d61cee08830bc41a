"""Train the models that ship, from nothing: ``python -m interp.zoo.train`` (what ``make zoo`` runs)."""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from interp.zoo import MODELS
from interp.zoo.architecture import IMAGE_TOKENS, new_llama, new_llava, new_processor
from interp.zoo.cards import write_card
from interp.zoo.corpus import Corpus
from interp.zoo.tokenizer import train_tokenizer
from interp.zoo.training import (
    Stage,
    draw_pictures,
    train_language_model,
    train_vision_tower,
    train_vlm,
)

SEED = 0
LENGTH = 144  # tokens of a training row: six pictures with their answers fit
MIXTURE = (0.35, 0.2, 0.38, 0.07)  # few-shot, instruction, late-task, bare-instruction
CLOSED = 0.5  # share of rows with closed spans
INAPPLICABLE = 0.25  # share of what rows with closed spans ask, in the last stage, that does not apply
UNSPECIFIED = 0.5  # share of late-task rows, in the last stage, that begin with a query without any task
VARIANTS = 192  # training pictures per entity
TEXT_SHARE = 0.35  # rows without pictures while the VLM is trained
LANGUAGE_MODEL = Stage("language-model", steps=1600, batch=16, rates=(2e-3,), seed=SEED + 1)
VISION_TOWER = Stage("vision-tower", steps=3000, batch=128, rates=(1e-3,), seed=SEED + 2)
ALIGNMENT = Stage("alignment", steps=500, batch=16, rates=(1e-3,), seed=SEED + 3)
JOINT = Stage("joint", steps=1200, batch=16, rates=(1e-3, 4e-4), seed=SEED + 4)
STAGES = (LANGUAGE_MODEL, VISION_TOWER, ALIGNMENT, JOINT)


def record(work: Path, stage: Stage) -> Path:
    """The file that a stage writes last: its settings, wall time and threads."""
    return work / stage.name / "stage.json"


def finish(work: Path, stage: Stage, started: float, threads: int, compiled: bool) -> None:
    """Mark a stage as done."""
    losses = (work / stage.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    content = {
        **asdict(stage),
        "seconds": round(time.time() - started, 1),
        "threads": threads,
        "compiled": compiled,
        "final_loss": round(json.loads(losses[-1])["loss"], 4),
    }
    record(work, stage).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(work: Path, compiled: bool, threads: int) -> None:
    """Run every stage that has not run yet.

    Args:
        work: where each stage leaves its model and its log.
        compiled: use ``torch.compile``.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    tokenizer = train_tokenizer()
    processor = new_processor(tokenizer)
    corpus = Corpus(tokenizer, IMAGE_TOKENS, LENGTH, MIXTURE, CLOSED)
    for stage in STAGES:
        (work / stage.name).mkdir(parents=True, exist_ok=True)

    folder = work / LANGUAGE_MODEL.name
    if not record(work, LANGUAGE_MODEL).is_file():
        started = time.time()
        llama = new_llama(tokenizer, SEED)
        train_language_model(llama, corpus, LANGUAGE_MODEL, folder / "log.jsonl", compiled)
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        finish(work, LANGUAGE_MODEL, started, threads, compiled)
    if all(record(work, stage).is_file() for stage in STAGES):
        return

    pictures = draw_pictures(processor, VARIANTS)
    if not record(work, VISION_TOWER).is_file():
        started = time.time()
        llava = new_llava(LlamaForCausalLM.from_pretrained(folder), tokenizer, SEED)
        train_vision_tower(llava, pictures, VISION_TOWER, work / VISION_TOWER.name / "log.jsonl")
        llava.save_pretrained(work / VISION_TOWER.name)
        finish(work, VISION_TOWER, started, threads, compiled)

    for before, stage in ((VISION_TOWER, ALIGNMENT), (ALIGNMENT, JOINT)):
        folder = work / stage.name
        if not record(work, stage).is_file():
            started = time.time()
            llava = LlavaForConditionalGeneration.from_pretrained(work / before.name)
            if stage is JOINT:
                corpus = Corpus(tokenizer, IMAGE_TOKENS, LENGTH, MIXTURE, CLOSED, INAPPLICABLE, UNSPECIFIED)
            train_vlm(llava, corpus, pictures, stage, folder / "log.jsonl", compiled, TEXT_SHARE)
            llava.save_pretrained(folder)
            processor.save_pretrained(folder)
            finish(work, stage, started, threads, compiled)


def install(work: Path, models: Path, arguments: str) -> None:
    """Copy the finished models to where they ship from, measure them and write their cards.

    Args:
        work: the stages' folders.
        models: gets ``tiny-llama`` and ``tiny-llava``.
        arguments: of the command line, for the cards.
    """
    records: dict[str, dict[str, Any]] = {
        stage.name: json.loads(record(work, stage).read_text(encoding="utf-8")) for stage in STAGES
    }
    for name, stages in (("tiny-llama", STAGES[:1]), ("tiny-llava", STAGES)):
        folder = models / name
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted((work / stages[-1].name).iterdir()):
            if source.name not in ("log.jsonl", "stage.json"):
                # Not shutil.copy: safetensors files come with a mode that only their owner can read.
                (folder / source.name).write_bytes(source.read_bytes())
        recipe = {
            "arguments": arguments,
            "seed": SEED,
            "row_tokens": LENGTH,
            "mixture": MIXTURE,
            "rows_with_closed_spans": CLOSED,
            "inapplicable_in_closed_rows_of_last_stage": INAPPLICABLE,
            "late_task_rows_of_last_stage_with_a_query_without_task": UNSPECIFIED,
            "rows_without_pictures": TEXT_SHARE,
            "pictures_per_entity": VARIANTS,
            "stages": [records[stage.name] for stage in stages],
        }
        write_card(folder, None if name == "tiny-llama" else models / "tiny-llama", recipe)


def main() -> None:
    """Read the command line, train, and install the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="folder of the stages")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that gets the models")
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=shutil.which("g++") is not None,
        help="use torch.compile: a third faster; by default where there is a C++ compiler",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    if options.fresh and options.work.exists():
        shutil.rmtree(options.work)
    train(options.work, options.compile, options.threads)
    compiled = "--compile" if options.compile else "--no-compile"
    install(options.work, options.models, f"--threads {options.threads} {compiled}")


if __name__ == "__main__":
    main()
