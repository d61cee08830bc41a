"""Prompts as named segments of text and images, so that positions can be found by meaning."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from interp.errors import InputError
from interp.images import ImageLike

IMAGE_PLACEHOLDER = "<image>"
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Segment:
    """A named piece of a prompt: either text or one image.

    Args:
        name: what the piece is ("input", "delimiter", "output", "image", ...). Segments that share a name
            are told apart by their order: ``delimiter[0]``, ``delimiter[1]``.
        text: the characters of a text segment.
        image: the image of an image segment: a PIL image or a path.
        alias: a second name under which positions find it; an image that is an example's input has the
            name "image" and the alias "input".

    Raises:
        InputError: neither or both of text and image, or a name that is no identifier or is reserved.
    """

    name: str
    text: str | None = None
    image: ImageLike | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise InputError(f"Segment {self.name!r} needs exactly one of text and image.")
        for name in filter(None, (self.name, self.alias)):
            if not _NAME.fullmatch(name) or name == "last":
                raise InputError(
                    f"{name!r} cannot name a segment: use letters, digits and '_', not starting with a "
                    "digit, and not 'last', which is the last token of the prompt."
                )

    @property
    def labels(self) -> tuple[str, ...]:
        """The name, then the alias if there is one."""
        return (self.name,) if self.alias in (None, self.name) else (self.name, str(self.alias))


@dataclass(frozen=True)
class Prompt:
    """A prompt: segments of text and images, in order. ``+`` joins two."""

    segments: tuple[Segment, ...]

    def __add__(self, other: "Prompt") -> "Prompt":
        """Put another prompt after this one; its occurrences count on."""
        return Prompt(self.segments + other.segments) if isinstance(other, Prompt) else NotImplemented

    @property
    def text(self) -> str:
        """The whole text, each image written as ``<image>``."""
        return "".join(IMAGE_PLACEHOLDER if s.text is None else s.text for s in self.segments)

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The images, in order."""
        return tuple(s.image for s in self.segments if s.image is not None)

    def names(self) -> tuple[str, ...]:
        """Every position name that this prompt offers: ``"input[0]"``, ..., then ``"last"``."""
        counts: dict[str, int] = {}
        found = []
        for segment in self.segments:
            for label in segment.labels:
                found.append(f"{label}[{counts.get(label, 0)}]")
                counts[label] = counts.get(label, 0) + 1
        return (*found, "last")

    @classmethod
    def from_text(
        cls, text: str, images: Sequence[ImageLike] = (), *, image_token: str = IMAGE_PLACEHOLDER
    ) -> "Prompt":
        """Make a prompt of a plain text whose placeholders stand for images.

        Args:
            text: the text; every ``image_token`` in it takes the next image.
            images: as many images as there are placeholders.
            image_token: the placeholder.

        Returns:
            A prompt of segments named "text" and "image".

        Raises:
            InputError: the numbers of placeholders and images differ.
        """
        pieces = text.split(image_token)
        if len(pieces) - 1 != len(images):
            fewer = "more images than placeholders" if len(images) >= len(pieces) else "images are missing"
            raise InputError(
                f"The text has {len(pieces) - 1} image placeholder(s) {image_token!r} but {len(images)} "
                f"image(s) came with it: {fewer}. Text: {shorten(text)!r}"
            )
        segments = []
        for index, piece in enumerate(pieces):
            if index:
                segments.append(Segment("image", image=images[index - 1]))
            if piece:
                segments.append(Segment("text", text=piece))
        return cls(tuple(segments))


@dataclass(frozen=True)
class Template:
    """How one example is written: ``before_input x before_output before_answer y after_output``.

    Args:
        before_input: what precedes the input.
        before_output: what precedes the answer. Its last character is the delimiter, where task vectors are
            read; a query ends with it.
        after_output: what ends an example.
        before_answer: space between the delimiter and an answer, written only where an answer follows.

    Raises:
        InputError: ``before_output`` is empty or ends in white space, which many tokenizers give no token.
    """

    before_input: str
    before_output: str
    after_output: str
    before_answer: str = ""

    def __post_init__(self) -> None:
        if self.before_output.rstrip() != self.before_output or not self.before_output:
            raise InputError(
                "The text before an answer must end in the delimiter, not in white space: "
                f"{self.before_output!r}. Put the space into before_answer."
            )

    def question(self, x: str | ImageLike) -> Prompt:
        """The part of an example up to and including the delimiter."""
        return Prompt(
            (
                *_fixed("prefix", self.before_input),
                _input_segment(x),
                *_fixed("joint", self.before_output[:-1]),
                Segment("delimiter", text=self.before_output[-1]),
            )
        )

    def answer(self, y: str) -> Prompt:
        """The part of an example after the delimiter."""
        if not isinstance(y, str) or not y.strip():
            raise InputError(f"An example's output must be a text that is not empty, not {y!r}.")
        return Prompt(
            (
                *_fixed("gap", self.before_answer),
                Segment("output", text=y),
                *_fixed("separator", self.after_output),
            )
        )


