"""Evidence: within the budget, each span once, canonical order, text exactly as stored."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_kit import HashEmbedder, add, ingest, queue, sha

from retrieval.index import FaissIndex
from retrieval.location import heading_path, locate
from retrieval.packing import BudgetTooSmall, Place, RecentEvidence, pack_evidence
from retrieval.search import Retriever
from retrieval.store import CollectionNotFound, DocumentStore
from retrieval.types import Chunk, Heading, Location, Page, ParsedDocument, SearchParams

COUNT = lambda passages: 3 + sum(1 + len(passage.text.split()) for passage in passages)


@pytest.fixture
def store(store):
    store.create_collection("other")
    return store


def search(store: DocumentStore, query: str, collections=("default",), number: int = 10):
    embedder = HashEmbedder()
    index = FaissIndex(embedder.dim, embedder.name)
    return Retriever(store, index, embedder).search(query, collections, SearchParams(number, mode="lexical"))


def spans(evidence) -> list[tuple[int, str]]:
    return [(passage.ordinal, passage.text) for passage in evidence.passages]


def test_hits_stand_in_canonical_order_and_relevance_says_the_rest(store):
    late = [add(store, f"filler {i}\n\n{'apple ' * (i + 1)}\n\nmore filler {i}") for i in range(4)]
    hits = search(store, "apple")
    assert [hit.document_id for hit in hits] != [document.id for document in late]
    evidence = pack_evidence(store, ["default"], hits, 10 + 4 * 4, COUNT)
    assert [text.strip() for _, text in spans(evidence)] == [
        "apple",
        "apple apple",
        "apple apple apple",
        "apple " * 3 + "apple",
    ]
    assert evidence.relevance == tuple(hit.document_id for hit in hits)
    assert evidence.tokens == 26


def test_the_same_documents_are_the_same_evidence_whatever_was_asked(store):
    for i in range(3):
        add(store, f"apple {i}\n\npear {i}")
    one, two = (pack_evidence(store, ["default"], search(store, q), 500, COUNT) for q in ("apple", "pear"))
    assert one.passages == two.passages


SECTIONS = "Intro\n\nA\n\na one apple\n\na two\n\nB\n\nb one\n\nb two"
HEADINGS = (Heading(1, "A", SECTIONS.index("A\n")), Heading(1, "B", SECTIONS.index("B\n")))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4 + 3, ["a one apple"]),
        (4 + 5, ["a one apple\n\na two"]),  # the section does not fit, the next chunk does
        (4 + 6, ["A\n\na one apple\n\na two"]),  # the section
        (500, ["A\n\na one apple\n\na two"]),
    ],
)
def test_hits_grow_to_sections_then_to_neighbours(store, budget, expected):
    ingest(store, queue(store, SECTIONS), SECTIONS, headings=HEADINGS)
    evidence = pack_evidence(store, ["default"], search(store, "apple"), budget, COUNT)
    assert [text for _, text in spans(evidence)] == expected


def test_a_budget_that_holds_no_passage_is_told_what_the_best_takes(store):
    ingest(store, queue(store, SECTIONS), SECTIONS, headings=HEADINGS)
    hits = search(store, "apple two")
    with pytest.raises(BudgetTooSmall, match=r"1 tokens of evidence hold none .* takes \d") as raised:
        pack_evidence(store, ["default"], hits, 1, COUNT)
    assert pack_evidence(store, ["default"], hits, raised.value.needed_tokens, COUNT).passages
    assert pack_evidence(store, ["default"], [], 1, COUNT).passages == ()


def test_hits_grow_to_pages_where_there_are_no_headings(store):
    text = "one\n\ntwo apple\n\nthree\n\nfour\n\nfive"
    pages = (Page(1, None, 0, 21), Page(2, None, 23, 33))
    ingest(store, queue(store, text), text, pages=pages)
    evidence = pack_evidence(store, ["default"], search(store, "apple"), 500, COUNT)
    assert [text for _, text in spans(evidence)] == ["one\n\ntwo apple\n\nthree"]


def test_stale_hits_are_left_out(store):
    document = add(store, "an apple")
    gone = add(store, "an apple pie")
    hits = search(store, "apple")
    new, _ = store.replace_document(document.id, "b", "text/plain", 3, sha("plum"))
    ingest(store, new, "plum")
    store.delete_document(gone.id)
    assert pack_evidence(store, ["default"], hits, 100, COUNT).passages == ()


def test_selection(store):
    one, _ = add(store, "one", lang="en"), add(store, "two", lang="de")
    hits = search(store, "one two")
    for number, selection in ((1, {"document_ids": [one.id]}), (2, {"filters": {"lang": "de"}})):
        evidence = pack_evidence(store, ["default"], hits, 99, COUNT, **selection)
        assert [passage.ordinal for passage in evidence.passages] == [number]
    with pytest.raises(CollectionNotFound):
        pack_evidence(store, ["nowhere"], [], 99, COUNT)


WORDS = st.lists(st.sampled_from(["apple", "pear", "plum", "fig"]), min_size=1, max_size=8).map(" ".join)
DOCUMENTS = st.lists(st.lists(WORDS, min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), documents=DOCUMENTS, budget=st.integers(0, 150), overlap=st.integers(0, 20))
def test_invariants(tmp_path_factory, data, documents, budget, overlap):
    """Any library, overlapping chunks, any budget: budget kept, order canonical, no character twice, text as stored."""
    store = DocumentStore(tmp_path_factory.mktemp("pack") / "rag.sqlite3")
    try:
        for number, paragraphs in enumerate(documents):
            text = f"Doc {number}\n\n" + "\n\n".join(paragraphs)
            heads = data.draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 3)), max_size=4))
            headings = tuple(Heading(level, "h", start) for start, level in sorted(heads))
            ingest_overlapping(store, text, headings, overlap)
        hits = search(store, data.draw(WORDS), number=20)
        try:
            evidence = pack_evidence(store, ["default"], hits, budget, COUNT)
        except BudgetTooSmall as error:
            assert hits and budget < error.needed_tokens < 60
            return
        check(store, evidence, budget)
        assert pack_evidence(store, ["default"], hits, budget, COUNT) == evidence
        assert evidence.passages or not hits
    finally:
        store.close()


def ingest_overlapping(store: DocumentStore, text: str, headings: tuple[Heading, ...], overlap: int) -> None:
    document = queue(store, text)
    if document.duplicate_of:
        return
    embedder = HashEmbedder()
    found = [(max(0, m.start() - overlap), m.end()) for m in re.finditer(r"[^\n]+", text)]
    chunks = [Chunk(f"c{i}", document.id, i, a, b, text[a:b]) for i, (a, b) in enumerate(found)]
    vectors = embedder.embed_passages([chunk.text for chunk in chunks])
    parsed = ParsedDocument(text, (), headings)
    store.replace_chunks(document.id, parsed, chunks, vectors, embedder.name, version=1)


def check(store: DocumentStore, evidence, budget: int) -> None:
    assert evidence.tokens <= budget
    grouped: dict[str, list] = {}
    for passage in evidence.passages:
        grouped.setdefault(passage.document_id, []).append(passage)
        assert passage.text == store.get_text(passage.document_id)[passage.char_start : passage.char_end]
        assert passage.text
    assert evidence.tokens == sum(COUNT(passages) for passages in grouped.values())
    order = [(passage.ordinal, passage.char_start) for passage in evidence.passages]
    assert order == sorted(order)
    for passages in grouped.values():
        for before, after in itertools.pairwise(passages):
            gap = store.get_text(before.document_id)[before.char_end : after.char_start]
            assert gap.strip()
            assert before.char_end <= after.char_start
    assert set(evidence.relevance) <= set(grouped)


def test_evidence_begins_as_earlier_evidence_did_and_goes_on_with_what_it_lacks(store):
    for i in range(6):
        add(store, f"apple {i}" if i % 2 else f"pear {i}\n\nand {'more ' * 20}")
    recent = RecentEvidence()
    pears = pack_evidence(store, ["default"], search(store, "pear"), 200, COUNT, recent=recent)
    recent.remember(pears)
    asked = search(store, "pear apple")
    plain, ours = (pack_evidence(store, ["default"], asked, 200, COUNT, recent=r) for r in (None, recent))
    assert [ordinal for ordinal, _ in spans(plain)] == [1, 2, 3, 4, 5, 6]
    assert spans(ours) == [*spans(pears), (2, "apple 1"), (4, "apple 3"), (6, "apple 5")]
    assert (ours.tokens, ours.relevance) == (plain.tokens, plain.relevance)
    alone = pack_evidence(store, ["default"], search(store, "apple"), 200, COUNT, recent=recent)
    assert [ordinal for ordinal, _ in spans(alone)] == [2, 4, 6], "a beginning without a hit is no gain"


def test_a_beginning_is_of_documents_as_they_are_and_of_the_same_collections(store):
    first, second = add(store, "apple one"), add(store, "apple two\n\npear")
    add(store, "apple", "other")
    recent = RecentEvidence()
    recent.remember(pack_evidence(store, ["default"], search(store, "one two"), 50, COUNT))
    both = search(store, "apple", ("default", "other"))
    passages = pack_evidence(store, ["default", "other"], both, 50, COUNT, recent=recent).passages
    assert passages == pack_evidence(store, ["default", "other"], both, 50, COUNT).passages
    hits = search(store, "two")
    selected = pack_evidence(store, ["default"], hits, 50, COUNT, document_ids=[second.id], recent=recent)
    assert {passage.document_id for passage in selected.passages} == {second.id}
    new, _ = store.replace_document(first.id, "b", "text/plain", 4, sha("plum"))
    ingest(store, new, "plum")
    after = pack_evidence(store, ["default"], search(store, "plum two"), 50, COUNT, recent=recent)
    assert {text for _, text in spans(after)} == {"plum", "apple two\n\npear"}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), documents=DOCUMENTS, budgets=st.lists(st.integers(0, 90), min_size=2, max_size=6))
def test_beginning_alike_loses_no_hit_and_is_never_more_to_read(tmp_path_factory, data, documents, budgets):
    store = DocumentStore(tmp_path_factory.mktemp("pack") / "rag.sqlite3")
    recent, read = RecentEvidence(), set()
    try:
        for number, paragraphs in enumerate(documents):
            ingest_overlapping(store, f"Doc {number}\n\n" + "\n\n".join(paragraphs), (), overlap=number % 2 * 8)
        for budget in budgets:
            hits = search(store, data.draw(WORDS), number=data.draw(st.integers(1, 8)))
            try:
                plain, ours = (
                    pack_evidence(store, ["default"], hits, budget, COUNT, recent=r, recent_tokens=100)
                    for r in (None, recent)
                )
            except BudgetTooSmall:
                continue
            assert plain.tokens <= budget and ours.tokens <= max(budget, 100) and ours.relevance == plain.relevance
            places = {id(evidence): list(map(Place.of, evidence.passages)) for evidence in (plain, ours)}
            for hit in hits:
                held = [
                    any(place.holds(Place.of_hit(hit)) for place in places[id(evidence)]) for evidence in (plain, ours)
                ]
                assert held[1] >= held[0]
            assert new_tokens(ours, read) <= new_tokens(plain, read)
            for one, other in itertools.combinations(ours.passages, 2):
                apart = one.char_end <= other.char_start or other.char_end <= one.char_start
                assert apart or one.document_id != other.document_id
            recent.remember(ours)
            read.update(beginnings_of(ours))
    finally:
        store.close()


def beginnings_of(evidence) -> list[tuple]:
    """The evidence up to the end of each of its documents."""
    groups = [tuple(group) for _, group in itertools.groupby(evidence.passages, key=lambda one: one.document_id)]
    return [tuple(groups[:end]) for end in range(1, len(groups) + 1)]


def new_tokens(evidence, read: set[tuple]) -> int:
    """What a model has to read that has read these beginnings."""
    known = [beginning for beginning in beginnings_of(evidence) if beginning in read]
    return evidence.tokens - sum(map(COUNT, max(known, key=len, default=())))


PAGES = (Page(1, "i", 0, 10), Page(2, "ii", 12, 20), Page(3, None, 20, 30))
TREE = (Heading(1, "A", 2), Heading(2, "B", 8), Heading(1, "C", 15), Heading(3, "D", 20))


@pytest.mark.parametrize(
    ("start", "end", "pages"),
    [(0, 10, (1, 1)), (9, 13, (1, 2)), (10, 12, (1, 1)), (12, 20, (2, 2)), (5, 30, (1, 3)), (30, 30, (3, 3))],
)
def test_pages_of_a_span(start, end, pages):
    assert locate(PAGES, (), start, end) == Location(start, end, *pages)
    assert locate((), (), start, end) == Location(start, end)


@pytest.mark.parametrize(
    ("position", "path"), [(0, ()), (2, ("A",)), (8, ("A", "B")), (14, ("A", "B")), (15, ("C",)), (25, ("C", "D"))]
)
def test_headings_over_a_position(position, path):
    assert heading_path(TREE, position) == path
    assert locate(PAGES, TREE, position, position + 1).heading_path == path
