"""Quotes: what the constraint lets a model write, and where a quote is found in the stored text."""

import random

import pytest
from app_kit import GARDEN, LIGHTHOUSE
from hypothesis import given
from hypothesis import strategies as st

from app.prompting import QuoteFormat
from app.quotes import QuoteConstraint, QuoteIndex, QuoteLimits, TokenBytes, locate_quote, normalize
from model.tokenizer import Tokenizer
from retrieval.types import Evidence, Passage

UNICODE = "Größe: ﬁnal “quotes” — naïve café 漢字の引用 🦉 owl.\n"


def passage(text: str, ordinal: int = 1, start: int = 0) -> Passage:
    document_id = f"doc_{ordinal}_{text}"  # id, version and span stand for the text
    return Passage(document_id, 1, "default", ordinal, f"{ordinal}.txt", None, text, start, start + len(text))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Tokenizer.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def vocabulary(tiny_checkpoint):
    return TokenBytes.read(tiny_checkpoint)


@pytest.fixture
def prompt_format(tokenizer, vocabulary):
    return QuoteFormat(tokenizer, vocabulary, max_context_tokens=4096)


def constraint(prompt_format, *passages, **limits) -> QuoteConstraint:
    return prompt_format.constrain(Evidence(passages, "rag", 0), QuoteLimits(**limits))


def write_freely(constraint, choose, end_id, limit=400) -> list[int]:
    """Let `choose` pick among the allowed ids until the answer ends."""
    generated: list[int] = []
    while not generated or generated[-1] != end_id:
        assert len(generated) < limit
        allowed = list(constraint.allowed(generated))
        assert allowed
        generated.append(choose(allowed))
    return generated


