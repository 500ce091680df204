"""What benchmarks ask about is what a question came with, whatever was asked before."""

from app.prompting import QuoteFormat
from app.quotes import QuoteLimits, TokenBytes
from app.reading import split_passages
from app.setting_groups import SHIPPED_CHECKPOINT
from bench.asking import evidence_of
from model.tokenizer import Tokenizer


def test_a_text_is_read_as_itself_behind_one_of_the_same_length():
    tokenizer, vocabulary = Tokenizer.load(SHIPPED_CHECKPOINT), TokenBytes.read(SHIPPED_CHECKPOINT)
    prompts = QuoteFormat(tokenizer, vocabulary, max_context_tokens=1000)
    for colour in ("red", "old"):
        prompt = prompts.build_prompt("Which lamp?", evidence_of([("Lamps", f"The lamp is {colour}.")]))
        assert f"The lamp is {colour}." in tokenizer.decode(list(prompt.token_ids), skip_special=False)


def test_a_text_may_stand_first_in_one_evidence_and_second_in_another():
    tokenizer, vocabulary = Tokenizer.load(SHIPPED_CHECKPOINT), TokenBytes.read(SHIPPED_CHECKPOINT)
    prompts = QuoteFormat(tokenizer, vocabulary, max_context_tokens=1000)
    lamp, owl = ("Lamps", "The lamp is red."), ("Owls", "An owl sees at night.")
    for texts in ([owl, lamp], [lamp, owl]):
        place = texts.index(lamp)
        evidence = split_passages(evidence_of(texts))[place]
        form = prompts.answer_tokens(evidence)
        quote = [form.quote, *tokenizer.encode("The lamp is red."), form.end_quote]
        assert prompts.constrain(evidence, QuoteLimits()).allowed(quote)[0] == form.document_ids[place + 1][0]
