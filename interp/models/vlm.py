"""Vision-language models and text decoders: prepare, capture, edit, generate, sweep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import ProcessorMixin

from interp.activations import Activations, from_taps
from interp.clock import Clock, known_layouts
from interp.edits import Edit, as_edits
from interp.errors import InputError
from interp.hooks import Applied, Session, Tap
from interp.inputs import Inputs, PromptLike, prepare
from interp.models.checks import arguments_for, placed
from interp.models.embed import entering
from interp.models.families import family_of
from interp.models.generate import continue_prompts
from interp.models.loading import load
from interp.models.named import Named
from interp.models.places import head_sizes, place_map, stack_blocks
from interp.positions import Indexes
from interp.selection import Where
from interp.sites import Place, expand
from interp.sweep import Sweep, run_sweep
from interp.sweeps.checks import check_given, edits_of


class VLM(Named):
    """A vision-language model, or a text decoder, with stable names for its activations.

    Args:
        model: a transformers model of a supported family.
        processor: its processor; for a text-only model its tokenizer. None: prompts cannot be prepared, but
            plain model inputs work.

    Raises:
        InputError: no family table covers the model.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if not isinstance(model, nn.Module) or model_type is None:
            raise InputError(
                f"VLM wraps a transformers model, not {type(model).__name__}; VLM.from_pretrained(name) loads one"
            )
        self.model = model
        self.processor = processor if isinstance(processor, ProcessorMixin) else None
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._family = family_of(str(model_type))
        self._modules = dict(model.named_modules())
        self._places = place_map(model, self._family)
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "VLM":
        """Load a model with its processor.

        Args:
            name: ``"zoo:tiny-llava"``, a local folder, or a Hub id.
            options: ``dtype``, ``device``, ``device_map``, ``revision``, and whatever transformers'
                ``from_pretrained`` takes. See `interp.models.loading.load` for what it raises.
        """
        vlm = cls(*load(name, **options))
        vlm.name = str(name)
        return vlm

    def __repr__(self) -> str:
        return (
            f"VLM({self.name!r}, family={self.family!r}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"n_heads={self.n_heads}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    # ------------------------------------------------------------ what the model is

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self._family.name

    @property
    def decoder(self) -> nn.Module:
        """The language model's stack, without the unembedding."""
        return self._modules[self._family.text.root]

    @property
    def n_layers(self) -> int:
        """Blocks of the language model."""
        return len(stack_blocks(self._modules, self._family.text))

    @property
    def d_model(self) -> int:
        """Width of the language model's residual stream."""
        return int(self._places.place("hook_embed").width or 0)

    @property
    def n_heads(self) -> int:
        """Query heads of the language model's blocks."""
        return head_sizes(self._modules, self._family.text, 0)[0]

    @property
    def d_head(self) -> int:
        """Width of one head of the language model; not always ``d_model / n_heads``."""
        return head_sizes(self._modules, self._family.text, 0)[2]

    @property
    def has_vision(self) -> bool:
        """Whether the model takes images."""
        return self._family.vision is not None

    @property
    def device(self) -> torch.device:
        """Where the token embedding is, and so where inputs go."""
        # Offloaded weights lie on no device; accelerate's hook says where they will run.
        hook = getattr(self._embedding, "_hf_hook", None)
        running = getattr(hook, "execution_device", None)
        return next(self._embedding.parameters()).device if running is None else torch.device(running)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token embedding."""
        return next(self._embedding.parameters()).dtype

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return self._modules[f"{self._family.text.root}.{self._family.text.final_norm}"]

    @property
    def unembed(self) -> nn.Module:
        """The unembedding (``lm_head``): final-norm output to logits."""
        return self._modules[self._family.lm_head]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the language model takes, if it states one."""
        config: Any = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        length = getattr(text, "max_position_embeddings", None)
        return None if length is None else int(length)

    @property
    def _embedding(self) -> nn.Module:
        return self._modules[f"{self._family.text.root}.{self._family.text.embed}"]

    def inside_decoder(self, place: Place) -> bool:
        """Whether a site lies in the language model's blocks or after: earlier tokens are not affected."""
        text = self._family.text
        within = (f"{text.root}.{text.blocks}", f"{text.root}.{text.final_norm}", self._family.lm_head)
        return any(place.path == path or place.path.startswith(f"{path}.") for path in within)

    # ------------------------------------------------------------ inputs

    def prepare(self, prompts: Sequence[PromptLike], *, chat: bool = False) -> Inputs:
        """Turn prompts into left-padded model inputs on the model's device.

        Args:
            prompts: strings, `Prompt`s, or pairs (text with ``<image>`` placeholders, list of images).
            chat: wrap every prompt as a user's turn of the model's chat template.

        Returns:
            Model inputs that know which tokens every named segment has.

        Raises:
            InputError: see `interp.inputs.prepare`; also when the model was wrapped without a processor.
        """
        if self.tokenizer is None:
            raise InputError("this VLM was made without a processor or tokenizer: VLM(model, processor)")
        return prepare(
            prompts,
            tokenizer=self.tokenizer,
            processor=self.processor,
            max_length=self.max_positions,
            chat=chat,
            device=self.device,
        )

    def embed(self, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_model"]:
        """What enters the language model: token embeddings with the images' features in place.

        The vision tower runs once; the language model does not run.

        Args:
            inputs: prepared or plain model inputs.

        Raises:
            InputError: a row longer than `max_positions`, or inputs with which the model does not call its language
                model.
        """
        return entering(self, self._embedding, inputs)

    # ------------------------------------------------------------ running

    def __call__(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        """Run the model; edits that are in force apply.

        Args:
            inputs: prepared or plain model inputs.
            options: passed on to the model.

        Returns:
            The model's own output object.

        Raises:
            InputError: a row longer than `max_positions`.
        """
        with known_layouts(inputs.layout if isinstance(inputs, Inputs) else None):
            return self.model(**arguments_for(inputs, self.max_positions), **options)

    def capture(
        self,
        inputs: Mapping[str, Any],
        sites: str | Sequence[str],
        at: Any = None,
        *,
        heads: Indexes | None = None,
        rows: Indexes | None = None,
        edits: Edit | Sequence[Edit] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad: bool = False,
        **options: Any,
    ) -> Activations:
        """Run the model once and keep the activations at some sites, edits included.

        Args:
            inputs: prepared or plain model inputs.
            sites: names, patterns, or raw ``path:output``.
            at: positions to keep (`interp.inputs.resolve`). An integer or name of one token drops the
                position axis; None keeps all positions.
            heads: heads to keep, at sites with a head axis.
            rows: rows of the batch to keep.
            edits: applied during this run only.
            dtype, device: of what is kept.
            grad: keep the graph, so that `Activations.gradients` works; the model runs without one otherwise.
            options: passed on to the model.

        Returns:
            The activations; ``.output`` is the model's own output.

        Raises:
            UnknownNameError, SiteUnavailableError, InputError, ShapeError, NeverFiredError: bad names,
                selections, values, or sites that did not run.
        """
        where = Where(at, rows, heads)
        taps = self._taps(sites, where, dtype, device, grad)
        with (
            torch.set_grad_enabled(grad),
            Session(self.model, self._clock(), taps, self._applied(edits)),
        ):
            output = self(inputs, **options)
        return from_taps(taps, output)

    @contextmanager
    def record(
        self,
        sites: str | Sequence[str],
        at: Any = None,
        *,
        heads: Indexes | None = None,
        rows: Indexes | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Activations]:
        """Keep activations of everything that runs inside the block, generation included.

        Args:
            sites, at, heads, rows, dtype, device: as for `capture`; ``at="last"`` follows the last token into
                decoding.

        Yields:
            Activations that are filled when the block ends; several calls of a site are stacked on a ``step``
            axis.
        """
        taps = self._taps(sites, Where(at, rows, heads), dtype, device, grad=False)
        acts = from_taps([])
        with Session(self.model, self._clock(), taps):
            yield acts
        acts.fill(taps)

    @contextmanager
    def edit(self, *edits: Edit | Sequence[Edit]) -> Iterator["VLM"]:
        """Apply edits to everything that runs inside the block, in this thread.

        Args:
            edits: one or many; at one site they apply in the order given; blocks nest.

        Raises:
            NeverFiredError: at the end of the block, for an edit that changed nothing.
            UnknownNameError, SiteUnavailableError, InputError, ShapeError: before anything runs.
        """
        listed = [edit for group in edits for edit in as_edits(group)]
        if not listed:
            raise InputError("edit() needs at least one edit")
        with Session(self.model, self._clock(), edits=self._applied(listed)):
            yield self

    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        edits: Edit | Sequence[Edit] = (),
        max_new_tokens: int = 5,
        decode: bool = False,
        **options: Any,
    ) -> Int[Tensor, "batch new"] | list[str]:
        """Continue prompts, greedily unless told otherwise; the KV cache stays, edits apply by their ``when``.

        Args:
            inputs: prepared or plain model inputs.
            edits: applied during this generation.
            max_new_tokens: how many tokens at most.
            decode: return text, special tokens left out, instead of ids.
            options: passed on to transformers' ``generate`` (``do_sample``, ``num_beams``, ...).

        Returns:
            The new tokens only: ids ``[batch, new]``, or one string per row (beams and samples are rows of
                their own).

        Raises:
            InputError: no ``input_ids``, padding that is not on the left, prompt and new tokens longer than
                `max_positions`, ``decode`` without a tokenizer, or guidance together with edits.
            UnknownNameError, SiteUnavailableError, ShapeError: bad sites, positions or values of edits.
            NeverFiredError: an edit that changed nothing.
        """
        if decode and self.tokenizer is None:
            raise InputError("decode=True needs a tokenizer: VLM(model, processor)")
        new = continue_prompts(self, inputs, self._applied(edits), max_new_tokens=max_new_tokens, **options)
        if not decode:
            return new
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def sweep(
        self,
        inputs: Mapping[str, Any],
        variants: Sequence[Edit | Sequence[Edit]],
        *,
        metric: Callable[[Tensor], Tensor] | None = None,
        positions: Any = "last",
        max_rows: int = 256,
        memory: int | None = None,
        dry_run: bool = False,
        check: bool = True,
        folder: str | Path | None = None,
        progress: bool = True,
        allow_no_effect: bool = False,
        seed: int = 0,
    ) -> Sweep:
        """Run many variants of one batch, each with edits of its own, and share what they have in common.

        Args:
            inputs: prepared or plain model inputs.
            variants: one list of edits per variant.
            metric: takes each variant's logits ``[batch, vocab]`` (``[batch, pos, vocab]`` for several positions) and
                returns ``[batch, ...]``, in the same shape each time; only that is kept then.
            positions: whose logits are wanted, as for `capture`; one position has no axis.
            max_rows: the most variants × batch in one forward.
            memory: bytes that one forward may take. None: half of what is free.
            dry_run: plan only; nothing runs.
            check: compare one variant, drawn by ``seed``, with a plain edited forward. That forward takes the place of
                the unedited one that all variants start from, of which only what it has touched is run again.
            folder: keeps what is done; a sweep found there goes on, if it is the same: model, inputs, edits, those of
                outer blocks, metric and positions, with all that functions hold and read. Hooks of one's own count
                by where they are.
            progress: show a bar over variants.
            allow_no_effect: let variants pass whose edits change no bit of the logits.
            seed: of the draw.

        Returns:
            Logits at the asked positions per variant, or the metric's values, and the plan: what was shared and what
            it cost.

        Raises:
            InputError: no variants, inputs that are not left-padded token ids, a bad ``max_rows`` or ``memory``, a
                folder of another sweep, something that a folder cannot tell apart from others (a metric that holds
                an open file), a metric that returns NaN, no entry per prompt or another shape for each variant, or
                a variant without effect.
            UnknownNameError, SiteUnavailableError, ShapeError: bad sites, positions or values of edits.
            NeverFiredError: an edit that applied to nothing.
            SweepMismatchError: the checked variant differs from the plain edited forward.
        """
        check_given(inputs, variants, metric)
        return run_sweep(
            self,
            inputs,
            [self._applied(edits_of(index, edits)) for index, edits in enumerate(variants)],
            metric=metric,
            positions=positions,
            max_rows=max_rows,
            memory=memory,
            dry_run=dry_run,
            check=check,
            folder=folder,
            progress=progress,
            allow_no_effect=allow_no_effect,
            seed=seed,
        )

    # ------------------------------------------------------------ helpers

    def _clock(self) -> Clock:
        return Clock(self.model, self.decoder)

    def _taps(
        self,
        sites: str | Sequence[str],
        where: Where,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        grad: bool,
    ) -> list[Tap]:
        taps = []
        for site in expand(sites, self._places.names(), self._places.reasons):
            place = self.place(site)
            where.check(place)
            taps.append(Tap(place, where, dtype, device, grad))
        return taps

    def _applied(self, edits: Edit | Sequence[Edit]) -> list[Applied]:
        config: Any = self.model.config
        image_token = getattr(config, "image_token_id", None) if self.has_vision else None
        return [placed(edit, self._places, image_token) for edit in as_edits(edits)]
