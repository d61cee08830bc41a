"""Denoisers of every family called by hand, and hooks by hand on any of their tensors."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interp.denoising import DenoiserClock
from interp.edits import Edit
from interp.hooks import Session, Tap
from interp.models.checks import placed
from interp.models.diffusion_places import components, denoiser_name, diffusion_places
from interp.models.places import PlaceMap
from interp.selection import Where
from interp.sites import Place
from tests import tiny_diffusion as tiny

TEXT = 5
BRANCH = "up.1.resnets.2.hook_branch"  # a feature map in the middle of a UNet


class Bench:
    """One family's pipeline with its places, its denoiser, and fixed inputs."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.pipeline: Any = tiny.pipeline(family)
        self.root = components(self.pipeline)
        self.places: PlaceMap = diffusion_places(self.pipeline)
        self.denoiser: Any = self.root.get_submodule(denoiser_name(self.root))

    def inputs(self, batch: int = 2, size: tuple[int, int] = (8, 12), time: float = 30.0, seed: int = 0) -> dict:
        """Keyword arguments of one call; images that are not square."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator)

        config = self.denoiser.config
        if self.family in ("unet", "sdxl"):
            given = {
                "sample": draw(4, *size),
                "timestep": torch.tensor(time),
                "encoder_hidden_states": draw(TEXT, config.cross_attention_dim),
            }
            if self.family == "sdxl":
                given["added_cond_kwargs"] = {"text_embeds": draw(tiny.WIDTH), "time_ids": draw(6)}
            return given
        times = torch.full((batch,), time)
        if self.family == "flux":
            height, width = size[0] // 2, size[1] // 2
            ids = torch.zeros(height, width, 3)
            ids[..., 1] += torch.arange(height)[:, None]
            ids[..., 2] += torch.arange(width)
            return {
                "hidden_states": draw(height * width, 16),
                "encoder_hidden_states": draw(TEXT, tiny.WIDTH),
                "pooled_projections": draw(tiny.WIDTH),
                "timestep": times / 1000,
                "guidance": torch.full((batch,), 3.5),
                "img_ids": ids.reshape(-1, 3),
                "txt_ids": torch.zeros(TEXT, 3),
            }
        given = {"hidden_states": draw(4, *size), "timestep": times}
        if self.family == "sd3":
            given |= {
                "encoder_hidden_states": draw(TEXT, 2 * tiny.WIDTH),
                "pooled_projections": draw(2 * tiny.WIDTH),
            }
        else:
            mask = torch.ones(batch, TEXT)
            mask[-1, -2:] = 0
            given |= {
                "encoder_hidden_states": draw(TEXT, tiny.WIDTH),
                "encoder_attention_mask": mask,
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
        return given

    def __call__(self, **options: Any) -> Tensor:
        return self.denoiser(**self.inputs(**options)).sample

    def sites(self, part: str = "denoiser") -> list[Place]:
        return [place for place in self.places.places.values() if place.part == part]

    def one_of_each_kind(self) -> list[Place]:
        """The denoiser's sites, one for all that differ in their level or number only."""
        kinds = {
            re.sub(r"\d+", "N", re.sub(r"^(down\.\d|mid|up\.\d)", "level", place.site)): place
            for place in reversed(self.sites())
        }
        return list(kinds.values())

    def taps(self, sites: Sequence[str], where: Where | None = None, **options: Any) -> list[Tap]:
        where = where or Where()
        taps = [Tap(self.places.place(site), where, **options) for site in sites]
        for tap in taps:
            where.check(tap.place)
        return taps

    def session(
        self, taps: Sequence[Tap] = (), edits: Sequence[Edit] = (), *, halves: Any = None, stop: bool = False
    ) -> Session:
        applied = [placed(edit, self.places) for edit in edits]
        return Session(self.root, DenoiserClock(self.denoiser, halves), taps, applied, stop=stop)

    def capture(self, site: str, where: Where | None = None, **options: Any) -> Tensor:
        taps = self.taps([site], where)
        with self.session(taps):
            self(**options)
        return taps[0].caught[0]

    def edited(self, *edits: Edit, **options: Any) -> Tensor:
        with self.session(edits=edits):
            return self(**options)


@cache
def bench(family: str) -> Bench:
    """One family's bench, made once."""
    return Bench(family)


@contextmanager
def by_hand(root: nn.Module, place: Place, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``change`` on the whole tensor of a place, by a plain torch hook; what it returns is put in."""
    module = root.get_submodule(place.path)

    def after(m: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        values = list(output.values()) if hasattr(output, "values") else list(output)
        index = int(place.element or 0)
        new = change(values[index])
        if new is None:
            return None
        values[index] = new
        return type(output)(*values) if hasattr(output, "values") else tuple(values)

    def before(m: nn.Module, args: tuple, kwargs: dict) -> Any:
        names = [place.element] if place.element else ["hidden_states", "sample"]
        key = next((name for name in names if name in kwargs), None)
        new = change(args[0] if key is None else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    if place.side == "output":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def state_of(root: nn.Module) -> dict[str, tuple]:
    """All hooks, processors and configurations of every module, and what its instance holds."""
    return {
        name: (
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks_with_kwargs),
            tuple(module._forward_pre_hooks_with_kwargs),
            tuple(module._forward_hooks_always_called),
            id(getattr(module, "config", None)),
            id(getattr(module, "processor", None)),
            tuple(vars(module)),
            tuple(module._modules),
        )
        for name, module in root.named_modules()
    }
