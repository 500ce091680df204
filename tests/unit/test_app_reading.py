"""How little a reading seems to hold the answer: the model's margin, and the question's words that it lacks."""

import math
from dataclasses import replace

import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, read_events, running_service

from app.answering import NOT_FOUND_TEXT
from app.conversation import missing_words, only_repeats
from app.evidence import Query
from app.reading import chance_nats, none_margin, read_at_once, reads_apart, split_passages
from app.render import measures_of
from model.tokenizer import Tokenizer
from retrieval.types import Evidence, Heading, Passage

EVIDENCE = Evidence(
    tuple(
        Passage(f"d{i}", 1, "c", i, f"{i}.md", title, text, 0, len(text))
        for i, title, text in ((1, "Skerryvore", LIGHTHOUSE), (2, None, GARDEN))
    ),
    "rag",
    90,
)


@pytest.mark.parametrize(
    ("question", "share"),
    [
        ("Who were keepers of lighthouses?", 0),
        ("Does the lighthouse-keeper own a tractor?", 1 / 2),
        ("WHAT ABOUT VISITORS?", 1),
        ("And when?", 0),  # nothing to be missing
        ("", 0),
    ],
)
def test_share_of_the_words_that_were_not_read(question, share):
    assert missing_words(question, [LIGHTHOUSE]) == share


@pytest.mark.parametrize(
    ("question", "quote", "repeats"),
    [
        ("Who was Project Leader for Skerryvore?", "the project leaders", True),
        ("Who was Project Leader for Skerryvore?", "the project leader Stevenson", False),
        ("Is the lamp red or green?", "green", False),
        ("Which sign is it?", "%", False),
    ],
)
def test_a_quote_of_the_questions_words_says_nothing_new(question, quote, repeats):
    assert only_repeats(question, quote) == repeats


def test_words_count_wherever_they_were_read():
    assert missing_words("lighthouse garden zebra", [LIGHTHOUSE, GARDEN]) == 1 / 3
    assert missing_words("lighthouse garden zebra", []) == 1


def test_a_question_too_long_to_be_read_with_each_passage_is_read_once():
    assert reads_apart(EVIDENCE, question_tokens=1024) and not reads_apart(EVIDENCE, question_tokens=1025)
    many = replace(EVIDENCE, passages=4 * EVIDENCE.passages, tokens=7000)
    assert reads_apart(many, question_tokens=1000) and not reads_apart(many, question_tokens=1001)
    assert not reads_apart(replace(EVIDENCE, passages=EVIDENCE.passages[:1]), question_tokens=1)


def test_each_passage_alone_has_its_own_margin():
    lighthouse, garden = split_passages(EVIDENCE)
    assert [lighthouse.passages, garden.passages] == [EVIDENCE.passages[:1], EVIDENCE.passages[1:]]
    question = "Which roses grow at Skerryvore?"  # its title counts as read
    for reading, missing in ((lighthouse, 2 / 3), (garden, 2 / 3), (EVIDENCE, 1 / 3)):
        assert none_margin(question, reading, (-0.5, -2.0), 0.0) == -1.5
        assert none_margin(question, reading, (-0.5, -2.0), 3.0) == pytest.approx(-1.5 + 3 * missing)


def test_a_long_passage_is_read_in_pieces_of_whole_paragraphs():
    text = "\n\n".join(letter * 500 for letter in "abcde")
    passage = replace(EVIDENCE.passages[0], text=text, char_start=70, char_end=70 + len(text))
    pieces = [reading.passages[0] for reading in split_passages(Evidence((passage,), "rag", 600))]
    assert [len(piece.text) for piece in pieces] == [1002, 500, 1002]
    assert all(piece.text == text[piece.char_start - 70 : piece.char_end - 70] for piece in pieces)
    alone = replace(passage, text="x" * 3000, char_end=3070)  # nowhere to cut
    assert [reading.passages for reading in split_passages(Evidence((alone,), "rag", 600))] == [(alone,)]


