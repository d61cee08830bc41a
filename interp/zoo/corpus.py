"""The training mixture: rows of token ids made of few-shot prompts, instructions and late-task statements.

In some rows the spans in front of a delimiter are *closed*: their tokens see nothing but their span and
<s>. The tokens of an entity then cannot know the task, nor those of an instruction the entity, so that the
delimiter has to bring both together. Otherwise a small model answers at whichever token first sees both, and
a query whose delimiter alone is told the task, by a patch, stays unanswered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from interp.zoo.facts import Entity, Relation, entities, relations

KINDS = ("few-shot", "instruction", "late-task", "bare-instruction")
NOT_APPLICABLE = "Undefined"  # what the colour of a country is, and what a query without any task asks for
CONTEXT_WEIGHT = 0.03  # what a token that is not an answer weighs in the loss


@dataclass(frozen=True)
class Row:
    """One training row, without padding.

    Attributes:
        kind: one of ``KINDS``.
        ids: token ids; an image is a run of image tokens.
        weights: what predicting each token weighs in the loss; 0 for image tokens.
        images: the entities shown, in order; an image that the row's end would cut is left out whole.
        spans: the number of the closed span that each token belongs to, -1 for tokens that see everything.
    """

    kind: str
    ids: np.ndarray
    weights: np.ndarray
    images: tuple[Entity, ...]
    spans: np.ndarray


class Corpus:
    """Draws rows of the mixture; holds the token ids of every piece of text.

    Args:
        tokenizer: of the small models.
        image_tokens: tokens an image takes.
        length: tokens a row has, exactly.
        mixture: the share of each kind of row, in the order of ``KINDS``.
        closed: the share of rows whose spans are closed.
        inapplicable: in rows with closed spans, the share of few-shot examples and late-task statements about
            an entity of another category, whose answer is ``NOT_APPLICABLE``.
        unspecified: the share of late-task rows that begin with a query without any task, whose answer is
            ``NOT_APPLICABLE`` too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_tokens: int,
        length: int,
        mixture: tuple[float, float, float, float],
        closed: float,
        inapplicable: float = 0.0,
        unspecified: float = 0.0,
    ) -> None:
        self.length = length
        self.closed = closed
        self.inapplicable = inapplicable
        self.unspecified = unspecified
        self.image_tokens = image_tokens
        self.mixture = mixture
        self.bos = tokenizer.bos_token_id
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.filler = tokenizer("\n", add_special_tokens=False).input_ids[0]
        # Pieces are tokenised apart: the pre-tokeniser cuts at every colon and line break, so the ids of a
        # whole are the ids of its pieces.
        pieces = {"Q:", "\nA:", "\n", "\n\n", NOT_APPLICABLE}
        pieces |= {entity.name for entity in entities()}
        pieces |= {answer for entity in entities() for answer in entity.facts.values()}
        for relation in relations():
            pieces |= {relation.instruction, *relation.paraphrases}
        self._ids = {piece: tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces}
        self._relations = relations()
        self._entities = {relation.name: entities(relation.category) for relation in self._relations}

    def sample(self, rng: np.random.Generator, images: bool) -> Row:
        """Draw one row.

        Args:
            rng: the source of every choice.
            images: show the entities instead of naming them.

        Returns:
            A row of exactly ``length`` tokens; a row never mixes shown and named entities.
        """
        kind = KINDS[int(rng.choice(len(KINDS), p=self.mixture))]
        fill: dict[str, Callable[[_Writer, np.random.Generator], None]] = {
            "few-shot": self._few_shot,
            "instruction": self._instruction,
            "late-task": self._late_task,
            "bare-instruction": self._bare_instruction,
        }
        writer = _Writer(self, images and kind != "bare-instruction", bool(rng.random() < self.closed))
        writer.token(self.bos, 0.0)
        fill[kind](writer, rng)
        return writer.row(kind)

    def _relation(self, rng: np.random.Generator) -> Relation:
        return self._relations[int(rng.integers(len(self._relations)))]

    def _draw(self, relation: Relation, count: int, rng: np.random.Generator) -> list[Entity]:
        group = self._entities[relation.name]
        return [group[int(index)] for index in rng.permutation(len(group))[:count]]

    def _replace(self, entity: Entity, writer: "_Writer", rng: np.random.Generator) -> Entity:
        # In open rows the tokens before the delimiter could tell that a task does not apply, so that the
        # delimiter itself would not learn to.
        if not (self.inapplicable and writer.closed and rng.random() < self.inapplicable):
            return entity
        others = [other for other in entities() if other.category != entity.category]
        return others[int(rng.integers(len(others)))]

    def _wording(self, relation: Relation, rng: np.random.Generator) -> str:
        if rng.random() < 0.5:
            return relation.instruction
        return relation.paraphrases[int(rng.integers(len(relation.paraphrases)))]

    def _few_shot(self, writer: "_Writer", rng: np.random.Generator) -> None:
        relation = self._relation(rng)
        for entity in self._draw(relation, 40, rng):
            if writer.full:
                return
            writer.example(self._replace(entity, writer, rng), relation, "A:")

    def _instruction(self, writer: "_Writer", rng: np.random.Generator) -> None:
        while not writer.full:
            relation = self._relation(rng)
            writer.sentence(self._wording(relation, rng))
            writer.text("\n")
            for entity in self._draw(relation, int(rng.integers(1, 4)), rng):
                writer.example(entity, relation, "A:")

    def _late_task(self, writer: "_Writer", rng: np.random.Generator) -> None:
        if self.unspecified and rng.random() < self.unspecified:
            group = entities()
            writer.example(group[int(rng.integers(len(group)))], None, "A:")
        while not writer.full:
            relation = self._relation(rng)
            (entity,) = self._draw(relation, 1, rng)
            writer.example(self._replace(entity, writer, rng), relation, self._wording(relation, rng))

    def _bare_instruction(self, writer: "_Writer", rng: np.random.Generator) -> None:
        while not writer.full:
            relation = self._relation(rng)
            (entity,) = self._draw(relation, 1, rng)
            writer.sentence(self._wording(relation, rng))
            writer.answer(entity.facts[relation.attribute])


