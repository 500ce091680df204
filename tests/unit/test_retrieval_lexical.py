"""From any text to query terms: never an error, and what was asked for in the text's own words is found."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from retrieval_kit import add, find_words, ingest, queue

from retrieval.lexical import MAX_QUERY_TERMS, query_terms
from retrieval.store import DocumentStore
from retrieval.words import WordIndex


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = DocumentStore(tmp_path_factory.mktemp("lexical") / "rag.sqlite3")
    for text in TEXTS:
        add(store, text)
    yield store
    store.close()


@pytest.fixture(scope="module")
def own_words(tmp_path_factory):
    store = DocumentStore(tmp_path_factory.mktemp("own") / "rag.sqlite3")
    yield store
    store.close()


@pytest.fixture(scope="module")
def growing():
    return WordIndex()


@pytest.fixture(scope="module")
def filled(store):
    words = WordIndex()
    words.catch_up(store)
    return words


TEXTS = (
    "Set max_model_len to 4096 before you start the server.",
    "Error ERR-4012 means that the disk is full.",
    "Call numpy.linalg.norm with axis=1.",
    "Running processes were listed by the well-known tool.",
    "東京都の天気は晴れです。",
    "한국어 문서를 검색합니다",
    "Der Überblick über die Größe",
    "The oﬃce of the ﬁrst ﬂoor",  # ligatures, as PDFs have them
    "It costs 3.2.1 units and not 321.",
    "The model of the library is small.",
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("what is max_model_len?", TEXTS[0]),
        ("MAX MODEL LEN", TEXTS[0]),
        ("ERR-4012", TEXTS[1]),
        ('"ERR-4012"', TEXTS[1]),
        ("numpy.linalg.norm()", TEXTS[2]),
        ("run a process", TEXTS[3]),
        ("a tool, well known", TEXTS[3]),
        ("東京の天気", TEXTS[4]),
        ("天気", TEXTS[4]),
        ("晴", TEXTS[4]),
        ("검색", TEXTS[5]),
        ("groesse uberblick", TEXTS[6]),
        ("office floor", TEXTS[7]),
        ("3.2.1", TEXTS[8]),
        ("the library's model", TEXTS[9]),
        ("the library’s", TEXTS[9]),
    ],
)
def test_finds(store, words, expected):
    assert find_words(store, words)[0] == expected


@pytest.mark.parametrize("words", ["ERR-4013", "linalg.numpy", "max-model_size", "気天", "3.2.2"])
def test_identifiers_are_phrases(store, words):
    assert find_words(store, words) == []


@pytest.mark.parametrize("words", ["", "   ", "?!", '"', "\0", "(((", "😀", "-", "_", "*", "^:"])
def test_nothing_to_ask_for(words):
    assert query_terms(words) == []


def test_stop_words_are_asked_for_only_alone(store):
    assert query_terms("what is the disk") == ["disk"]
    assert query_terms("to be or not to be") == ["not"]
    assert query_terms("what is it") == ["what", "is", "it"]


def test_long_questions_are_bounded():
    assert len(query_terms(" ".join(f"word{i}" for i in range(5000)))) == MAX_QUERY_TERMS
    assert len(query_terms("x" * 50_000)[0]) == 10_000
    assert len(" ".join(query_terms("\ufdfa" * 10_000))) < 200_000  # one character that folds to eighteen


OPERATORS = st.sampled_from(
    ["AND", "OR", "NOT", "NEAR(", ")", '"', "*", "^", "col:", "{a b}", "+", "-", "'", "\0", "--", ";"]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(OPERATORS | st.text(max_size=5)).map(" ".join)))
@example('text : "a" NEAR("b" "c", 2) NOT d* ^e')
@example("' OR 1=1; DROP TABLE chunks; --")
@example("\ud800 half a character")
def test_any_text_makes_a_valid_query(filled, words):
    filled.search(query_terms(words), 10)
    assert filled.expected_score(query_terms(words)) >= 0


# Letters of several alphabets; NFKC folds some of it
KNOWN = st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc"]) | st.sampled_from(
    "東京ひカ한ﬁ①ĳ’"
)


@settings(max_examples=100, deadline=None)
@given(text=st.text(KNOWN, min_size=1, max_size=30))
def test_a_text_is_found_by_each_of_its_terms(own_words, growing, text):
    document = queue(own_words, text)
    if not document.duplicate_of:
        ingest(own_words, document, text)
    growing.catch_up(own_words)
    for term in query_terms(text):
        rows = [row for row, _ in growing.search([term], 1000)]
        assert document.id in {hit.document_id for hit in own_words.load_hits(rows).values()}
