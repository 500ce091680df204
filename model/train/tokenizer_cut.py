"""Truncates SmolLM2's tokenizer to its first ids and writes it in Hugging Face format.

BPE ids are in merge order, so every prefix of the vocabulary is a valid tokenizer (16,384 ids: about 9% more tokens).
Unused special tokens are renamed to those of our prompt format (`SPECIAL_TOKENS`).
Run: `python -m model.train.tokenizer_cut`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .smollm2 import read_bpe

VOCAB_SIZE = 16_384
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|doc|>",
    "<|/doc|>",
    "<|gap|>",
    "<|question|>",
    "<|answer|>",
    "<|quote|>",
    "<|/quote|>",
    "<|none|>",
    *(f"<|reserved_{i}|>" for i in range(6)),
)
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}\n"
    "{% for document in documents or [] %}<|doc|>d{{ document.id or loop.index }} {{ document.title }}\n"
    "{{ document.text }}<|/doc|>{% endfor %}"
    "{% for message in messages if message.role != 'system' %}"
    "{% if message.role == 'user' %}<|question|>{{ message.content }}<|answer|>"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)


def cut_tokenizer(gguf: Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """The tokenizer of the first `vocab_size` ids, special tokens renamed. Raises ValueError if the file has others."""
    tokens, merges = read_bpe(gguf)
    originals = tokens[: len(SPECIAL_TOKENS)]
    if originals[:3] != list(SPECIAL_TOKENS[:3]) or not all(name.startswith("<") for name in originals):
        raise ValueError(f"{gguf} does not begin with SmolLM2's special tokens but with {originals[:3]}")
    tokens = [*SPECIAL_TOKENS, *tokens[len(SPECIAL_TOKENS) : vocab_size]]
    vocab = {token: i for i, token in enumerate(tokens)}
    kept = [(left, right) for left, right in merges if left + right in vocab and left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=kept))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = cut_tokenizer(args.gguf)
    write_tokenizer(tokenizer, args.out)
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.out}")


if __name__ == "__main__":
    main()
