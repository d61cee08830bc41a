"""Site names: their grammar, their axes, patterns over them, and the nearest name when one is wrong.

A site is a place where an activation can be read or written. Its name is the same in every family of model
and follows TransformerLens where that has one: ``blocks.3.hook_resid_post``,
``vision.blocks.0.attn.hook_pattern``, ``projector.hook_out``, ``up.1.resnets.2.hook_branch``. The raw dotted
path of a torch module works too: ``model.language_model.layers.3:output``; where a module takes or returns
several tensors, with one of them named: ``transformer.transformer_blocks.3:output.1``,
``transformer.transformer_blocks.3:input.encoder_hidden_states``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from interp.errors import InputError, SiteUnavailableError, UnknownNameError, nearest

Side = Literal["input", "output", "pattern"]
Layout = Literal["tokens", "grid", "vector", "auto"]
Part = Literal["model", "denoiser", "text_encoder", "vae"]
ImageTokens = Literal["all", "first", "last"]

RESIDUAL = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head", "d_head")
PATTERN = ("batch", "head", "query", "key")
LOGITS = ("batch", "pos", "vocab")
NEURONS = ("batch", "pos", "d_mlp")
SPATIAL = ("batch", "channel", "height", "width")
VECTOR = ("batch", "d_model")

_NAME = re.compile(
    r"^(?P<tower>(?:[a-z_]\w*\.(?:\d+\.)?)*?)(?:blocks\.(?P<layer>\d+)\.)?(?P<leaf>(?:[a-z_]+\.)?hook_[a-z_]+)$"
)
_RAW = re.compile(r"^(?P<path>[\w.]+):(?P<side>input|output)(?:\.(?P<element>\w+))?$")


@dataclass(frozen=True)
class Place:
    """Where one site is in one model.

    Args:
        site: the stable name.
        path: dotted path of the torch module.
        side: the module's ``input``, its ``output``, or the attention ``pattern`` inside it.
        axes: names of the tensor's axes, as users see it.
        n_heads: how many heads the last axis splits into, when the site has a head axis.
        columns: the ``(start, stop)`` part of a fused projection that belongs to this site.
        width: size of the last axis where it is known before anything runs.
        positional: whether the ``pos`` axis counts the tokens of the prompt (not patches of an image).
        element: which tensor, where the module takes or returns several: the keyword of an input, the index in
            an output. None: the first one.
        layout: ``tokens`` ``[batch, pos, ...]``, ``grid`` ``[batch, channel, height, width]``, ``vector``
            ``[batch, d]``; ``auto``: one of these, as the tensor's number of axes says.
        part: what the module belongs to: a model with prompts, or the denoiser, a text encoder or the
            autoencoder of a diffusion pipeline.
        image_tokens: which of the tokens (of the queries, in a pattern) are the cells of the image: all, or the
            first or last ones. None: none are.
    """

    site: str
    path: str
    side: Side
    axes: tuple[str, ...]
    n_heads: int | None = None
    columns: tuple[int, int] | None = None
    width: int | None = None
    positional: bool = True
    element: int | str | None = None
    layout: Layout = "tokens"
    part: Part = "model"
    image_tokens: ImageTokens | None = None

    @property
    def station(self) -> tuple[str, Side, int | str | None]:
        """Where the hook goes: module path, side, and which tensor of it."""
        return self.path, self.side, self.element


@dataclass(frozen=True)
class SiteName:
    """A site name taken apart: ``vision.blocks.2.attn.hook_z`` is ``vision``, 2, ``attn.hook_z``."""

    tower: str
    layer: int | None
    leaf: str


def parse(site: str) -> SiteName | None:
    """Take a stable site name apart.

    Args:
        site: a name such as ``vision.blocks.2.attn.hook_z``.

    Returns:
        Its tower (empty for the language model), layer and leaf, or None for a raw module path.
    """
    match = _NAME.match(site)
    if match is None:
        return None
    layer = match["layer"]
    return SiteName(match["tower"].rstrip("."), None if layer is None else int(layer), match["leaf"])


def parse_raw(site: str) -> tuple[str, Literal["input", "output"], str | None] | None:
    """Split ``module.path:output.1`` into path, side and element; None when the name has another form."""
    match = _RAW.match(site)
    if match is None:
        return None
    return match["path"], "input" if match["side"] == "input" else "output", match["element"]


def is_pattern(name: str) -> bool:
    """Whether a name holds wildcards (``*``, ``?``, ``[...]``) and so stands for many sites."""
    return any(mark in name for mark in "*?[")


def match(pattern: str, names: Iterable[str], reasons: Mapping[str, str] | None = None) -> list[str]:
    """The names that a shell-style pattern selects, in the order given.

    Args:
        pattern: a site name, or a pattern such as ``blocks.*.hook_resid_post``. It has to match the whole name,
            so ``blocks.*`` leaves ``vision.blocks.0...`` out; a ``*`` stands for dots as well, so that
            ``*.hook_resid_post`` selects both towers.
        names: the sites that exist.
        reasons: why other sites are not available, by name.

    Returns:
        At least one name.

    Raises:
        SiteUnavailableError: all that matches is not available.
        UnknownNameError: nothing matches; the message lists the nearest names.
    """
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)] if is_pattern(pattern) else []
    if not found and pattern in names:
        found = [pattern]
    if not found:
        absent = [name for name in reasons or {} if fnmatchcase(name, pattern)]
        if absent and reasons:
            raise SiteUnavailableError(f"site {absent[0]!r} is not available in this model: {reasons[absent[0]]}")
        raise unknown(pattern, names)
    return found


def unknown(site: str, names: Iterable[str]) -> UnknownNameError:
    """The error for a name that no site has: nearest names, or the layers when only the layer is off."""
    names = list(names)
    parsed = parse(site)
    if parsed is not None and parsed.layer is not None:
        layers = [
            other.layer
            for other in map(parse, names)
            if other and other.layer is not None and (other.tower, other.leaf) == (parsed.tower, parsed.leaf)
        ]
        if layers:
            return UnknownNameError(
                f"site {site!r}: layer {parsed.layer} is out of range, this model has {parsed.leaf!r} at layers "
                f"{min(layers)} to {max(layers)}"
            )
    kind = "no site matches the pattern" if is_pattern(site) else "unknown site"
    return UnknownNameError(
        f"{kind} {site!r}. {nearest(site, names)} `sites()` lists all {len(names)}.".replace("  ", " ")
    )


def expand(sites: str | Iterable[str], names: Iterable[str], reasons: Mapping[str, str] | None = None) -> list[str]:
    """Expand one or many names and patterns, each site once, in the order asked for.

    Args:
        sites: a name, a pattern, a raw ``path:side``, or several of them. Names without wildcards pass
            through.
        names: the sites that exist, for the patterns.
        reasons: why other sites are not available, by name.

    Raises:
        InputError: no site was asked for.
        SiteUnavailableError: a pattern that selects only sites that are not available.
        UnknownNameError: a pattern that selects nothing.
    """
    names = list(names)
    asked = [sites] if isinstance(sites, str) else list(sites)
    if not asked:
        raise InputError("no sites given: name at least one, such as 'blocks.*.hook_resid_post'")
    found: dict[str, None] = {}
    for site in asked:
        found.update(dict.fromkeys(match(site, names, reasons) if is_pattern(site) else [site]))
    return list(found)
