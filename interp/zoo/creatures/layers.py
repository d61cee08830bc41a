"""What is painted over what: the parts of a creature, the shapes that make them up, and their order."""

from dataclasses import dataclass

from interp.zoo.creatures.species import KEYPOINTS

# In the order of depth, farthest first; a part's label is its index.
PARTS = (
    "background",
    "far_back_leg",
    "far_front_leg",
    "far_wing",
    "crest",
    "tail",
    "body",
    "neck",
    "horn",
    "near_back_leg",
    "near_front_leg",
    "near_wing",
    "snout",
    "head",
    "ear",
    "eye",
)


@dataclass(frozen=True)
class Shape:
    """One drawn shape.

    Attributes:
        name: by which the skeleton places it.
        part: what it belongs to.
        triangle: whether it is a triangle rather than a capsule.
    """

    name: str
    part: str
    triangle: bool = False


@dataclass(frozen=True)
class Layer:
    """Shapes that are painted together, inside one outline.

    Attributes:
        shapes: the shapes.
        colour: which colour of the scene fills them: ``"body"``, ``"head"``, ``"legs"``; or a name in ``FIXED``.
        shade: what that colour is multiplied by.
        outlined: whether a dark line runs around the layer.
    """

    shapes: tuple[Shape, ...]
    colour: str
    shade: float = 1.0
    outlined: bool = True


# Colours that no caption names.
FIXED = {"horn": (0.93, 0.87, 0.72), "beak": (0.96, 0.66, 0.16), "white": (1.0, 1.0, 1.0), "pupil": (0.08, 0.08, 0.1)}


def _leg(name: str) -> tuple[Shape, ...]:
    return tuple(Shape(f"{name}_{section}", name) for section in ("upper", "lower", "toes"))


def _wing(name: str) -> tuple[Shape, ...]:
    blade = Shape(f"{name}_blade", name)
    return (blade, *(Shape(f"{name}_skin_{index}", name, triangle=True) for index in range(2)))


LAYERS = (
    Layer(_leg("far_back_leg"), "legs", 0.7),
    Layer(_leg("far_front_leg"), "legs", 0.7),
    Layer(_wing("far_wing"), "body", 0.66),
    Layer(
        (
            *(Shape(f"mane_{index}", "crest") for index in range(3)),
            *(Shape(f"spike_{index}", "crest", triangle=True) for index in range(5)),
        ),
        "body",
        0.55,
    ),
    Layer(
        (
            Shape("tail_first", "tail"),
            Shape("tail_second", "tail"),
            Shape("tail_spade", "tail", triangle=True),
            Shape("body", "body"),
            Shape("neck", "neck"),
        ),
        "body",
    ),
    Layer((Shape("horn", "horn"),), "horn"),
    Layer(_leg("near_back_leg"), "legs"),
    Layer(_leg("near_front_leg"), "legs"),
    Layer(_wing("near_wing"), "body", 0.84),
    Layer((Shape("beak", "snout"),), "beak"),
    Layer((Shape("snout", "snout"), Shape("head", "head")), "head"),
    Layer((Shape("ear", "ear"),), "head", 0.78),
    Layer((Shape("eye", "eye"),), "white", outlined=False),
    Layer((Shape("pupil", "eye"),), "pupil", outlined=False),
)

SHAPES = tuple(shape for layer in LAYERS for shape in layer.shapes)

# The parts that a keypoint lies on; where there are two, it lies at the seam between them.
KEYPOINT_PARTS = {
    "eye": ("eye",),
    "nose": ("snout",),
    "head_top": ("head", "snout"),
    "neck_base": ("neck", "body"),
    "back": ("body", "neck"),
    "belly": ("body",),
    "hip": ("near_back_leg",),
    "tail_base": ("tail", "body"),
    "tail_mid": ("tail",),
    "tail_tip": ("tail",),
    "near_front_knee": ("near_front_leg",),
    "near_front_foot": ("near_front_leg",),
    "near_back_knee": ("near_back_leg",),
    "near_back_foot": ("near_back_leg",),
    "far_front_foot": ("far_front_leg",),
    "far_back_foot": ("far_back_leg",),
    "wing_tip": ("near_wing",),
}

# The layer that each keypoint lies on: what is painted later may hide it.
KEYPOINT_LAYERS = tuple(
    max(
        index
        for index, layer in enumerate(LAYERS)
        if any(shape.part == KEYPOINT_PARTS[name][0] for shape in layer.shapes)
    )
    for name in KEYPOINTS
)
