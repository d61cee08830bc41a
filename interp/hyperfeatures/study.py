"""Methods of semantic correspondence side by side: one set of pairs, one way to match, every descriptor."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.correspondence import Evaluation, Pair, PairResult, match_pair, pck_interval
from interp.correspondence.evaluate import fingerprint
from interp.correspondence.points import Size
from interp.errors import InputError, ShapeError
from interp.hyperfeatures.baselines import single
from interp.hyperfeatures.features import joined, layer_maps
from interp.hyperfeatures.fitting import Training
from interp.hyperfeatures.images import prepare
from interp.hyperfeatures.loss import scale_points
from interp.hyperfeatures.network import AggregationNetwork
from interp.hyperfeatures.spec import GENERATION, FeatureSpec
from interp.hyperfeatures.training import Pair as TrainingPair
from interp.hyperfeatures.training import train
from interp.images import load_image
from interp.models.diffusion import Diffusion
from interp.progress import progress, track

Describe = Callable[[Hashable], Float[Tensor, "channel height width"]]


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs to train on, to choose by, and to report, with their images.

    Attributes:
        images: by the names that the pairs use: tensors 0 to 1, or files.
        train, validation, test: the pairs.
        held_out: categories of the test pairs that no training or validation pair has.
        familiar: pairs of other pictures of the categories that are trained on, reported apart.

    Raises:
        InputError: a pair's image is missing, or a training, validation or familiar pair is of a held-out category.
    """

    images: Mapping[Hashable, Float[Tensor, "3 height width"] | Path]
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    held_out: tuple[str, ...] = ()
    familiar: tuple[Pair, ...] = ()
    _sizes: dict[Hashable, Size] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for pair in self.every:
            for key in (pair.source, pair.target):
                if key not in self.images:
                    raise InputError(f"{pair} needs the image {key!r}, which is not among the {len(self.images)} given")
        for pair in (*self.train, *self.validation, *self.familiar):
            if pair.category in self.held_out:
                raise InputError(f"{pair} is of a held-out category")

    @property
    def every(self) -> tuple[Pair, ...]:
        """All pairs."""
        return (*self.train, *self.validation, *self.test, *self.familiar)

    def size(self, key: Hashable) -> Size:
        """(height, width) of an image; a file is read once.

        Raises:
            InputError: the file cannot be read.
        """
        if key not in self._sizes:
            image = self.images[key]
            if isinstance(image, Tensor):
                self._sizes[key] = int(image.shape[-2]), int(image.shape[-1])
            else:
                opened = load_image(image)
                self._sizes[key] = opened.height, opened.width
        return self._sizes[key]


@dataclass(frozen=True)
class Recipe:
    """How an aggregation network is trained here.

    Attributes:
        dim, width, n_groups: of the network.
        steps: of the optimizer, one pair each.
        lr: learning rate.
        mixing_lr: learning rate of the mixing weights; None: ``lr``.
        validate_every: steps between two validations.
        patience: validations without a new best before the training stops.

    Source: Diffusion Hyperfeatures, section 4.1 and official configuration (the defaults).
    """

    dim: int = 384
    width: int = 96
    n_groups: int = 32
    steps: int = 5000
    lr: float = 1e-3
    mixing_lr: float | None = None
    validate_every: int = 1000
    patience: int | None = None


