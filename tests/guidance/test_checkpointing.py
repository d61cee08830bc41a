"""Checkpointing changes memory and nothing else: not results, edits, captures, hooks or the state of the model."""

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp
from interp.errors import InputError
from interp.guidance import Guide, Term, checkpointed, without_weight_gradients
from interp.guidance.checkpointing import run_again
from interp.replay import Replaying, acting_thread, is_replay
from tests.guidance.closed_form import NEGATIVE, PROMPT, SITES, STEPS, draw, model
from tests.guidance.test_steps import TERMS

SETTINGS: dict[str, Any] = {"negative_prompt": NEGATIVE, "steps": STEPS, "progress": False}
INSIDE = "up.2.attn.1.blocks.0.self.hook_z"  # computed within a block that is run again


def guide(checkpointing: bool, terms: Any = None, **changes: Any) -> Guide:
    settings: dict[str, Any] = {"rule": "latent_gradient", "step_size": 0.5, "start": 0.25, "end": 0.75} | changes
    return Guide(terms or TERMS["all"][0], checkpointing=checkpointing, **settings)


def run(checkpointing: bool, start: Tensor, terms: Any = None, **changes: Any) -> Any:
    return model().generate(PROMPT, latents=start, guidance=guide(checkpointing, terms), **SETTINGS | changes)


def state(sd: Any) -> tuple[Any, ...]:
    """What a run could leave behind: hooks, forwards, flags and functions of blocks, weights with gradients."""
    blocks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), vars(m).get("gradient_checkpointing"),
         vars(m).get("_gradient_checkpointing_func"))
        for m in sd.denoiser.modules()
    ]  # fmt: skip
    return blocks, [p.requires_grad for p in sd.denoiser.parameters()], torch.is_grad_enabled()


@pytest.mark.parametrize("edited", [False, True])
def test_results_are_the_same(edited: bool) -> None:
    start = draw(2, 4, 8, 8, seed=20)
    # Inside, before and after blocks that are run again, some of them at one step or in one half only.
    edits = [
        interp.Scale("up.2.attn.0.blocks.0.cross.hook_pattern", 1.5),
        interp.Scale("down.1.resnets.0.hook_branch", 0.5, steps=[1]),
        interp.Scale("mid.resnets.0.hook_branch", 1.7, half="cond", steps=[1, 2]),
        interp.Scale(INSIDE, 2.0, rows=[1]),
    ]
    changes = {"edits": edits} if edited else {}
    plain, again = (run(checkpointing, start, **changes) for checkpointing in (False, True))
    assert torch.equal(plain.latents, again.latents)
    assert plain.guidance.equals(again.guidance)
    if edited:
        assert (plain.latents - run(True, start).latents).abs().max() > 1e-3
        each = [run(True, start, edits=edits[:n]).final for n in range(5)]
        assert all((a - b).abs().max() > 1e-6 for a, b in pairwise(each))


def test_edits_around_the_run_apply_when_blocks_run_again() -> None:
    start, sd = draw(1, 4, 8, 8, seed=21), model()
    ends = []
    terms = TERMS["drag"][0]
    for checkpointing in (False, True):
        with sd.edit(interp.Scale(INSIDE, 3.0), interp.Scale("down.0.resnets.1.hook_branch", 0.2, steps=[2])):
            ends.append(run(checkpointing, start, terms).final)
    assert torch.equal(*ends)
    assert (ends[0] - run(True, start, terms).final).abs().max() > 1e-4


def test_nothing_is_captured_twice() -> None:
    start, sd = draw(1, 4, 8, 8, seed=22), model()
    sites = [INSIDE, "up.3.resnets.2.hook_branch", SITES[1]]
    terms = TERMS["drag"][0]
    inner = run(True, start, terms, capture=sites, half="both")
    with sd.record(sites) as outer:
        run(True, start, terms)
    for site in sites:
        both = torch.cat([inner.uncond[site], inner.activations[site]], dim=1)
        assert len(outer.calls(site)) == STEPS
        assert torch.equal(outer[site], both)
    # Captures see the moved latents, from which the step is made.
    moved = sd.capture(inner.latents[1], 751, PROMPT, [SITES[1]])[SITES[1]]
    assert (inner.activations[SITES[1]][1] - moved).abs().max() > 1e-4


