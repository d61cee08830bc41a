"""Task vectors: read from a specification's delimiter, averaged, combined, saved, and turned into a patch.

A task vector is the output of one decoder block at one delimiter token of a prompt that specifies a task: text
examples, image examples, or an instruction. Source: Luo, Darrell & Bar 2025, "Vision-Language Models Create Cross-Modal
Task Representations"; Hendel et al. 2023 and Todd et al. 2024 read elsewhere: `prompts.READ_AT`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import interp
from interp.edits import Replace
from interp.errors import InputError, ShapeError
from interp.inputs import PromptLike
from interp.models.vlm import VLM
from interp.progress import track
from interp.prompts import READ_AT, ReadAt, Template
from interp.saved_files import check_saved, saved_files
from interp.task_prompts import instruction_prompt, specification_prompts
from interp.tasks import Draw, Modality, Task, draw_exemplars, shuffled_labels

SITE = "blocks.{layer}.hook_resid_post"


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """Task vectors of one specification, for every layer.

    Args:
        per_prompt: float32, one vector for each prompt and each block of the model.
        metadata: what they were read from and with; JSON-able.
    """

    per_prompt: Float[Tensor, "prompt layer d_model"]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.per_prompt.ndim != 3 or not self.per_prompt.numel():
            raise ShapeError(f"task vectors are [prompt, layer, d_model], not {tuple(self.per_prompt.shape)}")
        if not bool(torch.isfinite(self.per_prompt).all()):
            raise InputError("task vectors hold NaN or infinite numbers")

    @property
    def mean(self) -> Float[Tensor, "layer d_model"]:
        """Arithmetic mean over the prompts: what is patched."""
        return self.per_prompt.mean(dim=0)

    @property
    def n_prompts(self) -> int:
        """How many prompts they come from."""
        return self.per_prompt.shape[0]

    @property
    def n_layers(self) -> int:
        """Blocks of the model that they come from."""
        return self.per_prompt.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the model that they come from."""
        return self.per_prompt.shape[2]

    def __repr__(self) -> str:
        about = ", ".join(f"{k}={self.metadata[k]!r}" for k in ("task", "specification", "model") if k in self.metadata)
        return f"TaskVectors({about}, n_prompts={self.n_prompts}, n_layers={self.n_layers}, d_model={self.d_model})"

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The mean vector of one block, counted from 0.

        Raises:
            InputError: no such block.
        """
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer} is out of range: these task vectors have layers 0 to {self.n_layers - 1}")
        return self.mean[layer]

    def patch(self, layer: int, vlm: VLM, at: Any = "last") -> Replace:
        """The edit that puts the vector of one block in place of that block's output.

        Args:
            layer: block, counted from 0; the same index as where the vector was read.
            vlm: the model to be patched; it may be another one than the vectors come from, of the same shape.
            at: position in the query; its last token by default.

        Raises:
            ShapeError: the model has another width or number of blocks.
            InputError: no such block.
        """
        self.check(vlm)
        return Replace(SITE.format(layer=layer), self.at(layer), at=at)

    def take(self, prompts: Sequence[int]) -> "TaskVectors":
        """The vectors of some prompts, in the order given, with the part of the metadata that is theirs.

        Args:
            prompts: indexes of prompts, none twice.

        Raises:
            InputError: an index that does not exist or occurs twice, or none.
        """
        chosen = list(prompts)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(self.n_prompts)):
            raise InputError(f"cannot take prompts {chosen} of {self.n_prompts}")
        metadata = {**self.metadata, "n_prompts": len(chosen)}
        if "items" in metadata:
            metadata["items"] = [metadata["items"][prompt] for prompt in chosen]
        return TaskVectors(self.per_prompt[chosen], metadata)

    def check(self, vlm: VLM) -> None:
        """Refuse a model that the vectors do not fit, before anything runs.

        Raises:
            ShapeError: another width or number of blocks.
        """
        if (self.n_layers, self.d_model) != (vlm.n_layers, vlm.d_model):
            source = self.metadata.get("model", "a model")
            raise ShapeError(
                f"task vectors of {self.n_layers} layers × width {self.d_model} from {source} do not fit {vlm.name}, "
                f"which has {vlm.n_layers} layers × width {vlm.d_model}"
            )

    def save(self, path: str | Path) -> Path:
        """Write ``path.safetensors`` and ``path.json``.

        Returns:
            The path of the safetensors file.
        """
        file, about = saved_files(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"task_vectors": self.per_prompt.contiguous()}, file)
        about.write_text(json.dumps(dict(self.metadata), indent=1))
        return file

    @classmethod
    def load(cls, path: str | Path) -> "TaskVectors":
        """Read what `save` wrote.

        Args:
            path: with or without ``.safetensors``.

        Raises:
            InputError: a missing or corrupt file, or one that holds something else.
        """
        file, about = saved_files(path)
        check_saved((file, about), "no task vectors at {}: a saved set is a .safetensors and a .json file")
        try:
            tensors = load_file(file)
            metadata = json.loads(about.read_text())
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the task vectors at {file} are corrupt: {error}") from error
        if list(tensors) != ["task_vectors"]:
            raise InputError(f"{file} holds {sorted(tensors)}, not 'task_vectors': another kind of file")
        if not isinstance(metadata, dict):
            raise InputError(f"{about} holds a {type(metadata).__name__}, not the metadata of task vectors")
        return cls(tensors["task_vectors"].float(), metadata)


def read(
    vlm: VLM, prompts: Sequence[PromptLike], at: Any = "last", *, batch_size: int = 16, **metadata: Any
) -> TaskVectors:
    """Read the output of every block at one token of each prompt.

    Args:
        vlm: the model.
        prompts: specifications.
        at: the token, by meaning: ``"delimiter[4]"``, ``"last"``.
        batch_size: prompts per forward.
        metadata: anything JSON-able to keep with the vectors.

    Returns:
        One vector per prompt and block, in float32.

    Raises:
        InputError: no prompts, or a position that is several tokens.
        UnknownNameError: a position that a prompt lacks.
    """
    if not prompts:
        raise InputError("no prompts to read task vectors from")
    collected = []
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    for batch in track(batches, "task vectors") if len(batches) > 8 else batches:
        inputs = vlm.prepare(batch)
        acts = vlm.capture(inputs, SITE.format(layer="*"), at=at, dtype=torch.float32, device="cpu", logits_to_keep=1)
        stacked = acts.stack("hook_resid_post")
        if stacked.ndim != 3:
            raise InputError(f"a task vector is read at one token, but {at!r} selects {stacked.shape[2]}")
        collected.append(stacked.transpose(0, 1))
    about = {
        "model": vlm.name,
        "revision": getattr(vlm.model.config, "_commit_hash", None),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "quantization": str(getattr(vlm.model.config, "quantization_config", None)),
        "site": SITE.format(layer="*"),
        "at": at if isinstance(at, str | int) else repr(at),
        "n_prompts": len(prompts),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "interp": interp.__version__,
    }
    return TaskVectors(torch.cat(collected), {**about, **metadata})


def from_examples(
    vlm: VLM,
    task: Task,
    modality: Modality,
    *,
    n_shots: int = 5,
    seed: int = 1,
    method: str | ReadAt = "xtv",
    template: Template | None = None,
    shuffle_labels: bool = False,
    batch_size: int = 16,
) -> TaskVectors:
    """Task vectors of examples drawn from a task's validation items, one prompt per item.

    Args:
        vlm: the model.
        task: the task.
        modality: of the examples, ``"text"`` or ``"image"``.
        n_shots: examples per prompt; by the ``xtv`` reading the answer of the last one is not seen.
        seed: of the draws.
        method: where to read (`prompts.READ_AT`).
        template: instead of the method's own.
        shuffle_labels: give the examples each other's answers; a control.
        batch_size: prompts per forward.

    Raises:
        InputError: fewer items than shots.

    Source: Luo et al. 2025, sections 3 and 4; official code (30 prompts of 5 examples, mean over prompts).
    """
    draws = draw_exemplars(task, n_shots, seed=seed, split="validation")
    if shuffle_labels:
        generator = torch.Generator().manual_seed(seed)
        draws = [_shuffled(draw, int(torch.randint(2**31, (), generator=generator))) for draw in draws]
    prompts, at = specification_prompts(draws, modality, method=method, template=template)
    preset = READ_AT[method] if isinstance(method, str) else method
    written = template or preset.template
    return read(
        vlm,
        prompts,
        at,
        batch_size=batch_size,
        task=task.name,
        specification="shuffled " + modality if shuffle_labels else modality,
        method=preset.name,
        template=[written.before_input, written.before_output, written.before_answer, written.after_output],
        n_shots=n_shots,
        seed=seed,
        items=[[item.id or item.input for item in draw.exemplars] for draw in draws],
    )


def _shuffled(draw: Draw, seed: int) -> Draw:
    outputs = {item.output for item in draw.exemplars}
    # Examples that all have one answer cannot be shuffled; they carry no mapping to break.
    return draw if len(outputs) < 2 else Draw(draw.query, shuffled_labels(draw.exemplars, seed=seed))


def from_instruction(vlm: VLM, task: Task) -> TaskVectors:
    """The task vector of a task's instruction: one prompt, read at its last token.

    Raises:
        InputError: the task has no instruction.
    """
    prompt = instruction_prompt(task)
    return read(vlm, [prompt], "last", task=task.name, specification="instruction", instruction=task.instruction)


def combine(vectors: Sequence[TaskVectors], weights: Sequence[float] | None = None) -> TaskVectors:
    """A weighted sum of mean vectors: an ensemble, or arithmetic such as ``a + b - c``.

    Args:
        vectors: of one shape; each counts as its mean, whatever its number of prompts.
        weights: one per set, any sign. None: equal weights that sum to 1.

    Returns:
        One vector per layer (``n_prompts`` is 1).

    Raises:
        InputError: none given, or another number of weights.
        ShapeError: vectors of different models.
    """
    if not vectors:
        raise InputError("combine() needs at least one set of task vectors")
    weights = [1 / len(vectors)] * len(vectors) if weights is None else list(weights)
    if len(weights) != len(vectors):
        raise InputError(f"{len(vectors)} sets of task vectors but {len(weights)} weights")
    shapes = {(v.n_layers, v.d_model) for v in vectors}
    if len(shapes) > 1:
        raise ShapeError(f"task vectors of different (layers, width) cannot be combined: {sorted(shapes)}")
    total = sum(weight * v.mean for weight, v in zip(weights, vectors, strict=True))
    return TaskVectors(
        total[None],  # type: ignore[index]
        {
            "model": vectors[0].metadata.get("model"),
            "weights": weights,
            "combined": [dict(v.metadata) for v in vectors],
        },
    )


def random_like(vectors: TaskVectors, *, seed: int) -> TaskVectors:
    """Random directions with the norms of given vectors, layer by layer: a control.

    Args:
        vectors: whose mean gives the norms.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors.mean.shape, generator=generator)
    scaled = noise / noise.norm(dim=-1, keepdim=True) * vectors.mean.norm(dim=-1, keepdim=True)
    about = {"model": vectors.metadata.get("model"), "specification": "random", "seed": seed}
    return TaskVectors(scaled[None], {**about, "norms_of": dict(vectors.metadata)})


def similarity(
    a: Sequence[TaskVectors], b: Sequence[TaskVectors], layer: int, *, center: bool = False
) -> Float[Tensor, "a b"]:
    """Cosine similarity of mean vectors at one layer.

    Args:
        a, b: sets of task vectors.
        layer: block, counted from 0.
        center: subtract each side's mean first, which takes away what all tasks of that side share.

    Raises:
        InputError: a layer that does not exist.
    """
    sides = [torch.stack([v.at(layer) for v in side]) for side in (a, b)]
    if center:
        sides = [side - side.mean(dim=0, keepdim=True) for side in sides]
    left, right = (side / side.norm(dim=-1, keepdim=True) for side in sides)
    return left @ right.T