@pytest.mark.anyio
async def test_a_long_question_is_answered_from_one_prompt(tiny_checkpoint, tmp_path):
    answers = {"read_apart": True, "rag_evidence_tokens": 900}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=answers)) as client:
        for n in range(5):
            await client.upload(f"{n}.md", f"# {n}\n\nThe owl sleeps in hole {n}, far from here.\n" * 3)
        for question, prompts in (("owl?", 5), ("Where does the owl sleep? " * 40, 1)):
            usage = (await client.ask(question, mode="rag"))["usage"]
            service = client.app.state.service
            assert usage["input_tokens"] // service.format.count_prompt(question) in range(prompts, 3 * prompts), usage


@pytest.mark.anyio
async def test_a_passage_longer_than_what_is_advised_is_read_all_the_same(tiny_checkpoint, tmp_path):
    """A word of a language that the tokenizer does not know is many tokens."""
    limits = {"rag_evidence_tokens": 64}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)) as client:
        await client.upload("owl.txt", "Сова спит днём и охотится ночью. " * 3)
        assert (await client.ask("Когда спит сова?", mode="rag"))["citations"]


@pytest.mark.anyio
async def test_where_there_are_no_documents_that_is_said(tiny_checkpoint, tmp_path):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        empty = await client.ask("Who is the keeper?")
        assert (empty["grounding"], empty["text"]) == ("not_found", "There are no documents to answer this from.")
        assert measures_of(empty) == "no document was read"
        await client.upload("a.md", LIGHTHOUSE)
        other = await client.ask("Who is the keeper?", filters={"year": 2024})
        assert other["text"] == "No document has the metadata that the filters ask for."


def test_a_passage_that_is_read_alone_stands_under_the_heading_that_it_does_not_show():
    text = "# Guide\n\n## Oil\n\nCheck.\n\nFill up.\n\n## Air\n\nPump."
    levels = {"Guide": 1, "Oil": 2, "Air": 2}
    headings = tuple(Heading(level, name, text.index(name) - 1 - level) for name, level in levels.items())

    def passage(begin: str, end: str) -> Passage:
        start, stop = text.index(begin), text.index(end) + len(end)
        return Passage("d", 1, "c", 1, "car.md", "Car", text[start:stop], start, stop, headings=headings)

    check, fill = passage("## Oil", "Check."), passage("Fill", "up.")
    both = Evidence((check, fill), "rag", 9)
    assert [reading.passages[0].title for reading in split_passages(both)] == ["Guide — Car", "Oil — Car"]
    assert read_at_once(Evidence((fill,), "rag", 5)).passages[0].title == "Oil — Car"
    assert [read_at_once(evidence) for evidence in (both, replace(both, passages=()))] == [
        both,
        replace(both, passages=()),
    ]
    assert read_at_once(Evidence((replace(fill, headings=()),), "rag", 5)).passages[0].title == "Car"


def test_a_margin_counts_how_many_passages_it_is_the_best_of():
    assert chance_nats(EVIDENCE, readings=2) == math.log(2)
    assert chance_nats(EVIDENCE, readings=8) == math.log(3)
    one = replace(EVIDENCE, passages=EVIDENCE.passages[:1])
    assert chance_nats(one, readings=1) == 0
    long = replace(one.passages[0], text="owl " * 600)
    assert chance_nats(replace(one, passages=(long,)), readings=1) == math.log(2)
    assert chance_nats(replace(one, passages=100 * (long,)), readings=1) == math.log(3)
    assert chance_nats(replace(EVIDENCE, passages=()), readings=1) == 0


