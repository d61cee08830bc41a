"""A world of articulated creatures, with pictures and everything that is known about each pixel."""

from interp.zoo.creatures.captions import STYLES, VOCABULARY, caption
from interp.zoo.creatures.colours import BACKGROUNDS, COLOURS
from interp.zoo.creatures.layers import KEYPOINT_PARTS, PARTS
from interp.zoo.creatures.pairs import KeypointPair, Pairs, draw_pairs
from interp.zoo.creatures.render import Rendered, part_depths, render
from interp.zoo.creatures.scenes import POSE_RANGES, Scene, draw_scenes
from interp.zoo.creatures.skeleton import POSE
from interp.zoo.creatures.species import KEYPOINTS, SPECIES, Species

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KEYPOINTS",
    "KEYPOINT_PARTS",
    "PARTS",
    "POSE",
    "POSE_RANGES",
    "SPECIES",
    "STYLES",
    "VOCABULARY",
    "KeypointPair",
    "Pairs",
    "Rendered",
    "Scene",
    "Species",
    "caption",
    "draw_pairs",
    "draw_scenes",
    "part_depths",
    "render",
]
