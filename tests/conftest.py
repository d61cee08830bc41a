"""Settings every test shares: offline, one thread, no window, seeded."""

import os

# Before anything imports the libraries that read these. Nothing of interp may be imported here: the
# shape checks of jaxtyping are installed after this file and see only later imports.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same global random state, whatever ran before it and in whichever worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
