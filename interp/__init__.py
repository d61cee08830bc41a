"""Read and write the activations of vision-language and diffusion models, and the methods built on that.

Everything below loads on first use, so that ``import interp`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_NAMES = {
    "Diffusion": "models.diffusion",
    "VLM": "models.vlm",
    # prompts and tasks
    "Prompt": "prompts",
    "Segment": "prompts",
    "few_shot": "prompts",
    "instruction": "prompts",
    "query": "prompts",
    "Item": "tasks",
    "Task": "tasks",
    "load_task": "tasks",
    # reading and writing activations
    "Activations": "activations",
    "Add": "edits",
    "Edit": "edits",
    "Function": "edits",
    "Interpolate": "edits",
    "MeanAblate": "edits",
    "Project": "edits",
    "Region": "regions",
    "Replace": "edits",
    "Resample": "edits",
    "Scale": "edits",
    "Zero": "edits",
    "load_edits": "edit_files",
    "save_edits": "edit_files",
    # task vectors
    "TaskVectors": "task_vectors",
}
_MODULES = (
    "activations",
    "analyses",
    "conventions",
    "correspondence",
    "cross_modal",
    "cross_modal_figures",
    "cross_modal_tables",
    "edit_files",
    "edits",
    "errors",
    "figures",
    "guidance",
    "hyperfeatures",
    "inputs",
    "lens",
    "metrics",
    "models",
    "patching",
    "progress",
    "prompts",
    "readouts",
    "regions",
    "runs",
    "sites",
    "sweep",
    "tables",
    "task_prompts",
    "task_vectors",
    "tasks",
    "trajectories",
    "transfer",
    "zoo",
)

__all__ = ["__version__", *_NAMES, *_MODULES]

if TYPE_CHECKING:  # the same surface, for type checkers and editors
    import interp.activations as activations
    import interp.analyses as analyses
    import interp.conventions as conventions
    import interp.correspondence as correspondence
    import interp.cross_modal as cross_modal
    import interp.cross_modal_figures as cross_modal_figures
    import interp.cross_modal_tables as cross_modal_tables
    import interp.edit_files as edit_files
    import interp.edits as edits
    import interp.errors as errors
    import interp.figures as figures
    import interp.guidance as guidance
    import interp.hyperfeatures as hyperfeatures
    import interp.inputs as inputs
    import interp.lens as lens
    import interp.metrics as metrics
    import interp.models as models
    import interp.patching as patching
    import interp.progress as progress
    import interp.prompts as prompts
    import interp.readouts as readouts
    import interp.regions as regions
    import interp.runs as runs
    import interp.sites as sites
    import interp.sweep as sweep
    import interp.tables as tables
    import interp.task_prompts as task_prompts
    import interp.task_vectors as task_vectors
    import interp.tasks as tasks
    import interp.trajectories as trajectories
    import interp.transfer as transfer
    import interp.zoo as zoo

    from .activations import Activations as Activations
    from .edit_files import load_edits as load_edits
    from .edit_files import save_edits as save_edits
    from .edits import Add as Add
    from .edits import Edit as Edit
    from .edits import Function as Function
    from .edits import Interpolate as Interpolate
    from .edits import MeanAblate as MeanAblate
    from .edits import Project as Project
    from .edits import Replace as Replace
    from .edits import Resample as Resample
    from .edits import Scale as Scale
    from .edits import Zero as Zero
    from .models.diffusion import Diffusion as Diffusion
    from .models.vlm import VLM as VLM
    from .prompts import Prompt as Prompt
    from .prompts import Segment as Segment
    from .prompts import few_shot as few_shot
    from .prompts import instruction as instruction
    from .prompts import query as query
    from .regions import Region as Region
    from .task_vectors import TaskVectors as TaskVectors
    from .tasks import Item as Item
    from .tasks import Task as Task
    from .tasks import load_task as load_task


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    from .errors import nearest

    raise AttributeError(f"module 'interp' has no attribute {name!r}. {nearest(name, __all__)}".rstrip())


def __dir__() -> list[str]:
    return sorted(__all__)
