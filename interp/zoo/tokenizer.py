"""The tokenizer of the small models: a byte-level BPE trained on the text of their world."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.zoo.facts import entities, relations

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
VOCABULARY = 1408


def text() -> Iterator[str]:
    """The text that the merges are learned from: names and answers equally often, and instructions."""
    for relation in relations():
        yield from [relation.instruction, *relation.paraphrases] * 4
    words = {entity.name for entity in entities()}
    words |= {answer for entity in entities() for answer in entity.facts.values()}
    for word in sorted(words):
        yield f"{word}\n" * 3


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Every colon and every line break is a token of its own, so that a prompt's delimiter is always exactly one
    token. Any string survives encoding and decoding, as the bytes are the alphabet.

    Returns:
        A fast tokenizer that puts ``<s>`` first and pads on the left.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(":", "isolated"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
