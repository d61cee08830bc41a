"""Match the points of many pairs, one after the other, in a way that can be cut off and taken up again."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor

from interp.correspondence.matching import match
from interp.correspondence.pairs import Pair
from interp.correspondence.points import Size, check_size, rescale
from interp.correspondence.scores import Evaluation, PairResult
from interp.errors import InputError, ShapeError
from interp.images import load_image
from interp.progress import progress
from interp.runs import to_plain

# An image as `describe` is given it: from a file, or as the user holds it in memory.
ImageLike = Image.Image | Float[Tensor, "_ _ _"]
Images = Mapping[Any, ImageLike] | Sequence[ImageLike] | Float[Tensor, "_ _ _ _"]


def evaluate(
    describe: Callable[..., Tensor],
    pairs: Sequence[Pair],
    *,
    size: Size | str = (224, 224),
    images: Images | None = None,
    matcher: Callable[..., Num[Tensor, "point 2"]] = match,
    with_category: bool = False,
    file: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    cache: int = 64,
    description: str = "pairs",
) -> Evaluation:
    """Predict the target points of every pair from the descriptors of its two images.

    Args:
        describe: image -> descriptor [channel, height, width] (a leading batch of 1 is allowed). Images come as PIL
            images from files, or as they are held in ``images``.
        pairs: what to match. Points are carried to ``size`` by plain ratio, and the results carried back.
        size: (height, width) to match at, whatever the images' own shapes; ``"original"`` matches each image at its
            own size, as DIFT does.
        images: images by the names or numbers that the pairs use; without it, the pairs' files are read.
        matcher: called as ``matcher(source, target, points, size, target_size=...)``: `match`, `match_patches`,
            or `match_soft`; bind settings with ``functools.partial``.
        with_category: call ``describe(image, category)``, for prompts that name it.
        file: a file of JSON lines, to which every pair is added once it is matched. A run that was cut off goes on
            there, if the pairs and the settings are the same.
        settings: what makes the descriptors what they are (model, checkpoint, ...); kept in the file and compared
            when it is taken up again.
        cache: descriptors that are held at a time; the least recently used one goes first.
        description: the words before the progress bar.

    Returns:
        The predictions; ``.table()`` scores them.

    Raises:
        InputError: no pairs, a point outside its image, an image that is not there, or a file of other settings.
        ShapeError: a descriptor that is no [channel, height, width].

    Source: Diffusion Hyperfeatures, official evaluation (at 224 × 224).
    """
    if not pairs:
        raise InputError("There are no pairs to evaluate.")
    if not isinstance(size, str):
        check_size(size)
    elif size != "original":
        raise InputError(f"size is {size!r}; expected (height, width) or 'original'.")
    if cache < 2:
        raise InputError(f"cache is {cache}; the two images of a pair need at least 2.")
    asked = to_plain({"size": size, "matcher": _name(matcher), "with_category": with_category}, "settings")
    asked |= to_plain(dict(settings or {}), "settings")
    found = _Lines(None if file is None else Path(file), pairs, asked)

    @functools.lru_cache(maxsize=cache)
    def described(key: str | int, path: Path | None, category: str | None) -> tuple[Tensor, Size]:
        image = _image(key, path, images)
        descriptor = describe(image) if category is None else describe(image, category)
        return _checked(descriptor, key), _size(image)

    results = []
    with progress(len(pairs), description) as bar:
        for index, pair in enumerate(pairs):
            result = found.results.get(index)
            if result is None:
                named = pair.category if with_category else None
                source, source_size = described(pair.source, pair.source_file, named)
                target, target_size = described(pair.target, pair.target_file, named)
                own = None if isinstance(size, str) else size
                result = match_pair(pair, source, target, source_size, target_size, own, matcher)
                found.add(index, result)
            results.append(result)
            bar.update(1)
    return Evaluation(tuple(results), asked)


def match_pair(
    pair: Pair,
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    source_size: Size,
    target_size: Size,
    size: Size | None = None,
    matcher: Callable[..., Num[Tensor, "point 2"]] = match,
) -> PairResult:
    """Predict the target points of one pair.

    Args:
        pair: the pair.
        source, target: descriptors of its images.
        source_size, target_size: (height, width) of the images.
        size: to match at; None: the images' own sizes.
        matcher: as for `evaluate`.

    Raises:
        InputError: a point outside its image; also as the matcher.
    """
    pair.check(source_size, target_size)
    at, to = (source_size, target_size) if size is None else (size, size)
    points = rescale(pair.source_points, source_size, at)
    predicted = matcher(source, target, points, at, target_size=to).cpu()
    return PairResult(pair, predicted.double(), to, target_size)


class _Lines:
    """The file of results: a header with what was asked, then a line for each pair."""

    def __init__(self, path: Path | None, pairs: Sequence[Pair], settings: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[int, PairResult] = {}
        header = {"settings": settings, "pairs": len(pairs), "fingerprint": fingerprint(pairs)}
        if path is None:
            return
        lines = self._complete_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        for key, value in header.items():
            if lines[0].get(key) != value:
                raise InputError(
                    f"{str(path)!r} holds results of another evaluation: its {key} is {lines[0].get(key)!r}, and now "
                    f"{value!r}. Give another file."
                )
        for line in lines[1:]:
            predicted = torch.tensor(line["predicted"], dtype=torch.float64)
            sizes = tuple(line["size"]), tuple(line["image_size"])
            self.results[line["pair"]] = PairResult(pairs[line["pair"]], predicted, *sizes)

    def add(self, index: int, result: PairResult) -> None:
        """Add one pair; with its end of line it counts as complete."""
        if self.path is None:
            return
        pair = result.pair
        line = {"pair": index, "source": pair.source, "target": pair.target, "category": pair.category,
                "predicted": result.predicted.tolist(), "size": result.size,
                "image_size": result.image_size}  # fmt: skip
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")

    @staticmethod
    def _complete_lines(path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        written = path.read_bytes()
        # A run that is cut off leaves half a line, which must not run into the next one.
        complete = written[: written.rfind(b"\n") + 1]
        if complete != written:
            path.write_bytes(complete)
        try:
            return [json.loads(line) for line in complete.decode().splitlines()]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{str(path)!r} is no file of results: {error}. Give another file.") from error


def fingerprint(pairs: Sequence[Pair]) -> str:
    """What tells a list of pairs from any other: images, categories, all coordinates, and their order."""
    return hashlib.sha256(json.dumps([pair.key for pair in pairs]).encode()).hexdigest()


def _image(key: str | int, path: Path | None, images: Images | None) -> ImageLike:
    if images is None:
        if path is None:
            raise InputError(f"Image {key!r} has no file: read the pairs with images=..., or give images here.")
        return load_image(path)
    held: Any = images
    try:
        return held[key]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"There is no image {key!r} among the {len(images)} that were given.") from error


def _size(image: ImageLike) -> Size:
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def _checked(descriptor: Tensor, key: str | int) -> Float[Tensor, "channel height width"]:
    if descriptor.ndim == 4 and len(descriptor) == 1:
        descriptor = descriptor[0]
    if descriptor.ndim != 3:
        raise ShapeError(
            f"The descriptor of image {key!r} must be [channel, height, width]; it is {list(descriptor.shape)}."
        )
    return descriptor.detach()


def _name(matcher: Callable[..., Any]) -> str:
    if isinstance(matcher, functools.partial):
        bound = [*map(repr, matcher.args), *(f"{key}={value!r}" for key, value in matcher.keywords.items())]
        return f"{_name(matcher.func)}({', '.join(bound)})"
    return getattr(matcher, "__name__", type(matcher).__name__)
