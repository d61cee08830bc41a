"""Semantic correspondence: matching points by their descriptors, and measuring how well it works.

Points are (y, x) and boxes (top, left, bottom, right) everywhere here; on disk they are (x, y) and (left, top,
right, bottom), and are turned when read.
"""

from interp.correspondence.buddies import Buddies, best_buddies, cyclical_distance, cyclical_matches, read_saliency
from interp.correspondence.cub import read_cub
from interp.correspondence.evaluate import evaluate, match_pair
from interp.correspondence.matching import match, match_patches, match_soft, mutual_nearest, nearest_neighbours
from interp.correspondence.pairs import COUNTS_360, Pair, read_pairs, read_prompts, summary
from interp.correspondence.pck import base_length, pck, within
from interp.correspondence.points import cells, rescale, to_pixels
from interp.correspondence.reduction import joint_pca
from interp.correspondence.scores import Evaluation, PairResult, compare, pck_interval
from interp.correspondence.spair import COUNTS, read_spair
from interp.correspondence.warp import DenseMatches, carried_colours, colour_map, dense_matches, warp

__all__ = [
    "COUNTS",
    "COUNTS_360",
    "Buddies",
    "DenseMatches",
    "Evaluation",
    "Pair",
    "PairResult",
    "base_length",
    "best_buddies",
    "carried_colours",
    "cells",
    "colour_map",
    "compare",
    "cyclical_distance",
    "cyclical_matches",
    "dense_matches",
    "evaluate",
    "joint_pca",
    "match",
    "match_pair",
    "match_patches",
    "match_soft",
    "mutual_nearest",
    "nearest_neighbours",
    "pck",
    "pck_interval",
    "read_cub",
    "read_pairs",
    "read_prompts",
    "read_saliency",
    "read_spair",
    "rescale",
    "summary",
    "to_pixels",
    "warp",
    "within",
]
