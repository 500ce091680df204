import json
import random

import pytest
from engine_kit import SPECIALS, TOKENIZER, byte_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import StreamDecoder, Tokenizer

# without surrogates, which are not text; with special tokens written out and pieces of them
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, "<|", "|>", "<|doc", "é", "漢", "😀"]))).map("".join)


@given(TEXTS)
@settings(deadline=None)
def test_encode_round_trips_and_never_yields_a_special_token(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not any(TOKENIZER.is_control(token_id) for token_id in ids)


@given(TEXTS)
@settings(deadline=None)
def test_offsets_cover_the_text_in_order(text):
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    last = (0, 0)
    for start, end in offsets:
        assert (start, end) == last or start == last[1] < end  # tokens of one split character share its place
        last = (start, end)
    assert last[1] == len(text)


def test_text_that_merges_into_a_special_token_is_still_plain():
    merges = [("<", "|"), ("<|", "d"), ("<|d", "o"), ("<|do", "c"), ("<|doc", "|"), ("<|doc|", ">")]
    backend = byte_backend(merges)
    assert SPECIALS.index("<|doc|>") in backend.encode("a<|doc|>").ids
    tokenizer = Tokenizer(backend)
    text = "a<|doc|><|doc|>é"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert not any(tokenizer.is_control(token_id) for token_id in ids)
    assert tokenizer.decode(ids) == text
    assert [text[start:end] for start, end in offsets[:3]] == ["a", "<", "|"]
    assert offsets[-1][1] == len(text)
    assert [one.tolist() for one in tokenizer.encode_many(["a", text])] == [tokenizer.encode("a"), ids]


@given(st.lists(TEXTS))
@settings(deadline=None)
def test_many_texts_are_cut_as_each_alone(texts):
    assert [ids.tolist() for ids in TOKENIZER.encode_many(texts)] == [TOKENIZER.encode(text) for text in texts]


@given(st.lists(st.integers(min_value=0, max_value=len(SPECIALS) + 255)), st.booleans())
@settings(deadline=None)
def test_streamed_text_equals_text_decoded_at_once(ids, skip_special):
    """Any tokens: a model may well produce bytes that are no UTF-8."""
    decoder = StreamDecoder(TOKENIZER, skip_special)
    streamed = "".join([*map(decoder.push, ids), decoder.finish()])
    assert streamed == TOKENIZER.decode(ids, skip_special)


def test_stream_never_shows_half_a_character():
    text = "naïve 漢字 😀!"
    decoder = StreamDecoder(TOKENIZER)
    pushes = [decoder.push(token_id) for token_id in TOKENIZER.encode(text)]
    assert "".join(pushes) == text
    assert [push for push in pushes if push] == list(text)
    assert decoder.finish() == ""


def test_unfinished_character_comes_out_at_the_end():
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push(TOKENIZER.encode("é")[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_by_name():
    assert [TOKENIZER.special(name) for name in SPECIALS] == list(range(len(SPECIALS)))
    assert TOKENIZER.vocab_size == len(SPECIALS) + 256
    with pytest.raises(ValueError, match=r"no special token '<\|nope\|>'"):
        TOKENIZER.special("<|nope|>")
    ids = [TOKENIZER.special("<|quote|>"), *TOKENIZER.encode("x"), TOKENIZER.special("<|/quote|>")]
    assert TOKENIZER.decode(ids) == "x"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|quote|>x<|/quote|>"


@pytest.mark.parametrize(
    ("files", "eos_id"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "config.json": {"eos_token_id": 0}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, 0),
        ({"config.json": {"eos_token_id": [2, 0]}}, 2),
        ({"config.json": {"eos_token_id": 5}}, 5),
        ({}, None),
    ],
)
def test_load_finds_the_end_token(tmp_path, files, eos_id):
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == eos_id
    text = "".join(random.Random(0).choices("ab é漢😀<|doc|>", k=200))
    assert tokenizer.encode(text) == TOKENIZER.encode(text)


def test_load_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
