"""The token format of the shipped model's prompts and answers, used by both training and the service.

`system | documents | question`: the varying part comes last, and each piece is tokenized separately, so that prompts
over the same documents share their token prefix exactly. Fences are special tokens that no text can produce. The
checkpoint's chat template is the same format as text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from model.tokenizer import Tokenizer

SYSTEM_TEXT = "Answer the question with a quote from the documents, or say that they do not hold the answer."
_NAMES = ("im_start", "im_end", "doc", "/doc", "gap", "question", "answer", "quote", "/quote", "none")


def speaks_chat_format(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has every special token of the format."""
    return all(tokenizer.has_special(f"<|{name}|>") for name in _NAMES)


class ChatFormat:
    """Token pieces of `<|im_start|>system`, `<|doc|>d3 title\\ntext<|/doc|>`, `<|question|>…<|answer|>`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        ids = {name: tokenizer.special(f"<|{name}|>") for name in _NAMES}
        self.im_start, self.im_end, self.doc, self.doc_end = ids["im_start"], ids["im_end"], ids["doc"], ids["/doc"]
        self.gap, self.question, self.answer = ids["gap"], ids["question"], ids["answer"]
        self.quote, self.quote_end, self.none = ids["quote"], ids["/quote"], ids["none"]

    def system(self) -> list[int]:
        return [self.im_start, *self.tokenizer.encode(SYSTEM_TEXT + "\n")]

    def document(self, ordinal: int, title: str, passages: Sequence[Sequence[int]]) -> list[int]:
        """One document; `passages`: token ids of its spans, in order, which are separated by `<|gap|>`."""
        return list(itertools.chain(*self.document_pieces(self.document_head(ordinal, title), passages)))

    def document_head(self, ordinal: int, title: str) -> list[int]:
        return [self.doc, *self.tokenizer.encode(f"d{ordinal} {title}\n")]

    def document_pieces(self, head: Sequence[int], passages: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The pieces that `document` concatenates."""
        pieces = [head]
        for i, passage in enumerate(passages):
            pieces += [(self.gap,), passage] if i else [passage]
        return [*pieces, (self.doc_end,)]

    def ask(self, question: str) -> list[int]:
        """The question, up to the start of the answer."""
        return [self.question, *self.tokenizer.encode(question), self.answer]

    def ask_back(self, quote: Sequence[int], question: str, answers: bool = True) -> tuple[list[int], list[int]]:
        """Tokens of a quote, and tokens of the question, the last of which is the verdict whether the quote answers it.

        The likelihood of the latter ranks quotes. Sources: noisy channel (Lewis and Fan, Generative Question Answering,
        2019), and a verifier (Hu et al., Read + Verify, 2019).
        """
        verdict = self.quote if answers else self.none
        said = [*self.tokenizer.encode(question), self.answer, verdict]
        return [self.quote, *quote, self.quote_end, self.question], said

    def citation(self, ordinal: int) -> list[int]:
        """The document id that follows a quote."""
        return self.tokenizer.encode(f"d{ordinal}")

    def quoted_answer(self, quote: Sequence[int], ordinal: int) -> list[int]:
        """The answer that the model is trained on: one quote, as tokenized in the evidence, and its document."""
        return [self.quote, *quote, self.quote_end, *self.citation(ordinal), self.im_end]

    def no_answer(self) -> list[int]:
        return [self.none, self.im_end]