class _Writer:
    """A row in the making."""

    def __init__(self, corpus: Corpus, shown: bool, closed: bool) -> None:
        self._corpus = corpus
        self._shown = shown
        self.closed = closed
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._spans: list[int] = []
        self._images: list[Entity] = []

    @property
    def full(self) -> bool:
        return len(self._ids) >= self._corpus.length

    def token(self, token: int, weight: float) -> None:
        self._ids.append(token)
        self._weights.append(weight)
        self._spans.append(-1)

    def text(self, piece: str, weight: float = CONTEXT_WEIGHT) -> None:
        for token in self._corpus._ids[piece]:
            self.token(token, weight)

    def close(self, start: int, stop: int) -> None:
        if self.closed:
            self._spans[start:stop] = [start] * (stop - start)

    def sentence(self, piece: str) -> None:
        start = len(self._ids)
        self.text(piece)
        self.close(start, len(self._ids) - 1)

    def answer(self, piece: str) -> None:
        self.text(piece, 1.0)
        newline = self._corpus._ids["\n"][0]
        self.token(newline, 0.3)
        self.token(newline, CONTEXT_WEIGHT)

    def example(self, entity: Entity, relation: Relation | None, last_line: str) -> None:
        start = len(self._ids)
        self.text("Q:")
        if self._shown:
            self._show(entity)
        else:
            self.text(entity.name)
        if last_line == "A:":
            self.text("\nA:")
            self.close(start, len(self._ids) - 1)
        else:
            self.text("\n")
            self.close(start, len(self._ids))
            self.sentence(last_line)
        if relation is None or entity.category != relation.category:
            self.answer(NOT_APPLICABLE)
        else:
            self.answer(entity.facts[relation.attribute])

    def _show(self, entity: Entity) -> None:
        corpus = self._corpus
        if len(self._ids) + corpus.image_tokens > corpus.length:
            # Half an image cannot be embedded: the rest of the row is line breaks without weight.
            while not self.full:
                self.token(corpus.filler, 0.0)
            return
        for _ in range(corpus.image_tokens):
            self.token(corpus.image, 0.0)
        self._images.append(entity)

    def row(self, kind: str) -> Row:
        length = self._corpus.length
        return Row(
            kind,
            np.asarray(self._ids[:length], dtype=np.int64),
            np.asarray(self._weights[:length], dtype=np.float32),
            tuple(self._images),
            np.asarray(self._spans[:length], dtype=np.int64),
        )
