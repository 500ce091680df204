"""Where an engine's time goes: all of it is in some part, and what was done is counted."""

from __future__ import annotations

from dataclasses import replace

from engine_kit import request, run_all

from model.device_store import DeviceStateStore
from model.engine_times import EngineTimes


def test_every_second_is_in_the_part_that_it_passed_in():
    now = 0.0
    times = EngineTimes(lambda: now)
    now = 2.0
    assert times.seconds == {"idle": 2.0}
    times.enter("prefill")
    now = 5.0
    with times.within("add"):
        now = 5.5
    now = 6.0
    assert times.seconds == {"idle": 2.0, "prefill": 3.0, "add": 0.5}
    times.enter("idle")
    now = 9.0
    assert times.seconds == {"idle": 5.0, "prefill": 3.5, "add": 0.5}


def test_an_engine_counts_what_it_does(make_engine):
    engine = make_engine(DeviceStateStore(1 << 24))
    first = replace(request(300), boundaries=(290,))
    answers = run_all(engine, [first, request(40, 1)])
    tokens = sum(len(answer.token_ids) for answer in answers)
    done = engine.times.done
    assert done["prefill_tokens"] == 340 and done["decoded_tokens"] == tokens - 2
    assert 7 <= done["decode_steps"] <= done["decoded_tokens"]
    parts = engine.times.seconds
    assert set(parts) >= {"idle", "add", "start", "load", "decode", "prefill", "save", "deliver"}
    assert min(parts.values()) >= 0
    run_all(engine, [first])
    assert engine.times.done["prefill_tokens"] == 350
