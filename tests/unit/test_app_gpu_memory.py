"""How the service shares a GPU's memory between prefix states and answers."""

import torch

from app.main import gpu_cache_bytes
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
