"""First stage: trains every Mamba mixer, all layers in parallel, to reproduce the output of the attention it replaces.

Each mixer reads the teacher's normalised hidden states; the loss is ‖mixer − attention‖² / ‖attention‖² (NMSE).
Run: `torchrun --nproc-per-node N -m model.train.align --help`. Source: MOHAWK (arXiv 2408.10189), stage 2.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from model.batch import Batch
from model.jamba import Jamba
from model.train.data import TextRows
from model.train.surgery import build_student, build_teacher
from model.train.trainer import Cluster, Log, MasterOptimizer


def align_step(teacher: Jamba, student: Jamba, token_ids: Tensor) -> Tensor:
    """Accumulate the mixers' gradients on token_ids (b, t); returns the NMSE of each Mamba layer."""
    batch = Batch.fresh(*token_ids.shape, token_ids.device)
    losses = []
    with torch.no_grad():
        x = teacher.embed_tokens(token_ids.flatten())
    for origin, layer in zip(teacher.layers, student.layers, strict=True):
        with torch.no_grad():
            normed = origin.input_layernorm(x)
            target = origin.self_attn(normed, batch)
        if not layer.is_attention:
            loss = (layer.mamba(normed, batch).float() - target).square().mean() / target.float().square().mean()
            loss.backward()
            losses.append(loss.detach())
        with torch.no_grad():
            x = x + target
            x = x + origin.feed_forward(origin.pre_ff_layernorm(x))
    return torch.stack(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="uint16 .npy of running text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="wall-clock time of training, without startup")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    cluster = Cluster()
    teacher = build_teacher(args.gguf).requires_grad_(False)
    student = build_student(teacher).to(cluster.device).requires_grad_(False)
    teacher.to(cluster.device, torch.bfloat16)
    for layer in student.layers:
        if not layer.is_attention:
            layer.mamba.requires_grad_(True)
    optimizer = MasterOptimizer(student, lambda name: 1.0, weight_decay=0.0)
    log, rows, rng = Log(args.out / "align.jsonl", cluster), TextRows(args.tokens), random.Random(cluster.rank)
    start, step, share = time.monotonic(), 0, 0.0
    while share < 1.0:
        ids = torch.stack([torch.from_numpy(rows.row(rng, args.length)[:-1]) for _ in range(args.rows)])
        nmse = align_step(teacher, student, ids.to(cluster.device, non_blocking=True))
        cluster.mean_gradients(optimizer.parameters)
        elapsed = cluster.mean(torch.tensor(time.monotonic() - start, device=cluster.device)).item()
        share = elapsed / args.seconds
        rate = args.rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        norm = optimizer.step(rate, clip=5.0)
        step += 1
        if step % 20 == 0:
            tokens = step * args.rows * args.length * cluster.size
            log.write(stage="align", step=step, tokens=tokens, tok_per_s=tokens / elapsed, rate=rate, norm=norm.item(),
                      nmse=nmse.mean().item(), nmse_median=nmse.median().item(), worst=nmse.max().item())  # fmt: skip
    if cluster.rank == 0:
        optimizer.save(args.out / "align.safetensors")
    cluster.close()


if __name__ == "__main__":
    main()
