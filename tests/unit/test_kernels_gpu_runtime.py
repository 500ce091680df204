"""The runtime of the CUDA kernels on toys: launches, arguments, tensor-core products; on a GPU, else emulated."""

from pathlib import Path

import pytest
import torch

from model.kernels import gpu, gpu_build
from tests import cuda_on_cpu as emulation

TOYS = str(Path(emulation.__file__).with_name("toys"))
GPU = torch.cuda.is_available()


def test_product_through_shared_memory(device):
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 80, device=device).bfloat16() for rows in (16, 8))
    out = torch.full((16, 8), torch.nan, device=device)
    for _ in range(4):  # the emulator changes the order of threads and copies from launch to launch
        gpu.kernel(TOYS, "toy_product")((1,), 32, a, b, out.fill_(torch.nan), 80, shared_bytes=2 * 24 * 16 * 2)
        torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("overlap", [False, True])
def test_sums_across_warps_and_blocks(device, block, overlap):
    x, out, total = torch.arange(1001.0, device=device), torch.empty(3, device=device), torch.zeros(1, device=device)
    launch = gpu.kernel(TOYS, "toy_sum", BLOCK=block)
    launch((3,), block, x, out, total, 1001, 0.5, overlap=overlap)
    assert out.sum().item() == total.item() == 0.5 * 1001 * 500
    assert out[0].item() == 0.5 * sum(i for i in range(1001) if i // block % 3 == 0)


@pytest.mark.parametrize("shared_bytes", [1024, 100 << 10])
def test_rounding_to_bf16_is_pytorchs(device, shared_bytes):
    x = torch.cat(
        [torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, 1.00390625, 1.01171875, 3.4e38, 1e-40, 1e-42])]
    )
    x = x.to(device)
    y = torch.empty(1008, dtype=torch.bfloat16, device=device)
    gpu.kernel(TOYS, "toy_round")((4,), 128, x, y, 1008, shared_bytes=shared_bytes)
    assert torch.equal(y, x.bfloat16())


def test_support_ends_where_a_gradient_is_asked_for(device):
    x = torch.ones(2, device=device)
    assert gpu.supports(x, None)
    assert not gpu.supports(x, torch.ones(2, device=device, requires_grad=True))
    with torch.no_grad():
        assert gpu.supports(torch.ones(2, device=device, requires_grad=True))
    assert gpu.sm_count(x.device) > 0


@pytest.mark.parametrize(
    ("name", "block", "shared_bytes", "message"),
    [
        ("toy_deadlock", 32, 0, "deadlock"),
        ("toy_misaligned", 2, 0, r"misaligned access at .*toys\.cu:\d+"),
        ("toy_overrun", 33, 128, "outside its 128 bytes"),
        ("toy_round", 2000, 0, "no GPU takes"),
        ("toy_round", 32, 228 << 10, "no GPU takes"),
    ],
)
def test_the_emulator_refuses_what_the_hardware_punishes(cuda_on_cpu, name, block, shared_bytes, message):
    arguments = {"toy_misaligned": 2, "toy_round": 3}.get(name, 1)
    tensors = [torch.ones(64) for _ in range(arguments)]
    with pytest.raises(emulation.EmulationError, match=message):
        gpu.kernel(TOYS, name)((1,), block, *tensors, shared_bytes=shared_bytes)


def test_the_emulator_refuses_arguments_of_another_type(cuda_on_cpu):
    launch, x, y = gpu.kernel(TOYS, "toy_round"), torch.ones(8), torch.empty(8, dtype=torch.bfloat16)
    for arguments in [(x, y), (x, x, 8), (x, y, 8.0), (y, y, 8)]:
        with pytest.raises(emulation.EmulationError, match="argument"):
            launch((1,), 32, *arguments, shared_bytes=1024)


@pytest.mark.skipif(not gpu_build.can_build(), reason="no NVRTC")
def test_a_broken_kernel_is_reported_with_the_compilers_log(tmp_path):
    (tmp_path / "broken.cu").write_text('#include "gpu.cuh"\nextern "C" __global__ void broken() { nonsense(); }\n')
    with pytest.raises(gpu_build.BuildError, match="nonsense"):
        gpu_build.build(str(tmp_path / "broken"), {}, (9, 0))


@pytest.mark.skipif(not gpu_build.can_build(), reason="no NVRTC")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_kernels_compile_and_are_kept(tmp_path, monkeypatch, capability):
    monkeypatch.setattr(gpu_build, "cache_dir", lambda: tmp_path)
    first = gpu_build.build(TOYS, {"BLOCK": 64}, capability)
    [kept] = tmp_path.iterdir()
    assert kept.read_bytes() == first == gpu_build.build(TOYS, {"BLOCK": 64}, capability)
    assert gpu_build.build(TOYS, {"BLOCK": 32}, capability) != first


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_launches_are_captured_in_a_graph():
    x, out, total = torch.ones(1000, device="cuda"), torch.empty(3, device="cuda"), torch.zeros(1, device="cuda")
    launch = gpu.kernel(TOYS, "toy_sum", BLOCK=64)
    launch((3,), 64, x, out, total.zero_(), 1000, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launch((3,), 64, x, out, total, 1000, 1.0, overlap=True)
    total.zero_()
    graph.replay()
    assert total.item() == 3000


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_launch_that_cannot_be_names_kernel_and_reason():
    x = torch.ones(8, device="cuda")
    with pytest.raises(gpu.LaunchError, match=r"toy_sum: grid \(1, 1\), block 2048.*invalid"):
        gpu.kernel(TOYS, "toy_sum", BLOCK=64)((1, 1), 2048, x, x, x, 8, 1.0)