def test_less_is_kept_for_the_backward_pass() -> None:
    sd, start = model(), draw(2, 4, 8, 8, seed=23)
    text = sd.prompt(PROMPT).cond.states.expand(2, -1, -1)

    def kept(*contexts: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        weights = {parameter.data_ptr() for parameter in sd.denoiser.parameters()}
        x = start.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = sd.denoiser(x, 501, encoder_hidden_states=text).sample
        assert output.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    everything = kept()
    with without_weight_gradients([sd.denoiser]):
        without_weights = kept()
        with checkpointed(sd.denoiser):
            least = kept()
    assert without_weights < 0.9 * everything
    assert least < 0.5 * without_weights


def test_everything_is_as_before_after_a_run_and_after_an_error() -> None:
    sd, start = model(), draw(1, 4, 8, 8, seed=24)
    sd.denoiser.conv_in.weight.requires_grad_(False)
    before = state(sd)
    run(True, start, TERMS["drag"][0])
    assert state(sd) == before

    def broken(maps: Any, timestep: float) -> Tensor:
        raise RuntimeError("in the function of a term")

    def fails_inside(module: nn.Module, *args: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("inside a block")

    with pytest.raises(RuntimeError, match="in the function") as kept:
        run(True, start, [Term.from_function(SITES[0], broken)])
    assert state(sd) == before
    assert kept.value is not None  # alive while the state is compared: nothing may hang on its traceback
    handle = sd.denoiser.up_blocks[2].resnets[0].conv1.register_forward_pre_hook(fails_inside)
    try:
        with pytest.raises(RuntimeError, match="inside a block") as also:
            run(True, start, TERMS["drag"][0])
    finally:
        handle.remove()
    assert also.value is not None
    assert state(sd) == before
    sd.denoiser.conv_in.weight.requires_grad_(True)
    # No saving hooks of a checkpoint are left in place.
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.0))


def test_checkpointing_of_the_users_own_is_kept() -> None:
    sd, start = model(seed=7), draw(1, 4, 8, 8, seed=25)
    calls: list[int] = []

    def own(block: Any, *args: Any) -> Any:
        calls.append(1)
        return block(*args)

    sd.denoiser.enable_gradient_checkpointing(own)
    before = state(sd)
    terms = [Term.from_function(SITES[0], lambda maps, timestep: maps[SITES[0]].square().flatten(1).mean(dim=1))]
    sd.generate(PROMPT, latents=start, guidance=guide(True, terms), **SETTINGS)
    assert state(sd) == before
    assert not calls
    sd.generate(PROMPT, latents=start, guidance=guide(False, terms), **SETTINGS)
    assert calls


def test_a_repetition_in_another_thread_is_heard_as_the_first_time() -> None:
    """On an accelerator, backward passes run in a thread of their own."""
    sd, start = model(), draw(1, 4, 8, 8, seed=26)
    text = sd.prompt(PROMPT).cond.states
    gradients = []
    with without_weight_gradients([sd.denoiser]), sd.edit(interp.Scale(INSIDE, 3.0)), sd.record([INSIDE]) as caught:
        for elsewhere in (False, True):
            x = start.clone().requires_grad_()
            with checkpointed(sd.denoiser):
                loss = sd.denoiser(x, 501, encoder_hidden_states=text).sample.square().sum()

            def backward(loss: Tensor = loss, x: Tensor = x) -> None:
                gradients.append(torch.autograd.grad(loss, x)[0])

            if elsewhere:
                thread = threading.Thread(target=backward)
                thread.start()
                thread.join()
            else:
                backward()
    with sd.edit(interp.Scale(INSIDE, 3.0)):
        x = start.clone().requires_grad_()
        wanted = torch.autograd.grad(sd.denoiser(x, 501, encoder_hidden_states=text).sample.square().sum(), x)[0]
    assert len(gradients) == 2
    assert all(torch.equal(gradient, wanted) for gradient in gradients)
    assert len(caught.calls(INSIDE)) == 2
    x = start.clone().requires_grad_()
    unedited = torch.autograd.grad(sd.denoiser(x, 501, encoder_hidden_states=text).sample.square().sum(), x)[0]
    assert (unedited - wanted).abs().max() > 1e-3


def test_a_replay_knows_its_thread_and_ends() -> None:
    assert not is_replay()
    assert acting_thread() == threading.get_ident()
    again = Replaying(17, {})
    for _ in range(2):
        with again, again:
            assert is_replay()
        assert not is_replay()
    with again:
        assert is_replay()
        assert acting_thread() == 17
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(is_replay()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not is_replay()


def test_a_block_that_ends_early_comes_back_where_it_was_called() -> None:
    class Ended(Exception):
        pass

    caught: list[Tensor] = []

    def block(x: Tensor) -> Tensor:
        y = torch.sin(x) * x
        if not is_replay():
            caught.append(y)
            raise Ended
        return y

    x = torch.linspace(0.1, 1, 5, requires_grad=True)
    with pytest.raises(Ended):
        run_again(block, x)
    (gradient,) = torch.autograd.grad(caught[0].sum(), x)
    torch.testing.assert_close(gradient, torch.cos(x) * x + torch.sin(x))


def test_a_model_without_blocks_to_checkpoint() -> None:
    with pytest.raises(InputError, match="checkpointing=False"), checkpointed(nn.Linear(2, 2)):
        pass
