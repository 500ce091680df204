"""Second stage, end to end: the hybrid keeps the teacher's language and learns the task.

Every step sees running text (KL to the teacher, hidden states, cross entropy) and contexts with questions (cross
entropy on the answers). Rotary positions fade out over the first `--rope-until` of the time; the last `--quant-from`
trains at the weights the shipped format will hold. Run: `torchrun --nproc-per-node N -m model.train.distill --help`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.attention import Attention
from model.batch import Batch
from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train import evaluate
from model.train.data import ANSWER, PADDING, QaRows, TextRows, load_pairs
from model.train.export import fake_quantize
from model.train.losses import distillation, weighted_cross_entropy
from model.train.surgery import build_student, build_teacher
from model.train.tokens import read_texts
from model.train.trainer import Cluster, Log, MasterAdamW, load_into, worker_random

LENGTHS, LENGTH_SHARES = (512, 1024, 2048, 4096, 8192), (0.2, 0.36, 0.26, 0.12, 0.06)
TAPS = (5, 11, 17, 23, 29)


class Steps(IterableDataset):
    """Yields a step's rows: text (rows, length + 1) and questions (rows, l + 1) with their kinds; l varies by step."""

    def __init__(self, args: argparse.Namespace, cluster: Cluster) -> None:
        self.args, self.rank, self.size = args, cluster.rank, cluster.size
        self.progress = multiprocessing.Value("d", 0.0)  # read by the workers: what to ask changes over the training

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        worker, args = get_worker_info(), self.args
        part, parts = self.rank * worker.num_workers + worker.id, self.size * worker.num_workers
        text, texts = TextRows(args.tokens), list(read_texts(args.corpora, part, parts))
        questions = QaRows(Tokenizer.load(args.tokenizer), load_pairs(args.pairs), texts)
        rng, step = worker_random(args.seed, self.rank, worker.id), worker.id
        while True:
            length = random.Random(args.seed * 7919 + step).choices(LENGTHS, LENGTH_SHARES)[0]
            rows = [questions.row(rng, length, self.progress.value) for _ in range(max(1, args.qa_tokens // length))]
            texts = [text.row(rng, args.length) for _ in range(args.text_tokens // args.length)]
            yield np.stack(texts), np.stack([ids for ids, _ in rows]), np.stack([kinds for _, kinds in rows])
            step += worker.num_workers


def forward_hidden(model: Jamba, token_ids: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
    """token_ids (b, t) -> final hidden states (b·t, d) before the head, and those after the layers in `taps`."""
    batch = Batch.fresh(*token_ids.shape, token_ids.device)
    x, kept = model.embed_tokens(token_ids.flatten()), []
    for i, layer in enumerate(model.layers):
        x = layer(x, batch)
        if i in taps:
            kept.append(x)
    return model.final_layernorm(x), kept


def relative_error(x: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of log(1 + ‖x − target‖² / ‖target‖²).

    A few tokens have activations a thousand times the others': relative, and logarithmic, so that none rules the mean.
    """
    target = target.float()
    return ((x.float() - target).square().sum(-1) / target.square().sum(-1)).log1p().mean()


def text_loss(student: Jamba, teacher: Jamba, rows: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """rows (b, t + 1) -> loss, and (KL, cross entropy, hidden states' error) detached."""
    taps = TAPS if args.hidden > 0 else ()
    hidden, own = forward_hidden(student, rows[:, :-1], taps)
    with torch.no_grad():
        other, theirs = forward_hidden(teacher, rows[:, :-1], taps)
    kl, ce = distillation(hidden, student.lm_head.weight, other, teacher.lm_head.weight, rows[:, 1:].flatten())
    gaps = [relative_error(a, b) for a, b in zip(own, theirs, strict=True)]
    gap = torch.stack(gaps).mean() if gaps else torch.zeros((), device=rows.device)
    return args.kl * kl + args.ce * ce + args.hidden * gap, torch.stack([kl, ce, gap]).detach()


def question_loss(student: Jamba, rows: Tensor, kinds: Tensor, text_weight: float) -> tuple[Tensor, Tensor]:
    """rows, kinds (b, t + 1) -> loss, and the cross entropy of the answers detached. Text counts for `text_weight`."""
    hidden, _ = forward_hidden(student, rows[:, :-1])
    kinds, targets = kinds[:, 1:].flatten(), rows[:, 1:].flatten()
    answers = (kinds == ANSWER).float()
    sampled = ((kinds != PADDING) & (kinds != ANSWER)).float() * (torch.rand_like(kinds) < 0.1)
    weights = answers / answers.sum().clamp(min=1) + text_weight * sampled / sampled.sum().clamp(min=1)
    chosen = weights.nonzero().squeeze(1)
    loss = weighted_cross_entropy(hidden[chosen], student.lm_head.weight, targets[chosen], weights[chosen])
    return loss, loss.detach()


def rate_of(name: str) -> float:
    """Mixers are new and learn faster; what came from the teacher moves less."""
    return 1.0 if ".mamba." in name or ".router." in name else 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gguf", "corpora", "tokens", "tokenizer", "pairs", "dev", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="saved masters to start from, in order")
    parser.add_argument("--seconds", type=float, default=300, help="wall clock of this call, its start not counted")
    parser.add_argument("--from-share", type=float, default=0.0, help="where in the schedule this call starts")
    parser.add_argument("--to-share", type=float, default=1.0, help="and where it ends")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=32_768, help="a step and process")
    parser.add_argument("--qa-tokens", type=int, default=32_768, help="a step and process")
    parser.add_argument("--text-until", type=float, default=0.6, help="after it, only every third step has text")
    parser.add_argument("--rope-until", type=float, default=0.4)
    parser.add_argument("--quant-from", type=float, default=0.85)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=0.1)
    parser.add_argument("--hidden", type=float, default=0.3)
    parser.add_argument("--aux", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compile the layers without attention")
    return parser.parse_args()


def schedule_rate(args: argparse.Namespace, step: int, share: float) -> float:
    """Warm-up, then a cosine over the whole schedule to 3% of the peak."""
    return args.rate * min(1.0, (step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def set_rope(model: Jamba, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.rope_scale = scale


def main() -> None:
    args, cluster = parse_arguments(), Cluster()
    log, tokenizer = Log(args.out / "distill.jsonl", cluster), Tokenizer.load(args.tokenizer)
    teacher = build_teacher(args.gguf).requires_grad_(False)
    student = build_student(teacher).to(cluster.device)
    teacher.to(cluster.device, torch.bfloat16)
    for path in args.weights:
        load_into(student, path)
    optimizer = MasterAdamW(student, rate_of)
    student.collect_router_stats = True
    if args.compile:
        compile_layers(student)
        compile_layers(teacher)
    steps = Steps(args, cluster)
    loader = DataLoader(steps, batch_size=None, num_workers=args.workers, prefetch_factor=2, pin_memory=True)
    items = evaluate.build_items(tokenizer, load_pairs(args.dev), 96)
    start, tokens, losses = None, 0, []
    for step, batch in enumerate(loader):
        start = start or time.monotonic()  # the first rows and the compiler's work are not the stage's
        elapsed = cluster.mean(torch.tensor(time.monotonic() - start, device=cluster.device)).item()
        share = args.from_share + (args.to_share - args.from_share) * elapsed / args.seconds
        if share >= args.to_share:
            break
        steps.progress.value = share
        set_rope(student, max(0.0, 1.0 - share / args.rope_until))
        text, rows, kinds = (torch.as_tensor(x).to(cluster.device, non_blocking=True) for x in batch)
        parts = torch.zeros(3, device=cluster.device)
        if share < args.text_until or step % 3 == 0:
            loss, parts = text_loss(student, teacher, text, args)
            (loss + student.load_balancing_loss(args.aux)).backward()
            tokens += text.numel() * cluster.size
        loss, answers = question_loss(student, rows, kinds, text_weight=0.1)
        (loss + student.load_balancing_loss(args.aux)).backward()
        tokens += rows.numel() * cluster.size
        cluster.mean_gradients([p for p in optimizer.parameters if p.grad is not None])
        quantize = fake_quantize if share >= args.quant_from else None
        norm = optimizer.step(schedule_rate(args, step if not args.from_share else 99, share), fake_quant=quantize)
        losses.append([*parts.tolist(), answers.item()])
        if step % 20 == 0:
            recent = np.array(losses[-20:])
            kl, ce, gap = recent[recent[:, 0] > 0, :3].mean(0) if (recent[:, 0] > 0).any() else (0.0, 0.0, 0.0)
            use = student.expert_utilisation()
            log.write(stage="distill", step=step, share=share, tokens=tokens, tok_per_s=tokens / max(elapsed, 1e-9),
                      kl=float(kl), ce=float(ce), hidden=float(gap), answer=float(recent[:, 3].mean()), norm=norm,
                      expert_min=use.min().item(), expert_max=use.max().item())  # fmt: skip
        if step % 250 == 249 and cluster.rank == 0:
            log.write(stage="eval", step=step, **evaluate.score(student, tokenizer, items))
    if cluster.rank == 0:
        log.write(stage="eval", step=step, **evaluate.score(student, tokenizer, items))
        optimizer.save(args.out / "distill.safetensors")
    cluster.close()


def compile_layers(model: Jamba) -> None:
    """Fuse what lies between the matrix products; the scan and the experts' grouping stay as they are."""
    for layer in model.layers:
        if not layer.is_attention:
            layer.mamba.forward = torch.compile(layer.mamba.forward, dynamic=False)


if __name__ == "__main__":
    main()
