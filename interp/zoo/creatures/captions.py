"""The captions of scenes."""

from interp.errors import InputError
from interp.zoo.creatures.colours import BACKGROUNDS, COLOURS
from interp.zoo.creatures.scenes import Scene
from interp.zoo.creatures.species import SPECIES

STYLES = (
    "{a_body} {species} with {a_head} head and {legs} legs facing {facing} on {a_background} background",
    "a picture of {a_body} {species} facing {facing} with {legs} legs and {a_head} head on {a_background} background",
    "on {a_background} background a {species} with {a_body} body and {a_head} head and {legs} legs facing {facing}",
)

_FIELD_WORDS = {word for style in STYLES for word in style.split() if "{" not in word}
VOCABULARY = tuple(sorted({"a", "an", "left", "right", *_FIELD_WORDS, *SPECIES, *COLOURS, *BACKGROUNDS}))


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(scene: Scene, style: int = 0) -> str:
    """Say in words what a scene shows.

    Args:
        scene: the scene.
        style: which of the ``STYLES``, from 0; all say the same.

    Returns:
        Words from ``VOCABULARY``, separated by single spaces, without punctuation; for example ``"a red dog with a
        blue head and yellow legs facing left on a pink background"``.

    Raises:
        InputError: there is no such style.
    """
    if not 0 <= style < len(STYLES):
        raise InputError(f"style is {style}; expected 0 to {len(STYLES) - 1}.")
    return STYLES[style].format(
        species=scene.species,
        facing=scene.facing,
        legs=scene.legs,
        a_body=_with_article(scene.body),
        a_head=_with_article(scene.head),
        a_background=_with_article(scene.background),
    )
