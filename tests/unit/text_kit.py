"""What tests of the text format share: a tokenizer without the quote tokens, chat templates, passages."""

from app_kit import GARDEN, LIGHTHOUSE
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from app.chat_template import PLAIN_TEMPLATE
from model.tokenizer import Tokenizer
from retrieval.types import Passage

MARKS = ("<|start|>", "<|bom|>", "<|eom|>", "<|system|>", "<|user|>", "<|assistant|>", "<docs>", "</docs>")
TOKENS = {"bos_token": "<|start|>"}
# in the manner of Jamba's: the documents, numbered by their place, before the last question
SECTION = """{{ bos_token }}
{%- for message in messages %}
{%- if loop.last and documents %}
{{- "<|bom|><|system|> <docs>" }}
{%- for document in documents %}
{{- "\\n\\n## Document ID: " ~ loop.index0 ~ "\\nTitle: " ~ document.title ~ "\\nText: " ~ document.text }}
{%- endfor %}
{{- "\\n</docs><|eom|>" }}
{%- endif %}
{{- "<|bom|><|" ~ message.role ~ "|> " ~ message.content ~ "<|eom|>" }}
{%- endfor %}
{{- "<|bom|><|assistant|>" if add_generation_prompt }}"""
NO_SECTION = SECTION.replace("if loop.last and documents", "if false")
NO_SYSTEM = NO_SECTION.replace(
    '{{- "<|bom|><|" ~ m',
    "{%- if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{- \"<|bom|><|\" ~ m",
)
TEMPLATES = {"section": SECTION, "no section": NO_SECTION, "no system": NO_SYSTEM, "plain": PLAIN_TEMPLATE}


def byte_backend() -> Backend:
    """A token a byte, and the marks of a chat; one of them is not declared special, as happens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=name != "<docs>", normalized=False) for name in MARKS])
    return backend


TOKENIZER = Tokenizer(byte_backend())


def passage(ordinal: int, text: str, start: int = 0, title: str | None = None) -> Passage:
    return Passage(f"doc_{ordinal}", 1, "default", ordinal, f"{ordinal}.md", title, text[start:], start, len(text))


PASSAGES = (passage(2, LIGHTHOUSE), passage(5, GARDEN), passage(5, GARDEN, start=30))