def test_token_bytes_spell_what_the_tokenizer_decodes(tokenizer, vocabulary):
    for text in (LIGHTHOUSE, UNICODE):
        assert b"".join(vocabulary.bytes_of[i] for i in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_model_prefers_its_quotes_stand_in_the_evidence(tokenizer, prompt_format, seed):
    rng = random.Random(seed)
    passages = (passage(LIGHTHOUSE, 3), passage(GARDEN, 12), passage(UNICODE, 1))
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    rules = constraint(prompt_format, *passages, allow_none=False, max_quote_tokens=rng.choice([1, 5, 40]))
    ids = write_freely(rules, rng.choice, tokens.end)
    text = tokenizer.decode(ids[:-1], skip_special=False)
    groups = [group.split("<|/quote|>") for group in text.split("<|quote|>")[1:]]
    assert 1 <= len(groups) <= 4
    for quote, cited in groups:
        held_by = {f"d{p.ordinal}" for p in passages if quote in p.text}
        assert cited.strip() in held_by
        assert quote.strip()


@pytest.mark.parametrize("seed", range(10))
def test_a_constraint_goes_back_from_tokens_that_were_only_guessed(prompt_format, seed):
    rng, passages = random.Random(seed), (passage(LIGHTHOUSE, 3), passage(GARDEN, 12))
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    guessing, plain = (constraint(prompt_format, *passages) for _ in range(2))
    generated: list[int] = []
    while not generated or generated[-1] != tokens.end:
        guess = list(generated)
        for _ in range(rng.randrange(4)):
            if guess[-1:] != [tokens.end]:
                guess.append(rng.choice(list(guessing.allowed(guess))))
        allowed = list(guessing.allowed(generated))
        assert allowed == list(plain.allowed(generated))
        generated.append(rng.choice(allowed))


@pytest.mark.parametrize(
    "span",
    [
        "built in 1844 by Alan Stevenson",
        " built in 1844",
        "Moira Campbell",
        " Moira Campbell",
        "48 metres",
        "The keeper",
    ],
)
def test_any_span_may_be_quoted_in_its_own_tokens(tokenizer, prompt_format, span):
    passages = (passage(LIGHTHOUSE, 3), passage(GARDEN, 4))
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    answer = [tokens.quote, *tokenizer.encode(span), tokens.end_quote, *tokens.document_ids[3], tokens.end]
    rules = constraint(prompt_format, *passages)
    for position, token_id in enumerate(answer):
        assert token_id in rules.allowed(answer[:position]), tokenizer.decode(answer[: position + 1])


def test_a_quote_does_not_run_from_one_passage_into_the_next(tokenizer, prompt_format):
    rules = constraint(prompt_format, passage("one two", 1), passage(" three four", 2))
    tokens = prompt_format.answer_tokens(Evidence((passage("one two", 1),), "rag", 0))
    generated = [tokens.quote, *tokenizer.encode("one two")]
    assert set(rules.allowed(generated)) == {tokens.end_quote}


def test_a_quote_neither_starts_nor_ends_inside_a_word(tokenizer, prompt_format):
    rules = constraint(prompt_format, passage("unforgettable"))
    tokens = prompt_format.answer_tokens(Evidence((passage("x"),), "rag", 0))
    first = {tokenizer.decode([token_id]) for token_id in rules.allowed([tokens.quote])}
    assert all("unforgettable".startswith(piece) for piece in first)
    assert tokens.end_quote not in rules.allowed([tokens.quote, *tokenizer.encode("unf")])


def test_only_documents_that_hold_the_quote_may_be_cited(tokenizer, prompt_format):
    passages = (passage("the owl", 1), passage("the owl and the fox", 12), passage("the fox", 2))
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    rules = constraint(prompt_format, *passages)
    head = [tokens.quote, *tokenizer.encode("the owl"), tokens.end_quote]
    d, one, two = tokenizer.encode("d12")
    assert list(rules.allowed(head)) == [d]
    assert list(rules.allowed([*head, d])) == [one]
    after_d1 = set(rules.allowed([*head, d, one]))
    assert after_d1 == {two, tokens.end, *tokens.separator}
    assert tokens.quote in rules.allowed([*head, d, one, *tokens.separator])


def test_a_repeated_quote_ends_the_answer(tokenizer, prompt_format):
    passages = (passage("the owl and the fox", 1),)
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    once = [tokens.quote, *tokenizer.encode("the owl"), tokens.end_quote, *tokens.document_ids[1]]
    rules = constraint(prompt_format, *passages)
    assert list(rules.allowed([*once, *tokens.separator, *once])) == [tokens.end]


def test_the_way_out_is_there_only_at_the_beginning_and_only_if_wanted(prompt_format):
    tokens = prompt_format.answer_tokens(Evidence((passage("x"),), "rag", 0))
    assert set(constraint(prompt_format, passage("an owl")).allowed([])) == {tokens.quote, tokens.none}
    assert set(constraint(prompt_format, passage("an owl"), allow_none=False).allowed([])) == {tokens.quote}
    assert list(constraint(prompt_format, passage("an owl")).allowed([tokens.none])) == [tokens.end]


def test_rules_do_not_depend_on_how_often_they_were_asked(tokenizer, prompt_format):
    passages = (passage(LIGHTHOUSE, 3),)
    tokens = prompt_format.answer_tokens(Evidence(passages, "rag", 0))
    answer = [tokens.quote, *tokenizer.encode("built in 1844"), tokens.end_quote, *tokens.document_ids[3]]
    asked = constraint(prompt_format, *passages)
    for end in range(len(answer) + 1):
        fresh = constraint(prompt_format, *passages)
        assert list(asked.allowed(answer[:end])) == list(fresh.allowed(answer[:end]))
    assert set(asked.allowed([])) == {tokens.quote, tokens.none}  # and back again


@given(text=st.text(min_size=1, max_size=60), seed=st.integers(0, 10_000))
def test_any_text_can_be_evidence(prompt_format_static, text, seed):
    prompt_format, tokenizer = prompt_format_static
    rules = constraint(prompt_format, passage(text), allow_none=False, max_quote_tokens=8)
    tokens = prompt_format.answer_tokens(Evidence((passage(text),), "rag", 0))
    ids = write_freely(rules, random.Random(seed).choice, tokens.end)
    for group in tokenizer.decode(ids, skip_special=False).split("<|quote|>")[1:]:
        assert group.split("<|/quote|>")[0] in text


@pytest.fixture(scope="module")
def prompt_format_static(tokenizer, vocabulary):
    return QuoteFormat(tokenizer, vocabulary, max_context_tokens=4096), tokenizer


def test_an_index_of_much_text_is_made_once(vocabulary):
    index = QuoteIndex([passage(LIGHTHOUSE * 50)], vocabulary)
    assert index.first_ids == QuoteIndex([passage(LIGHTHOUSE)], vocabulary).first_ids


def test_a_quote_is_located_exactly_and_as_whole_words():
    found = locate_quote(" keeper of the lighthouse ", [passage(GARDEN, 1), passage(LIGHTHOUSE, 2, start=100)])
    assert found is not None
    assert (found.passage.ordinal, found.verification) == (2, "exact")
    assert found.text == "keeper of the lighthouse" == LIGHTHOUSE[found.char_start - 100 : found.char_end - 100]
    he = locate_quote("he", [passage("The owl, he said")])
    assert he is not None and he.char_start == 9


def test_the_cited_document_comes_first_then_the_others():
    passages = [passage("the owl", 1), passage("the owl", 2)]
    assert locate_quote("the owl", passages, ordinal=2).passage.ordinal == 2
    assert locate_quote("the owl", passages, ordinal=7).passage.ordinal == 1


@pytest.mark.parametrize(
    ("stored", "quote"),
    [
        ("the ﬁnal of\u00adﬁce", "final office"),
        ("a  long\n line of\ttext", "long line of text"),
        ("an inter-\nnational treaty", "an international treaty"),
        ("she said “it’s late” – twice", 'said "it\'s late" - twice'),
        ("ｆｕｌｌ width", "full width"),
    ],
)
def test_typesetting_is_undone_and_the_stored_words_are_cited(stored, quote):
    found = locate_quote(quote, [passage("before " + stored + " after")])
    assert found is not None and found.verification == "normalized"
    assert found.text in stored and found.text.split()[-1] == stored.split()[-1]


@pytest.mark.parametrize("quote", ["", "  ", "the Keeper", "built in 1845", "lighthous of", "keeper lighthouse"])
def test_what_is_not_there_is_not_found(quote):
    assert locate_quote(quote, [passage(LIGHTHOUSE)]) is None


@given(st.text(max_size=80))
def test_normalized_characters_know_where_they_come_from(text):
    normalized, spans = normalize(text)
    assert len(normalized) == len(spans)
    assert spans == sorted(spans)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert normalize(normalized)[0] == normalized
