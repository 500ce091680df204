"""From any text to an FTS5 query: never an error, and what was asked for in the text's own words is found."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from retrieval_kit import add, ingest, queue

from retrieval.lexical import MAX_QUERY_TERMS, build_query
from retrieval.store import DocumentStore, Selection


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


def find(store: DocumentStore, words: str) -> list[str]:
    query = build_query(words)
    rows = [row for row, _ in store.search_lexical(query, Selection(), 10)] if query else []
    hits = store.load_hits(rows)
    return [hits[row].chunk.text for row in rows]


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
    assert find(store, words)[0] == expected


@pytest.mark.parametrize("words", ["ERR-4013", "linalg.numpy", "max-model_size", "気天", "3.2.2"])
def test_identifiers_are_phrases(store, words):
    assert find(store, words) == []


@pytest.mark.parametrize("words", ["", "   ", "?!", '"', "\0", "(((", "😀", "-", "_", "*", "^:"])
def test_nothing_to_ask_for(words):
    assert build_query(words) is None


def test_stop_words_are_asked_for_only_alone(store):
    assert build_query("what is the disk") == '"disk"'
    assert build_query("to be or not to be") == '"not"'
    assert build_query("what is it") == '"what" OR "is" OR "it"'


def test_long_questions_are_bounded():
    assert build_query(" ".join(f"word{i}" for i in range(5000))).count(" OR ") == MAX_QUERY_TERMS - 1
    assert len(build_query("x" * 50_000)) < 10_010
    assert len(build_query("\ufdfa" * 10_000)) < 200_000  # one character that folds to eighteen


OPERATORS = st.sampled_from(
    ["AND", "OR", "NOT", "NEAR(", ")", '"', "*", "^", "col:", "{a b}", "+", "-", "'", "\0", "--", ";"]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(OPERATORS | st.text(max_size=5)).map(" ".join)))
@example('text : "a" NEAR("b" "c", 2) NOT d* ^e')
@example("' OR 1=1; DROP TABLE chunks; --")
@example("\ud800 half a character")
def test_any_text_makes_a_valid_query(store, words):
    find(store, words)


# What both FTS5 (Unicode 6.1) and Python take for letters; NFKC folds some of it
KNOWN = st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc"]) | st.sampled_from(
    "東京ひカ한ﬁ①ĳ’"
)


@settings(max_examples=100, deadline=None)
@given(text=st.text(KNOWN, min_size=1, max_size=30))
def test_a_text_is_found_by_each_of_its_terms(own_words, text):
    document = queue(own_words, text)
    if not document.duplicate_of:
        ingest(own_words, document, text)
    for term in (build_query(text) or "").split(" OR "):
        rows = [row for row, _ in own_words.search_lexical(term, Selection(), 1000)] if term else []
        assert not term or document.id in {hit.document_id for hit in own_words.load_hits(rows).values()}
