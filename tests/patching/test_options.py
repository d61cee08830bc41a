"""What patching experiments pass on to their sweep, and what they refuse."""

import pytest
import torch

from interp import patching
from interp.errors import InputError
from interp.task_vectors import TaskVectors
from tests import tiny


def experiments(vlm, **options):
    """Each experiment that sweeps, with options of the sweep."""
    clean, corrupt = tiny.text_inputs((5, 5), 1), tiny.text_inputs((5, 5), 2)
    metric = patching.log_probability(vlm, [3, 4])
    pair = (vlm, clean, corrupt, metric)
    outputs = torch.ones(4, 4, 12)
    vectors = TaskVectors(torch.ones(1, 4, 32))
    return {
        "activation": lambda: patching.activation(*pair, **options),
        "heads": lambda: patching.heads(*pair, **options),
        "head_sets": lambda: patching.head_sets(*pair, [(0, 0)], **options),
        "by_tower": lambda: patching.by_tower(*pair, **options),
        "path": lambda: patching.path(*pair, receivers=[(1, 0)], **options),
        "attribution": lambda: patching.attribution(*pair, **options),
        "knockout": lambda: patching.knockout(vlm, clean, [(0, -1)], metric, **options),
        "put_heads": lambda: patching.put_heads(vlm, clean, {"a": [(0, 0)]}, {"b": outputs}, metric, **options),
        "add_by_layer": lambda: patching.add_by_layer(vlm, clean, outputs, [(0, 0)], metric, **options),
        "mediation": lambda: patching.mediation(vlm, clean, outputs, metric, **options),
        "override": lambda: patching.override(vlm, clean, vectors, [3, 4], [5, 6], **options),
    }


NAMES = list(experiments(tiny.vlm("llama")))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_and_dry_runs_are_refused_before_anything_runs(name) -> None:
    vlm = tiny.vlm("llama")
    ran = []
    handle = vlm.unembed.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=r"maxrows.*Did you mean 'max_rows'"):
        experiments(vlm, maxrows=3)[name]()
    with pytest.raises(InputError, match=r"dry_run.*vlm\.sweep"):
        experiments(vlm, dry_run=True)[name]()
    handle.remove()
    assert not ran
    result = experiments(vlm, max_rows=7, progress=False, allow_no_effect=True)[name]()
    assert result.n_examples == 2
