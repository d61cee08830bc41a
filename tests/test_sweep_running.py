"""Memory, resumption, checks and errors of sweeps."""

import inspect
import logging

import pytest
import torch

from interp import VLM, Add, Function, Replace, Scale, Zero
from interp.errors import InputError, NeverFiredError, ShapeError
from interp.sweep import SweepMismatchError
from interp.sweeps import chunk as chunks
from interp.sweeps import masks, memory
from tests import tiny
from tests.plain import state_of

RESID = "blocks.{}.hook_resid_pre"

# As called without the checks of types that tests run under.
sweep = inspect.unwrap(VLM.sweep)


def layers(at="last", value=3.0):
    return [[Add(RESID.format(i), torch.full((32,), value), at=at)] for i in range(4)]


def difference(logits):
    return logits[..., 5] - logits[..., 7]


def test_a_dry_run_runs_nothing():
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.model, "forward", None)
        swept = vlm.sweep(inputs, layers(), dry_run=True)
    assert "token-layers" in str(swept.plan) and swept.plan.chunks == ("4 packed from token 20",)
    assert swept.plan.memory > 0 and swept.plan.checked in range(4)
    with pytest.raises(InputError, match="dry run"):
        _ = swept.logits


def test_chunks_fit_the_memory():
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = layers() + layers(-3)
    want = vlm.sweep(inputs, variants)
    small = vlm.sweep(inputs, variants, memory=20_000)
    assert want.plan.variants_per_forward == 4 and small.plan.variants_per_forward in (1, 2)
    torch.testing.assert_close(small.logits, want.logits, atol=5e-5, rtol=0)
    assert 0 < memory.budget([torch.device("cpu")]) <= memory.MOST
    with pytest.raises(InputError, match="memory=0"):
        vlm.sweep(inputs, variants, memory=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_sweep_goes_on_with_half_when_memory_runs_out(error, monkeypatch, caplog):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    want, before = vlm.sweep(inputs, layers() + layers(-3)).logits, state_of(vlm.model)
    original = chunks.ChunkRun.run

    def run(self):
        if len(self.variants) > 2:
            raise error
        return original(self)

    monkeypatch.setattr(chunks.ChunkRun, "run", run)
    with caplog.at_level(logging.WARNING, logger="interp.sweep"):
        swept = vlm.sweep(inputs, layers() + layers(-3))
    torch.testing.assert_close(swept.logits, want, atol=5e-5, rtol=0)
    assert [record.getMessage() for record in caplog.records] == [
        "memory ran out with 4 variants in one forward: going on with half"
    ]
    assert state_of(vlm.model) == before

    def never(self):
        raise error

    monkeypatch.setattr(chunks.ChunkRun, "run", never)
    with pytest.raises(type(error)):
        vlm.sweep(inputs, layers(), check=False)
    monkeypatch.setattr(chunks.ChunkRun, "run", lambda self: [][0])
    with pytest.raises(IndexError):
        vlm.sweep(inputs, layers())
    assert state_of(vlm.model) == before


def test_a_wrong_result_is_found(monkeypatch):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    right = masks.packed_mask
    monkeypatch.setattr(chunks, "packed_mask", lambda *given: torch.ones_like(right(*given)))
    variants = [edits for edits in layers() for _ in range(5)]
    for seed in range(3):
        with pytest.raises(SweepMismatchError, match="plain edited forward"):
            vlm.sweep(inputs, variants, seed=seed)
    vlm.sweep(inputs, variants, check=False)


def test_hooks_of_ones_own_are_named_when_they_disagree():
    vlm, inputs = VLM(tiny.llama()), tiny.text_inputs((9, 9))
    seen = []
    block = vlm.model.model.layers[2]
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    vlm.sweep(inputs, layers())
    assert len(seen) == 3  # the run that all start from, the part of it that is run again, and the variants
    handle.remove()

    def write(module, args, out):
        return torch.cat([out[:, :-1], 2 * out[:, -1:]], dim=1)

    handle = block.register_forward_hook(write)
    with pytest.raises(SweepMismatchError, match=r"Hooks of your own \(at model.layers.2\)"):
        vlm.sweep(inputs, [one for one in layers() for _ in range(2)][:4])
    handle.remove()


def test_captures_of_an_outer_block_see_one_forward_per_variant():
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    with vlm.record(RESID.format(2), at="last") as acts:
        swept = vlm.sweep(inputs, layers())
    assert "captures at model.layers.2" in swept.plan.reason
    assert acts[RESID.format(2)].shape[0] == 5  # the unedited run is the first
    torch.testing.assert_close(swept.logits, vlm.sweep(inputs, layers()).logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("at", ["last", -3])
def test_edits_without_an_effect(at):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site = RESID.format(1)
    same = Replace(site, vlm.capture(inputs, site, at=at)[site], at=at)
    for idle in (Scale(site, 1.0, at=at), same, Scale("blocks.2.attn.hook_pattern", 1.0, at=at)):
        variants = [*layers(), [idle], []]
        with pytest.raises(InputError, match="variant 4 changes nothing"):
            vlm.sweep(inputs, variants)
        swept = vlm.sweep(inputs, variants, allow_no_effect=True)
        torch.testing.assert_close(swept.logits[4], swept.logits[5], atol=5e-5, rtol=0)
    with pytest.raises(InputError, match="cannot reach the asked positions"):
        vlm.sweep(inputs, [[Zero("blocks.3.hook_resid_post", at=-2)]])
    with pytest.raises(InputError, match="variant 1 changes nothing"):
        vlm.sweep(inputs, [[Scale("hook_embed", 2.0)], [Scale(site, 1.0)]])
    tiny_effect = Add(site, torch.full((32,), 1e-5), at="last")
    vlm.sweep(inputs, [[tiny_effect]])


def test_a_sweep_goes_on_from_its_folder(tmp_path, monkeypatch):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = layers() + layers(-3)
    want = vlm.sweep(inputs, variants)
    original, n_runs = chunks.ChunkRun.run, []

    def run(self):
        n_runs.append(len(self.variants))
        if len(n_runs) == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(chunks.ChunkRun, "run", run)
    with pytest.raises(KeyboardInterrupt):
        vlm.sweep(inputs, variants, folder=tmp_path / "sweep", max_rows=4)
    assert n_runs == [1, 2, 2, 2]  # the first is what the checked variant had touched
    swept = vlm.sweep(inputs, variants, folder=tmp_path / "sweep", max_rows=4)
    assert n_runs[4:] == [1, 2, 2]
    torch.testing.assert_close(swept.logits, want.logits, atol=5e-5, rtol=0)
    again = vlm.sweep(inputs, variants, folder=tmp_path / "sweep")
    assert torch.equal(again.logits, swept.logits) and len(n_runs) == 7
    others = [
        (vlm, inputs, layers(), {}, "variants"),
        (vlm, tiny.text_inputs(seed=2), variants, {}, "inputs"),
        (VLM(tiny.redraw(tiny.llama(), seed=1)), inputs, variants, {}, "model"),
        (vlm, inputs, variants, {"metric": difference}, "metric or positions"),
        (vlm, inputs, variants, {"positions": -2}, "metric or positions"),
    ]
    for other, given, edits, options, what in others:
        with pytest.raises(InputError, match=f"other {what}: take another folder"):
            other.sweep(given, edits, folder=tmp_path / "sweep", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="not empty"):
        vlm.sweep(inputs, variants, folder=tmp_path / "mine")
    file = next((tmp_path / "sweep").glob("*.safetensors"))
    file.write_bytes(b"1234")
    with pytest.raises(InputError, match="damaged"):
        vlm.sweep(inputs, variants, folder=tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep\.json.*damaged"):
        vlm.sweep(inputs, variants, folder=tmp_path / "sweep")


def test_a_model_in_training_mode_and_other_kernels_share_nothing():
    vlm, inputs = VLM(tiny.llama()), tiny.text_inputs()
    vlm.model.train()
    assert "training mode" in vlm.sweep(inputs, layers()).plan.reason
    vlm.model.eval()
    extra = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    assert "token_type_ids" in vlm.sweep(extra, layers(), dry_run=True).plan.reason
    vlm.model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in vlm.sweep(inputs, layers(), dry_run=True).plan.reason


def test_what_only_the_run_shows_ends_in_the_loop():
    vlm, inputs = VLM(tiny.llama()), tiny.text_inputs()
    want = vlm.sweep(inputs, layers())
    # Something between two blocks, as models do that add image features there; it acts on all tokens alike.
    layer = vlm.model.model.layers[2]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    swept = vlm.sweep(inputs, layers())
    torch.testing.assert_close(swept.logits, _loop(vlm, inputs, layers()), atol=5e-5, rtol=0)
    assert (swept.logits - want.logits).abs().max() > 0.1
    handle.remove()


def _loop(vlm, inputs, variants):
    logits = []
    for edits in variants:
        with torch.no_grad(), vlm.edit(*edits):
            logits.append(vlm(inputs).logits[:, -1])
    return torch.stack(logits)


def test_images_that_see_later_tokens_share_nothing():
    vlm, inputs = VLM(tiny.llama("eager")), tiny.text_inputs((9, 9))
    open_mask = torch.zeros(2, 1, 9, 9)
    open_mask[..., 5:] = torch.finfo(torch.float32).min
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)
    # The first five tokens see one another, as an image's do in some families.
    mask = torch.where(torch.arange(9)[:, None] < 5, open_mask, causal.expand(2, 1, 9, 9))

    def open_up(module, args, kwargs):
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        return (args, {**kwargs, "attention_mask": mask}) if tokens.shape[1] == 9 else None

    handle = vlm.decoder.register_forward_pre_hook(open_up, with_kwargs=True)
    variants = layers(1) + layers(-1)
    swept = vlm.sweep(inputs, variants)
    assert "see later ones" in swept.plan.reason
    torch.testing.assert_close(swept.logits, _loop(vlm, inputs, variants), atol=5e-5, rtol=0)
    handle.remove()


def test_a_raw_site_that_is_no_row_of_tokens():
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = [[Scale("model.layers.1.self_attn.q_proj:output", 2.0, at=-2)], *layers()]
    swept = vlm.sweep(inputs, variants)
    assert not swept.plan.reason and "rows" in " ".join(swept.plan.chunks)
    torch.testing.assert_close(swept.logits, _loop(vlm, inputs, variants), atol=5e-5, rtol=0)


def test_a_model_spread_over_devices():
    accelerate = pytest.importorskip("accelerate")
    vlm, inputs = VLM(tiny.llava()), tiny.image_inputs()
    want = vlm.sweep(inputs, layers()).logits
    # Blocks whose weights accelerate fetches for each call, which it does by the hooks that it uses between devices.
    accelerate.cpu_offload(vlm.model.model.language_model.layers[2], execution_device="cpu")
    accelerate.dispatch_model(
        vlm.model.model.language_model.layers[1], {"": "cpu"}, main_device="cpu", force_hooks=True
    )
    swept = vlm.sweep(inputs, layers())
    assert not swept.plan.reason
    torch.testing.assert_close(swept.logits, want, atol=0, rtol=0)


def test_half_precision():
    vlm, inputs = VLM(tiny.llama().to(torch.bfloat16)), tiny.text_inputs()
    variants = layers() + layers(-3)
    swept = vlm.sweep(inputs, variants)
    want = _loop(vlm, inputs, variants)
    assert swept.logits.dtype == torch.bfloat16
    # 8 bits of precision, four layers with gain 2; single logits differ by a few of their last bits.
    assert (swept.logits - want).abs().float().mean() < 0.02 * want.abs().float().mean()


def test_errors():
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    before = state_of(vlm.model)
    named = VLM(tiny.llama())
    for options, error, match in (
        ({"positions": [-9]}, InputError, "outside row 1"),
        ({"positions": slice(None)}, ShapeError, "6 to 9 tokens"),
        ({"positions": "image[0]"}, KeyError, "carry no names"),
        ({"max_rows": 0}, InputError, "max_rows=0"),
    ):
        with pytest.raises(error, match=match):
            vlm.sweep(inputs, layers(), **options)
    with pytest.raises(NeverFiredError, match="never applied"):
        vlm.sweep(inputs, [*layers(), [Zero("unembed.hook_out", at=0)]])
    with pytest.raises(ShapeError, match="returned"):
        vlm.sweep(inputs, [*layers(), [Function(RESID.format(1), lambda x: x[:, :0], at="last")]])
    for variants in (None, layers()[0][0], "abc", 3):
        with pytest.raises(InputError, match=r"variants=.*one list of edits for each variant"):
            sweep(vlm, inputs, variants)
    with pytest.raises(InputError, match=r"variant 1: expected an edit.*got str"):
        sweep(vlm, inputs, [layers()[0], ["abc"]])
    for given in (["text"], "text", inputs["input_ids"], None):
        with pytest.raises(InputError, match=rf"inputs.*{type(given).__name__}.*vlm.prepare"):
            sweep(vlm, given, layers())
    assert sweep(vlm, inputs, (edits for edits in layers())).logits.shape[0] == 4
    assert state_of(vlm.model) == before and named is not None
