import pytest
import torch
from transformers import AutoModelForCausalLM

from interp import VLM, Replace
from interp.errors import InputError, UnknownNameError
from interp.models import loading
from tests import tiny
from tests.processors import byte_level_tokenizer, llava_processor


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llava")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    tiny.llava(vocab_size=len(tokenizer), image_token=image_token).save_pretrained(folder)
    llava_processor(tokenizer).save_pretrained(folder)
    return folder


def test_a_text_model_from_a_folder(text_folder, tokenizer) -> None:
    vlm = VLM.from_pretrained(text_folder, attn_implementation="eager")
    assert vlm.name == str(text_folder) and vlm.processor is None and not vlm.model.training
    assert vlm.tokenizer("Q:France")["input_ids"] == tokenizer("Q:France")["input_ids"]
    assert vlm.model.config._attn_implementation == "eager"
    fresh = VLM(tiny.llama(vocab_size=len(tokenizer)), tokenizer)
    inputs = fresh.prepare(["Q:France", "Q: the fox"])
    with torch.no_grad():
        torch.testing.assert_close(vlm(inputs).logits[:, -1], fresh(inputs).logits[:, -1], atol=1e-4, rtol=1e-4)
    text = vlm.generate(vlm.prepare(["Q:France"]), decode=True)
    assert len(text) == 1 and isinstance(text[0], str)
    half = VLM.from_pretrained(str(text_folder), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16


def test_a_model_with_images_from_a_folder(image_folder) -> None:
    vlm = VLM.from_pretrained(image_folder, dtype="float32")
    assert vlm.family == "llava" and vlm.processor is not None and vlm.dtype == torch.float32
    assert vlm.tokenizer is vlm.processor.tokenizer


def test_options_are_passed_on(text_folder, monkeypatch) -> None:
    seen = {}
    original = AutoModelForCausalLM.from_pretrained

    def record(source, **options):
        seen.update(options)
        return original(source, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", record)
    VLM.from_pretrained(text_folder, revision="main", low_cpu_mem_usage=True)
    assert seen["revision"] == "main" and seen["low_cpu_mem_usage"] and seen["dtype"] == "auto"


def test_device_maps(text_folder, tmp_path) -> None:
    plain = VLM.from_pretrained(text_folder)
    inputs = plain.prepare(["Q:France", "Q: the fox"])
    edit = Replace("blocks.1.hook_resid_post", torch.ones(32), at="last")
    sites = ["blocks.*.hook_resid_post", "blocks.2.attn.hook_pattern"]
    want = plain.capture(inputs, sites, edits=edit)
    halves = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    halves |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    for device_map in ("cpu", halves):
        vlm = VLM.from_pretrained(text_folder, device_map=device_map, offload_folder=str(tmp_path))
        assert vlm.device == torch.device("cpu")
        acts = vlm.capture(vlm.prepare(["Q:France", "Q: the fox"]), sites, edits=edit)
        assert all(torch.equal(acts[site], want[site]) for site in want)
    with pytest.raises(InputError, match="not both"):
        VLM.from_pretrained(text_folder, device="cpu", device_map="cpu")


def test_what_cannot_be_loaded(tmp_path, text_folder, image_folder) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, error, match in (
        (tmp_path / "missing", InputError, "there is no folder"),
        (str(tmp_path / "missing"), InputError, "cannot load a config"),
        (tmp_path / "empty", InputError, "no config.json"),
        (tmp_path / "other", InputError, "no family table for model_type 'bert'"),
        (tmp_path / "broken", InputError, "cannot load a config"),
        ("zoo:tiny-lava", UnknownNameError, "Did you mean '(zoo:)?tiny-lla"),
    ):
        with pytest.raises(error, match=match):
            VLM.from_pretrained(name)


@pytest.mark.parametrize(
    ("folder", "gone"), [("text_folder", "token"), ("image_folder", "process"), ("text_folder", "model")]
)
def test_folders_with_files_missing(folder, gone, request, tmp_path) -> None:
    for file in request.getfixturevalue(folder).iterdir():
        if not file.name.startswith(gone):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError):
        VLM.from_pretrained(tmp_path)


def test_truncated_weights(text_folder, tmp_path) -> None:
    for file in text_folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(InputError, match="cannot load a model"):
        VLM.from_pretrained(tmp_path)
