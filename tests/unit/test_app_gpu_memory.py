"""How a GPU's memory is shared between prefix states and answers, how much main memory there is, and what else depends
on the device."""

import pytest
import torch

from app import model_loading
from app.model_loading import gpu_cache_bytes, longest_question, main_memory_bytes
from app.settings import load_settings
from model.state import HybridState, StateLayout


def test_by_default_states_leave_a_gpu_room_for_one_answer_in_full():
    layout = StateLayout(2, 1, 2, 4, 6, 3, 4, torch.bfloat16, torch.bfloat16)
    longest = HybridState(layout, "meta")
    longest.reserve(1000)
    settings = load_settings(env_file=None)
    shares = [gpu_cache_bytes(settings, times * longest.nbytes // 2, layout, 1000) for times in (1, 2, 3, 4, 20)]
    assert shares == [0, 0, longest.nbytes // 2, longest.nbytes, 10 * longest.nbytes // 2]
    chosen = load_settings(env_file=None, model={"state_max_bytes": 700}, cache={"gpu_max_bytes": 5})
    assert gpu_cache_bytes(chosen, 1000, layout, 1000) == 5
    chosen = load_settings(env_file=None, model={"state_max_bytes": 700})
    assert gpu_cache_bytes(chosen, 1000, layout, 1000) == 300


def test_main_memory_is_what_a_container_may_have(tmp_path):
    machine = main_memory_bytes(tmp_path)
    assert machine > 1 << 28
    for text, expected in (("max\n", machine), (f"{1 << 27}\n", 1 << 27), (f"{machine * 2}\n", machine)):
        (tmp_path / "memory.max").write_text(text)
        assert main_memory_bytes(tmp_path) == expected


@pytest.mark.parametrize(
    ("device", "answers", "tokens"),
    [
        ("cpu", {}, 8192),
        ("cuda", {}, 0),
        ("cpu", {"max_question_tokens": 9}, 9),
        ("cuda", {"max_question_tokens": 9}, 9),
    ],
)
def test_questions_are_as_long_as_the_device_reads_in_time(monkeypatch, device, answers, tokens):
    monkeypatch.setattr(model_loading, "choose_device", lambda settings: torch.device(device))
    assert longest_question(load_settings(env_file=None, answers=answers)) == tokens
