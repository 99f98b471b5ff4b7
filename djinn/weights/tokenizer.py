"""The tokenizer of a synthetic checkpoint: one token per byte, so that any text goes in and comes out unchanged."""

from __future__ import annotations

from itertools import count

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast


def byte_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges whose special tokens have the ids that ``config`` names.

    It uses 256 ids besides the special ones; the rest of the vocabulary stays unnamed and decodes to nothing.
    """
    special = {"</s>": config.eos_token_id}
    for token, token_id in (("<s>", config.bos_token_id), ("<pad>", getattr(config, "pad_token_id", None))):
        if token_id is not None and token_id not in special.values():
            special[token] = token_id
    free = (token_id for token_id in count() if token_id not in special.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=special | dict(zip(alphabet, free, strict=False)), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        bos_token="<s>" if "<s>" in special else "</s>",
        pad_token="<pad>" if "<pad>" in special else "</s>",
        clean_up_tokenization_spaces=False,
    )