@pytest.mark.anyio
async def test_the_best_of_three_passages_is_refused_sooner_than_the_same_passage_alone(tiny_checkpoint, tmp_path):
    limits = {"none_margin": 50, "read_apart": True, "rag_evidence_tokens": 900}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)) as client:
        documents = [
            await client.upload(f"{i}.md", f"# {i}\n\nThe owl sleeps in hole {i}, far from here.\n") for i in range(3)
        ]

        async def margin(document_ids: list[str] | None) -> float:
            query = Query("Where does the owl sleep?", ["default"], document_ids, None, "rag", None, 8)
            answer = await client.app.state.service.start_answer(query)
            await answer.collect()
            return answer.none_margin

        alone = [await margin([document["id"]]) for document in documents]
        assert await margin(None) == pytest.approx(min(alone) + math.log(3), abs=1e-4)


@pytest.mark.anyio
async def test_an_answer_has_no_more_tokens_than_allowed_however_often_it_is_tried(tiny_checkpoint, tmp_path):
    limits = {"none_margin": 50, "rag_evidence_tokens": 64, "max_evidence_tokens": 300}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)) as client:
        for number in range(8):
            await client.upload(f"{number}.md", f"# Owl {number}\n\nOwl number {number} lives in tree {number}.\n" * 4)
        answer = await client.ask("Where does owl 3 live?", max_output_tokens=1)
        assert answer["truncated"] and answer["usage"]["output_tokens"] == 1


@pytest.mark.anyio
@pytest.mark.parametrize("weights", [{"ask_back": 0}, {"ask_back": 0.5}, {"ask_back": 0, "verdict": 1}])
async def test_the_question_is_asked_back_of_quotes_nearly_as_likely(tiny_checkpoint, tmp_path, monkeypatch, weights):
    monkeypatch.setattr("app.likeliest._MAX_GAP", 1000.0)  # random weights: nothing is near
    answers = weights | {"read_apart": True, "rag_evidence_tokens": 900, "quote_beginnings": 6}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=answers)) as client:
        for number in range(3):
            await client.upload(f"{number}.md", f"# {number}\n\nThe owl sleeps in hole {number}, far from here.\n" * 2)
        service, asked = client.app.state.service, []
        generate, tokenizer = service.engine.generate, Tokenizer.load(tiny_checkpoint)
        service.engine.generate = lambda request: (asked.append(request), generate(request))[1]
        answer = await client.ask("Where does the owl sleep?", mode="rag")
        branched = [request for request in asked if request.branches]
        assert len(branched) == any(weights.values())
        for request in branched:
            assert not request.counted and request.salt == asked[0].salt
            document = tokenizer.decode(request.token_ids, skip_special=False).split("<|doc|>")[1]
            assert document.endswith("<|/doc|><|quote|>")
            for ids, scored in zip(*request.branches, strict=True):
                quote, said = (tokenizer.decode(part, skip_special=False) for part in (ids[:-scored], ids[-scored:]))
                assert quote.removesuffix("<|/quote|><|question|>").strip() in document
                assert said == "Where does the owl sleep?<|answer|><|quote|>"
        assert answer["usage"]["input_tokens"] == sum(len(request.token_ids) for request in asked[:3])


@pytest.mark.anyio
@pytest.mark.parametrize(("verdict", "grounding"), [(0, "answered"), (10, "not_found")])
async def test_a_quote_that_hardly_answers_is_refused_before_any_of_it_is_shown(
    tiny_checkpoint, tmp_path, verdict, grounding
):
    """Random weights: that a quote answers is as unlikely as any token."""
    answers = {"verdict": verdict, "ask_back": 0, "none_margin": 20, "quote_beginnings": 3}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=answers)) as client:
        await client.upload("owl.md", "# Owls\n\nThe owl sleeps in a hole, far from here.\n")
        stream = await client.post("/v1/answers", json={"question": "Where does the owl sleep?", "stream": True})
        events = read_events(stream.text)
        (completed,) = (data for name, data in events if name == "answer.completed")
        shown = "".join(data["text"] for name, data in events if name == "answer.text.delta")
        assert completed["grounding"] == grounding
        assert bool(completed["citations"]) == (grounding == "answered")
        assert shown == completed["text"] and completed["sources"]
        assert (shown == NOT_FOUND_TEXT) == (grounding == "not_found")
