"""Other ways to share the work of linear.cu than `gpu_linear` has in its tables, as cases of bench/gpu_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from model.config import JambaConfig
from model.kernels import gpu, gpu_build, gpu_linear
from model.kernels.gpu_linear import PAIRED, SINGLE, Tiling

# by tiles of 8 tokens: row_tiles, warps_n, warps_k, depth, resident, blocks, stages (none: not staged)
SINGLE_VARIANTS = {
    1: [(1, 1, 8, 2, 3, 3), (1, 1, 8, 4, 2, 2), (1, 1, 16, 2, 1, 1)],
    2: [(1, 2, 4, 2, 2, 2), (1, 1, 8, 2, 2, 2), (1, 1, 16, 2, 1, 1), (1, 4, 4, 2, 1, 1, 3), (2, 4, 2, 2, 1, 1, 3)],
    4: [(2, 1, 8, 2, 1, 1), (2, 4, 2, 2, 1, 1, 3), (2, 4, 1, 2, 2, 2, 3), (2, 8, 1, 2, 1, 1, 4), (4, 4, 2, 1, 1, 1, 3)],
    8: [(2, 4, 2, 2, 1, 1, 3), (2, 8, 1, 2, 1, 1, 3), (2, 4, 1, 2, 2, 2, 2), (2, 4, 2, 1, 1, 1, 4)],
}
PAIRED_VARIANTS = {
    1: [(2, 1, 8, 1, 3, 3), (2, 1, 16, 2, 1, 1), (2, 2, 4, 2, 2, 2)],
    2: [(2, 1, 8, 2, 1, 1), (2, 2, 8, 1, 1, 1), (2, 4, 2, 2, 1, 1), (2, 4, 2, 2, 1, 1, 3)],
    4: [(2, 1, 8, 2, 1, 1), (2, 4, 2, 2, 1, 1, 3), (2, 4, 1, 2, 2, 2, 3), (4, 4, 2, 1, 1, 1, 3)],
    8: [(2, 4, 2, 2, 1, 1, 3), (2, 4, 1, 2, 2, 2, 2)],
}
FEW_ROWS_VARIANTS = [(1, 1, 8, 2, 3, 2), (1, 1, 8, 8, 1, 1), (1, 1, 16, 2, 1, 1)]  # for one tile of tokens

Cases = Callable[[JambaConfig, int, torch.device], Iterator[Any]]


def cases(
    config: JambaConfig, tokens: list[int], device: torch.device, decode_cases: Cases
) -> Iterator[tuple[str, int, Any]]:
    """(what is other, tokens, case) for every case that a variant concerns, under it."""
    for m in sorted({1 << (-(-m // 8) - 1).bit_length(): m for m in tokens}.items()):
        tiles, num_tokens = m
        for case in decode_cases(config, num_tokens, device):
            paired = "gate_up" in case.name
            if "norm" in case.name:
                continue
            if "experts" in case.name and tiles > 2:
                for most in (1, 2, tiles):
                    with _at_once(most):
                        yield f"{most} tiles an expert", num_tokens, case
                continue
            few = case.name in ("x_proj", "k_proj") and tiles == 1
            table = PAIRED if paired else SINGLE
            variants = FEW_ROWS_VARIANTS if few else (PAIRED_VARIANTS if paired else SINGLE_VARIANTS)[tiles]
            for variant in variants:
                with _in_place(table, tiles, Tiling(*variant), few):
                    yield " ".join(map(str, variant)), num_tokens, case


def compile_ahead(config: JambaConfig, tokens: list[int], device: torch.device, decode_cases: Cases) -> int:
    """Compile what the cases need on all cores, instead of one by one as they run; how many kernels that were."""
    wanted: set[tuple[str, tuple[tuple[str, int], ...]]] = set()

    def note(file: str, name: str, **constants: int) -> Callable[..., None]:
        wanted.add((file, tuple(sorted(constants.items()))))
        return lambda *_, **__: None

    launch_for_real, gpu.kernel = gpu.kernel, note
    try:
        for _, _, case in cases(config, tokens, device, decode_cases):
            case.launch(0, False)
    finally:
        gpu.kernel = launch_for_real
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda one: gpu_build.build(one[0], dict(one[1]), capability), wanted))
    return len(wanted)


@contextmanager
def _at_once(expert_tiles: int) -> Iterator[None]:
    before, gpu_linear.EXPERT_TILES = gpu_linear.EXPERT_TILES, expert_tiles
    try:
        yield
    finally:
        gpu_linear.EXPERT_TILES = before


@contextmanager
def _in_place(table: dict[int, Tiling], tiles: int, tiling: Tiling, few: bool) -> Iterator[None]:
    before, few_before = table[tiles], dict(gpu_linear.FEW_ROWS)
    table[tiles] = tiling
    gpu_linear.FEW_ROWS.pop(tiles, None)
    if few:
        gpu_linear.FEW_ROWS[tiles] = tiling
    try:
        yield
    finally:
        table[tiles] = before
        gpu_linear.FEW_ROWS.update(few_before)
