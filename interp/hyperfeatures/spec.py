"""Which feature maps are meant, exactly: a value that prints, compares, goes to JSON, and is stored in checkpoints."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp.errors import InputError, nearest
from interp.latents import VaeMode

INVERSION, GENERATION, NOISE = "inversion", "generation", "noise"
MODES = (INVERSION, GENERATION, NOISE)


@dataclass(frozen=True)
class FeatureSpec:
    """A stack of feature maps: sites of a diffusion model at some steps of a process, all of one size.

    The steps of a stack run from clean to noisy, whatever the direction of the process.

    Attributes:
        sites: the layers, in the order of the channel axis.
        mode: ``"inversion"`` of a real image, ``"generation"``, or ``"noise"``: the image with noise added at a
            timestep, one call of the model each.
        steps: how many calls of the denoiser the whole process has. Not used by ``"noise"``.
        saved: which calls are kept, counted from 0 as they happen, in the order of the stack. Inversion starts at the
            clean image, so these rise; generation starts at noise, so these fall. Empty for ``"noise"``.
        timesteps: what the model sees as its timestep at each step of the stack. For ``"noise"`` these are what is
            asked for; else they follow from the convention and the scheduler, and are checked against the run when
            they are given.
        convention: of the process, a name in `interp.conventions`. Not used by ``"noise"``.
        n_noises: over how many draws of noise a map is averaged; only for ``"noise"``.
        output_size: (height, width) that every map is resized to, bilinearly; None: as they come, all of one size.
        load_size: (height, width) an image is first resized to with Pillow's bilinear filter; None: not at all.
        image_size: (height, width) it is then resized to, bilinearly, before it is encoded; None: not at all.
        vae: which latent stands for an image: the ``"mode"``, ``"mean"`` or a ``"sample"`` of the posterior.
        seed: of the posterior's sample, and of all noise.
        prompt: of every call.
        negative_prompt: for guidance; the empty prompt when not given.
        guidance_scale: of classifier-free guidance; None: no guidance. Kept are the conditional maps.

    Raises:
        InputError: values that contradict each other.

    Source: Diffusion Hyperfeatures, sections 3.1 and 4; DIFT, section 4 (``"noise"``).
    """

    sites: tuple[str, ...]
    mode: str = INVERSION
    steps: int = 50
    saved: tuple[int, ...] = ()
    timesteps: tuple[float, ...] = ()
    convention: str = "dhf"
    n_noises: int = 1
    output_size: tuple[int, int] | None = None
    load_size: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    vae: VaeMode = "sample"
    seed: int = 0
    prompt: str = ""
    negative_prompt: str | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise InputError(f"sites must be at least one name, each once, not {list(self.sites)}")
        if self.mode not in MODES:
            raise InputError(
                f"no mode {self.mode!r}: there are {', '.join(MODES)}. {nearest(self.mode, MODES)}".rstrip()
            )
        for name in ("output_size", "load_size", "image_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise InputError(f"{name} must be a positive (height, width), not {size}")
        if self.mode == NOISE:
            self._check_noise()
        else:
            self._check_process()

    @property
    def n_steps(self) -> int:
        """How many steps the stack has."""
        return len(self.timesteps) if self.mode == NOISE else len(self.saved)

    def cells(self) -> Iterator["FeatureSpec"]:
        """Every single (step, layer) of this stack as a spec of its own, step by step."""
        for step in range(self.n_steps):
            for layer in range(len(self.sites)):
                yield self.cell(step, layer)

    def cell(self, step: int, layer: int) -> "FeatureSpec":
        """The spec of one map of this stack.

        Args:
            step: of the stack, clean first.
            layer: index among the sites.

        Raises:
            InputError: there is no such step or layer.
        """
        if not (0 <= step < self.n_steps and 0 <= layer < len(self.sites)):
            raise InputError(
                f"step {step} of layer {layer} is out of range: {self.n_steps} steps, {len(self.sites)} layers"
            )
        return dataclasses.replace(
            self,
            sites=(self.sites[layer],),
            saved=self.saved[step : step + 1],
            timesteps=self.timesteps[step : step + 1],
        )

    def to_json(self) -> dict[str, Any]:
        """This spec in what JSON can say."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "FeatureSpec":
        """Read what `to_json` gave.

        Raises:
            InputError: a field that no spec has, or values that contradict each other.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in content:
            if name not in known:
                raise InputError(f"a feature spec has no field {name!r}. {nearest(name, known)}".rstrip())
        if "sites" not in content:
            raise InputError("a feature spec needs its sites")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**fields)

    def _check_process(self) -> None:
        if not self.saved:
            raise InputError(f"a stack by {self.mode} needs the calls to keep: give saved, such as (0,) for the first")
        outside = [call for call in self.saved if not 0 <= call < self.steps]
        if outside:
            raise InputError(f"saved call {outside[0]} is out of range: the process has {self.steps} steps, from 0 on")
        if list(self.saved) != sorted(set(self.saved), reverse=self.mode == GENERATION):
            order = "rise" if self.mode == INVERSION else "fall"
            raise InputError(f"saved calls must run from clean to noisy, so by {self.mode} they {order}: {self.saved}")
        if self.timesteps and len(self.timesteps) != len(self.saved):
            raise InputError(f"{len(self.timesteps)} timesteps are given for {len(self.saved)} saved calls")
        if self.n_noises != 1:
            raise InputError(f"n_noises is only for mode 'noise', not for {self.mode!r}")

    def _check_noise(self) -> None:
        if self.saved:
            raise InputError("saved is for inversion and generation; mode 'noise' takes timesteps")
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps)):
            raise InputError(f"mode 'noise' needs rising timesteps, clean first, not {self.timesteps}")
        if self.n_noises < 1:
            raise InputError(f"n_noises must be at least 1, not {self.n_noises}")
        if self.guidance_scale is not None:
            raise InputError("mode 'noise' is one conditional call: it takes no guidance_scale")


def calls(indices: Sequence[int], steps: int, mode: str) -> tuple[int, ...]:
    """Which calls of the denoiser the authors' saved indices mean, clean first.

    Args:
        indices: as in the authors' configurations: 0 is the noisy end, ``steps - 1`` the clean one.
        steps: of the whole process.
        mode: ``"inversion"`` or ``"generation"``.

    Returns:
        Calls counted from 0 as they happen, in the order of the stack.

    Raises:
        InputError: an index out of range, or another mode.

    Source: Diffusion Hyperfeatures, official code (the configured list and the flips in generation).
    """
    if mode not in (INVERSION, GENERATION):
        raise InputError(f"saved indices are for 'inversion' and 'generation', not {mode!r}")
    outside = [index for index in indices if not 0 <= index < steps]
    if outside:
        raise InputError(f"saved index {outside[0]} is out of range: the process has {steps} steps, from 0 on")
    clean_first = sorted(set(indices), reverse=True)
    return tuple(steps - 1 - index if mode == INVERSION else index for index in clean_first)


def saved_indices(steps: int) -> tuple[int, ...]:
    """The authors' choice of steps, scaled to another number of steps: 11 of 50, both ends among them.

    Args:
        steps: of the whole process.

    Returns:
        Falling indices, 0 the noisy end: ``49, 45, 40, ..., 5, 0`` for 50.

    Raises:
        InputError: no step.

    Source: Diffusion Hyperfeatures, official configuration.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}")
    return tuple(sorted({steps - 1, *(tenth * steps // 10 for tenth in range(10))}, reverse=True))