class Stacks:
    """Feature maps by image, computed in batches, held in half precision, the least recently used dropped first.

    Maps are held in the sizes that the model makes them, and resized when they are asked for as a stack.

    Args:
        sd: the model.
        spec: which maps.
        images: by name; tensors 0 to 1, or files. For generation: the noise to start from.
        hold: how many stacks are held at a time; None: all.
        batch: images a run.

    Attributes:
        clean: for generation, the latents that the images came to, by name.

    Raises:
        UnknownNameError: the model lacks a site.
    """

    def __init__(
        self,
        sd: Diffusion,
        spec: FeatureSpec,
        images: Mapping[Hashable, Any],
        *,
        hold: int | None = None,
        batch: int = 32,
    ) -> None:
        self.sd, self.spec, self.images, self.hold, self.batch = sd, spec, images, hold, batch
        self.channels = sd.channels(list(spec.sites))
        self.clean: dict[Hashable, Tensor] = {}
        self._held: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def prepare(self, pairs: Iterable[Pair], description: str = "features") -> None:
        """Compute the stacks of all images of some pairs, as many as may be held."""
        wanted = dict.fromkeys(key for pair in pairs for key in (pair.source, pair.target))
        missing = [key for key in wanted if key not in self._held]
        if self.hold is not None and len(wanted) > self.hold:
            return
        chunks = [missing[k : k + self.batch] for k in range(0, len(missing), self.batch)]
        for chunk in track(chunks, description, len(chunks)):
            self._add(chunk)

    def layers(self, key: Hashable) -> tuple[Float[Tensor, "step _ _ _"], ...]:
        """The maps of one image by layer, clean step first, in sizes of their own."""
        if key not in self._held:
            self._add([key])
        self._held.move_to_end(key)
        return self._held[key]

    def __getitem__(self, key: Hashable) -> Float[Tensor, "step channels height width"]:
        """The stack of one image, clean step first."""
        return joined([maps[None] for maps in self.layers(key)], self.spec.output_size)[0]

    def at(self, key: Hashable, step: int, layer: int | None = None) -> Float[Tensor, "channels height width"]:
        """The maps of one image at one step, of one layer or of all, one after another.

        Args:
            key: of the image.
            step: of the stack.
            layer: which; None: all.
        """
        layers = self.layers(key)
        chosen = layers if layer is None else layers[layer : layer + 1]
        return joined([maps[None, step : step + 1] for maps in chosen], self.spec.output_size)[0, 0]

    @property
    def grid(self) -> Size:
        """(height, width) of the stacks."""
        if self.spec.output_size is not None:
            return self.spec.output_size
        height, width = next(iter(self._held.values()))[0].shape[-2:]
        return int(height), int(width)

    def _add(self, keys: Sequence[Hashable]) -> None:
        if self.spec.mode == GENERATION:
            given: Any = torch.stack([torch.as_tensor(self.images[key]) for key in keys])
        else:
            given = gathered(self.images, keys)
        found, clean = layer_maps(self.sd, given, self.spec, dtype=torch.float16, progress=False)
        if self.spec.mode == GENERATION:
            self.clean.update(zip(keys, clean, strict=True))
        lasting = self.hold is None or len(keys) == 1
        for row, key in enumerate(keys):
            # A view would keep the maps of its whole batch in memory after these are dropped.
            self._held[key] = tuple(maps[row] if lasting else maps[row].clone() for maps in found)
        while self.hold is not None and len(self._held) > self.hold:
            self._held.popitem(last=False)


