"""Questions made by rule: what they ask stands in their sentence, and other words ask the same."""

import random

import pytest
import tokenizers
import torch

from model.config import JambaConfig
from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train import evaluate, surgery
from model.train.contexts import Context
from model.train.pair_contexts import widen_answer
from model.train.rephrase import rephrase
from model.train.statement_contexts import StatementContexts, ask_more
from model.train.statements import facts_of
from model.train.tokenizer_cut import SPECIAL_TOKENS


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Kodi is a media centre with a large screen interface.", "What is Kodi?",
         "a media centre with a large screen interface"),
        ("To mute the speaker, press the red key twice.", "How do I mute the speaker?", "press the red key twice"),
        ("You can add a voice by clicking on the stave.", "How can I add a voice?", "by clicking on the stave"),
        ("The --quiet option suppresses all warnings of the parser.",
         "Which option suppresses all warnings of the parser?", "--quiet"),
        ("The lock file was removed because the daemon had stopped.", "Why was the lock file removed?",
         "because the daemon had stopped"),
        ("If the disk is full, the oldest log is deleted.", "What happens if the disk is full?",
         "the oldest log is deleted"),
        ("If the disk is full, remove old logs by hand.", "What should I do if the disk is full?",
         "remove old logs by hand"),
        ("The default timeout of the relay is 30 seconds.", "What is the default timeout of the relay?", "30 seconds"),
        ("The mail relay was written by Wietse Venema in 1998.", "Who wrote the mail relay?", "Wietse Venema"),
        ("The Kestrel engine was released in March 2004.", "When was the Kestrel engine released?", "March 2004"),
        ("Relay maps are stored in /etc/relay/maps.", "Where are Relay maps stored?", "in /etc/relay/maps"),
        ("-q, --quiet | Suppress all the warnings", "What does -q, --quiet do?", "Suppress all the warnings"),
    ],
)  # fmt: skip
def test_a_sentence_answers_the_question_made_of_it(sentence, question, answer):
    text = f"Nothing to ask.\n{sentence}"
    facts = {fact.question: fact for fact in facts_of(text)}
    assert facts[question].answer == answer
    for fact in facts.values():
        assert text[fact.start : fact.start + len(fact.answer)] == fact.answer


@pytest.mark.parametrize(
    "sentence",
    ["It is a list of names that grows.", "This option is used to print the names.", "There are a few things to do."],
)
def test_what_leans_on_its_place_is_not_asked(sentence):
    assert list(facts_of(sentence)) == []


def stories(count: int) -> list[tuple[str, str]]:
    names = [f"Relay{i}" for i in range(count)]
    bodies = [f"{name} is a server that forwards letters of kind {i}. {name} uses the port range {i}00 to {i}99.\n\n"
              f"The --warn{i} option enables warning number {i} of {name}.\n\n"
              f"Box{i} is a cupboard with {i + 2} drawers.\n\nBox{i} holds the spare parts of workshop {i}.\n\n"
              for i, name in enumerate(names)]  # fmt: skip
    return [("Stories", "".join(bodies))]


def test_contexts_of_statements_hold_their_answers_and_only_those():
    contexts, rng = StatementContexts(stories(20)), random.Random(0)
    drawn = [context for context in (contexts.draw(rng, 1500, shortest=80) for _ in range(40)) if context]
    assert drawn
    for context in drawn:
        for question in context.questions:
            if question.answer is not None:
                text = context.passages[question.passage][1]
                assert text[question.start : question.start + len(question.answer)] == question.answer
    unanswerable = [q for context in drawn for q in context.questions if q.answer is None]
    assert unanswerable


def test_more_is_asked_about_a_context_that_had_nothing():
    context = Context(tuple(stories(3)), ())
    assert len(ask_more(context, random.Random(0)).questions) >= 2


def test_rephrasing_keeps_codes_and_says_the_same_with_the_same_seed():
    question = "What is the purpose of --dry-run in /etc/relay.conf?"
    said = [rephrase(question, random.Random(seed)) for seed in range(200)]
    assert said == [rephrase(question, random.Random(seed)) for seed in range(200)]
    assert len(set(said)) > 10
    assert all("--dry-run" in s and "/etc/relay.conf" in s for s in said)


@pytest.mark.parametrize(
    ("question", "passage", "answer", "whole"),
    [
        ("Who wrote it?", "It was written by Ian A. Murdock in Ohio.", "Murdock", "Ian A. Murdock"),
        ("Who wrote it?", "It was written by Ian Murdock in Ohio.", "Ian", "Ian Murdock"),
        ("How long is it?", "It waits for 30 seconds or more.", "30", "30 seconds"),
        ("How many are there?", "There are 30 doors.", "30", "30"),
        ("When was it seen?", "It was seen on the 3rd of May, 1999 by all.", "1999", "3rd of May, 1999"),
        ("On what date was it seen?", "It was seen on December 3rd, 1999.", "1999", "December 3rd, 1999"),
        ("What year was it seen?", "It was seen in December 1999.", "1999", "1999"),
    ],
)
def test_answers_are_whole_names_and_measures(question, passage, answer, whole):
    pair = {"question": question, "passage": passage, "answer": answer, "start": passage.index(answer)}
    widened = widen_answer(pair)
    assert widened["answer"] == whole
    assert passage[widened["start"] :].startswith(whole)


def test_trying_the_right_answer_first_changes_no_answer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer = Tokenizer(backend, eos_id=2)
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocab), "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"mamba_dt_rank": 4, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2}
    model = Jamba(JambaConfig(**(surgery.BASE | shape | {"attn_layer_offset": 0})))
    rng = random.Random(0)
    prompts = [[rng.randrange(len(vocab)) for _ in range(rng.randrange(5, 40))] for _ in range(6)]
    items = [evaluate.Item("dev1", prompt, [], "x", 1) for prompt in prompts]
    evaluate.answer_all(model, tokenizer, items, max_new=9)
    for cut in (1, 4, 9):
        drafted = [evaluate.Item("dev1", item.prompt, [*item.said[:cut], 5, 6], "x", 1) for item in items]
        evaluate.answer_all(model, tokenizer, drafted, max_new=9, tokens=150)
        for item, other in zip(items, drafted, strict=True):
            assert other.said[:9] == item.said[:9]
            assert other.margin == pytest.approx(item.margin, abs=1e-4)


def test_refusals_are_counted_at_the_margin_that_refuses_eight_percent():
    items = [evaluate.Item("dev1", [], [], "x", 1, margin=i) for i in range(100)]
    items += [evaluate.Item("devnone3", [], [], None, 1, margin=i) for i in range(85, 95)]
    none = evaluate.refusals(items)
    assert none == {"dev1": pytest.approx(8, abs=1), "devnone3": pytest.approx(30, abs=10)}