XTV = Template("Q:", "\nA:", "\n\n")
ICL_TV = Template("example:", "->", "\n")
FV = Template("Q: ", "\nA:", "\n\n", before_answer=" ")


def few_shot(
    examples: Sequence[tuple[str | ImageLike, str]],
    query: str | ImageLike | None = None,
    *,
    template: Template = XTV,
) -> Prompt:
    """Write examples, and then a query if one is given.

    Example k has the segments ``input[k]`` (an image is named "image" and found as "input" too),
    ``delimiter[k]`` (one character, hence one token) and ``output[k]``; the query of n examples has
    ``input[n]`` and ``delimiter[n]``, its last token.

    Args:
        examples: (input, output) pairs; an input is a text (str) or an image (PIL image or Path).
        query: a text or an image. None: the prompt ends after the last example.
        template: how an example is written.

    Returns:
        The prompt.

    Raises:
        InputError: no examples and no query, or an empty input or output.

    Source: Luo, Darrell & Bar 2025, official code (templates).
    """
    if not examples and query is None:
        raise InputError("A few-shot prompt needs at least one example or a query.")
    prompt = Prompt(())
    for x, y in examples:
        prompt = prompt + template.question(x) + template.answer(y)
    return prompt if query is None else prompt + template.question(query)


def query(x: str | ImageLike, *, question: str | None = None, template: Template = XTV) -> Prompt:
    """Write a query alone: an input without any information about the task.

    Args:
        x: a text (str) or an image (PIL image or Path).
        question: a question right after the input, as in the paper's task-conflict queries
            (``Q:<image>{question}\\nA:``).
        template: how an example is written.

    Returns:
        A prompt that ends in its ``delimiter[0]``.
    """
    prompt = template.question(x)
    if question is None:
        return prompt
    after = 1 + next(i for i, segment in enumerate(prompt.segments) if "input" in segment.labels)
    asked = (Segment("question", text=question),)
    return Prompt(prompt.segments[:after] + asked + prompt.segments[after:])


def instruction(text: str) -> Prompt:
    """Write an instruction as a specification of its own: the bare sentence.

    Args:
        text: the sentence; in the papers it ends in a colon.

    Returns:
        A prompt of a segment "instruction" and, when the text ends in a colon, that colon as "delimiter".

    Raises:
        InputError: the text is empty.
    """
    if not text.strip():
        raise InputError("An instruction must not be empty.")
    body, colon = (text[:-1], text[-1]) if text.endswith(":") else (text, "")
    return Prompt((*_fixed("instruction", body), *_fixed("delimiter", colon)))


@dataclass(frozen=True)
class ReadAt:
    """Where a method reads its task vector, and how the prompt is built for that.

    Args:
        name: the method.
        template: how its paper writes examples.
        after_query: read at the delimiter of a query after the examples (True), or at the delimiter of the
            last example, which has seen that example's input but not its answer (False).
    """

    name: str
    template: Template
    after_query: bool

    def position(self, n_shots: int) -> str:
        """The name of the position read in a prompt of ``n_shots`` examples."""
        if n_shots < 1:
            raise InputError(f"A task vector needs at least 1 example, not {n_shots}.")
        return f"delimiter[{n_shots if self.after_query else n_shots - 1}]"

    def build(
        self,
        examples: Sequence[tuple[str | ImageLike, str]],
        query: str | ImageLike | None = None,
        template: Template | None = None,
    ) -> tuple[Prompt, str]:
        """Write the prompt of one set of examples, and say where to read.

        Args:
            examples: (input, output) pairs.
            query: the query or dummy query after the examples. Where the vector is read before it ("xtv") it
                may be left out: the prompt is then cut right after the position read, which by causality
                gives the same vector for less work (as long as the tokenizer does not merge the delimiter
                with the answer behind it).
            template: instead of the method's own.

        Returns:
            The prompt, and the name of the position to read.

        Raises:
            InputError: no examples, or no query where the vector is read at its delimiter.
        """
        template = self.template if template is None else template
        at = self.position(len(examples))
        if query is not None:
            return few_shot(examples, query, template=template), at
        if self.after_query:
            raise InputError(f"{self.name!r} reads at the delimiter of a query after the examples: give a query.")
        return few_shot(examples[:-1], examples[-1][0], template=template), at


READ_AT: Mapping[str, ReadAt] = MappingProxyType(
    {
        "xtv": ReadAt("xtv", XTV, after_query=False),
        "icl_tv": ReadAt("icl_tv", ICL_TV, after_query=True),
        "fv": ReadAt("fv", FV, after_query=True),
    }
)


def shorten(text: str, limit: int = 60) -> str:
    """Cut a text for an error message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fixed(name: str, text: str) -> tuple[Segment, ...]:
    return (Segment(name, text=text),) if text else ()


def _input_segment(x: str | ImageLike) -> Segment:
    if isinstance(x, str):
        if not x:
            raise InputError("An example's input must not be empty.")
        return Segment("input", text=x)
    if isinstance(x, Image.Image | Path):
        return Segment("image", image=x, alias="input")
    raise InputError(f"An example's input is a text (str) or an image (PIL image or Path), not {type(x).__name__}.")