def gathered(images: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> Any:
    """Images as a diffusion model takes them: one tensor -1 to 1, or Pillow images read from files."""
    listed = [images[key] for key in keys]
    if isinstance(listed[0], Tensor):
        return torch.stack(listed) * 2 - 1
    return [load_image(image) for image in listed]


def score(describe: Describe, split: Split, pairs: Sequence[Pair], size: Size | None = None) -> Evaluation:
    """Match the points of pairs by any descriptor.

    Args:
        describe: image name -> descriptor map.
        split: knows the images' sizes.
        pairs: which pairs.
        size: (height, width) to match at, such as (224, 224); None: the images' own sizes.

    Returns:
        The predictions, to be scored or compared.

    Raises:
        InputError: a point outside its image; also as `interp.correspondence.match`.

    Source: Diffusion Hyperfeatures, official evaluation.
    """
    return score_many(lambda key: {"": describe(key)}, split, pairs, size)[""]


def score_many(
    describe: Callable[[Hashable], Mapping[Any, Float[Tensor, "channel height width"]]],
    split: Split,
    pairs: Sequence[Pair],
    size: Size | None = None,
    description: str = "matching",
) -> dict[Any, Evaluation]:
    """Match the points of pairs by several descriptors of the same images.

    Args:
        describe: image name -> descriptor maps by method.
        split, pairs, size: as for `score`.
        description: the words before the progress bar.

    Returns:
        One evaluation for each method.

    Raises:
        InputError: as `score`.
    """
    results: dict[Any, list[PairResult]] = {}
    with progress(len(pairs), description) as bar:
        for pair in pairs:
            sizes = split.size(pair.source), split.size(pair.target)
            sources, targets = describe(pair.source), describe(pair.target)
            for method, source in sources.items():
                found = match_pair(pair, source.float(), targets[method].float(), *sizes, size)
                results.setdefault(method, []).append(found)
            bar.update(1)
    return {method: Evaluation(tuple(listed)) for method, listed in results.items()}


def cells(stacks: Stacks, key: Hashable) -> dict[tuple[int, int], Float[Tensor, "channel height width"]]:
    """Every single (step, layer) of an image's stack as a descriptor."""
    whole = stacks[key][None]
    return {
        (step, layer): single(whole, stacks.channels, layer, step)[0]
        for step in range(stacks.spec.n_steps)
        for layer in range(len(stacks.channels))
    }


def best(evaluations: Mapping[Any, Evaluation], base: str = "bbox") -> Any:
    """The method with the highest PCK@0.1; the first of equals."""
    return max(evaluations, key=lambda method: pck_interval(evaluations[method], base=base, n_resamples=1).mean)


def fit(
    stacks: Stacks,
    split: Split,
    recipe: Recipe,
    seed: int,
    *,
    base: str = "bbox",
    size: Size | None = None,
    folder: str | Path | None = None,
) -> tuple[AggregationNetwork, Training]:
    """Train an aggregation network on the training pairs, stopped by the PCK@0.1 of the validation pairs.

    Args:
        stacks: of the images.
        split: the pairs.
        recipe: how.
        seed: of the weights and of the order of the pairs.
        base: of the validation PCK.
        size: (height, width) to match at in validation; None: the images' own sizes.
        folder: keeps the state, and goes on from the state found there.

    Returns:
        The network with its best weights, and how the training went.

    Raises:
        InputError: a point outside its image, or a folder of a training on another model, features or pairs; also as
            `interp.hyperfeatures.train`.

    Source: Diffusion Hyperfeatures, section 4.1.
    """
    spec = stacks.spec
    net = AggregationNetwork(
        stacks.channels,
        spec.n_steps,
        recipe.dim,
        recipe.width,
        n_groups=recipe.n_groups,
        sites=spec.sites,
        timesteps=spec.timesteps or None,
        seed=seed,
    ).to(stacks.sd.device)

    def source(index: int) -> TrainingPair:
        pair = split.train[index]
        pair.check(split.size(pair.source), split.size(pair.target))
        first, second = stacks.layers(pair.source), stacks.layers(pair.target)
        points = [
            scale_points(points.float(), split.size(key), stacks.grid)
            for points, key in ((pair.source_points, pair.source), (pair.target_points, pair.target))
        ]
        return TrainingPair(first, second, *points)

    def describe(net: AggregationNetwork, features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return list(net(_batched(features, net.mixing_weights.device), spec.output_size).unbind(0))

    def validate(net: AggregationNetwork) -> float:
        found = score(aggregated(net, stacks), split, split.validation, size)
        return pck_interval(found, base=base, n_resamples=1).mean

    settings = {"model": stacks.sd.name, "base": base, "size": size}
    settings |= {"training pairs": fingerprint(split.train), "validation pairs": fingerprint(split.validation)}
    settings |= {f"features, {name}": value for name, value in spec.to_json().items()}
    trained = train(
        net,
        source,
        len(split.train),
        steps=recipe.steps,
        lr=recipe.lr,
        mixing_lr=recipe.mixing_lr,
        describe=describe,
        validate=validate if split.validation else None,
        validate_every=recipe.validate_every,
        patience=recipe.patience,
        seed=seed,
        folder=folder,
        settings=settings,
    )
    return net, trained


def aggregated(net: AggregationNetwork, stacks: Stacks) -> Describe:
    """Descriptors by a network, remembered for the images of one evaluation: as many as stacks are held."""

    @lru_cache(maxsize=stacks.hold)
    def describe(key: Hashable) -> Tensor:
        with torch.no_grad():
            return net(_batched([stacks.layers(key)], net.mixing_weights.device), stacks.spec.output_size)[0]

    return describe


def _batched(images: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Maps by layer of several images: from one list for each image to one tensor for each layer.

    Raises:
        ShapeError: images of several sizes.
    """
    for maps in zip(*images, strict=True):
        if len({one.shape for one in maps}) > 1:
            raise ShapeError(
                f"maps of {[list(one.shape) for one in maps]} in one batch: the images have several sizes, give the "
                "spec an image_size"
            )
    return [torch.stack(maps).to(device) for maps in zip(*images, strict=True)]


def patches(images: Mapping[Hashable, Any], side: int = 9, size: Size | None = None) -> Describe:
    """The colours around each pixel as its descriptor: what can be matched without any model.

    Args:
        images: by name; tensors 0 to 1, or files.
        side: pixels a side of the patch, odd.
        size: (height, width) that images are resized to first; None: not at all.
    """

    def describe(key: Hashable) -> Tensor:
        image = prepare(gathered(images, [key]), size)
        columns = torch.nn.functional.unfold(image, side, padding=side // 2)
        return rearrange(columns, "1 channel (h w) -> channel h w", h=image.shape[-2])

    return describe
