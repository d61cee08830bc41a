"""Small real tokenizers of both kinds, and a real LLaVA processor around them."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
CORPUS = [
    "Q:France\nA:Paris\n\nQ:Spain\nA:Madrid\n\nQ:Japan\nA:Tokyo\n\n",
    "Q: the fox\nA: Vulpes vulpes\n\nexample: noon 12:30 -> \n",
    "The capital city of the country: USER ASSISTANT",
] * 3


def byte_level_tokenizer(
    merges: Sequence[tuple[str, str]] | None = None, trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """GPT-2 style: a space is a mark on the word behind it. Trained, unless given its merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if merges is None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim_offsets), _starts_with_bos()]
    )
    return _fast(tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2 style: one is put before the text and after each special token; words and punctuation merge."""
    characters = sorted({c for text in CORPUS for c in text.replace(" ", "▁")} | set("▁0123456789:"))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + 60,
        special_tokens=SPECIAL,
        initial_alphabet=characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator((word for text in CORPUS for word in text.split()), trainer)
    tokenizer.post_processor = _starts_with_bos()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _fast(tokenizer)


def llava_processor(tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> LlavaProcessor:
    """Images become 16 x 16 pixels, hence 4 image tokens of 8 x 8 pixels each."""
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def _starts_with_bos() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
