"""Second stage: end-to-end distillation of the hybrid from the teacher, together with the question answering task.

A step trains on running text (KL to the teacher, hidden states, cross entropy) and on contexts with questions: KL to
the tuned teacher on every token, mixed with the true answers, plus supervision of where one attention layer should look
to find the answer and another to copy it. RoPE fades out over the first `--rope-until` of the schedule; from
`--quant-from` on, training is quantization-aware, in the shipped format.
Run: `torchrun --nproc-per-node N -m model.train.distill --help`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train import evaluate
from model.train.data import ANSWER, RUNNING, TEXT, QaRows, TextRows, copies, findings
from model.train.export import fake_quantize
from model.train.forward import accelerate, forward_hidden, set_rope
from model.train.losses import attention_to, relative_error, vocabulary_loss
from model.train.pair_contexts import load_pairs
from model.train.surgery import build_student, build_teacher
from model.train.tokens import read_texts
from model.train.trainer import Clock, Cluster, Log, MasterOptimizer, cosine, load_into, worker_random
from model.weights import load_model

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384)
LENGTH_SHARES = (0.22, 0.36, 0.22, 0.09, 0.06, 0.05, 0.0)  # many short rows: the service reads single passages
LATE_SHARES = (0.22, 0.35, 0.17, 0.07, 0.06, 0.06, 0.07)  # from --long-from on, for distant answers
TAPS = (5, 11, 17, 23, 29)
FINDING, COPYING = 12, 20  # attention layers; the second learned to copy without supervision
QUERIES = {FINDING: 1024, COPYING: 2048}  # maximum per step
TEACHER_TOKENS = 8192  # context length of the Transformer


class Steps(IterableDataset):
    """Yields for each step: rows (b, l + 1), questions first, then running text; their kinds; and the queries (question
    rows, m, 4) of the finding and the copying layer for `losses.attention_to`. l varies by step.
    """

    def __init__(self, args: argparse.Namespace, cluster: Cluster) -> None:
        self.args, self.rank, self.size = args, cluster.rank, cluster.size
        self.progress = multiprocessing.Value("d", 0.0)  # shared with the data workers, whose mixture depends on it

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        worker, args = get_worker_info(), self.args
        part, parts = self.rank * worker.num_workers + worker.id, self.size * worker.num_workers
        text = TextRows(args.tokens) if args.text_tokens else None
        texts = list(read_texts(args.corpora, part, parts))
        questions = QaRows(Tokenizer.load(args.tokenizer), load_pairs(args.pairs, args.rivals), texts)
        rng, step = worker_random(args.seed, self.rank, worker.id), worker.id
        while True:
            progress = self.progress.value
            shares = LENGTH_SHARES if progress < args.long_from else LATE_SHARES
            length = min(random.Random(args.seed * 7919 + step).choices(LENGTHS, shares)[0], args.qa_tokens)
            rows = [questions.row(rng, length, progress) for _ in range(max(1, args.qa_tokens // length))]
            looks = [np.stack([draw(row, QUERIES[layer] // len(rows)) for row in rows])
                     for draw, layer in ((findings, FINDING), (copies, COPYING))]  # fmt: skip
            tokens = args.text_tokens if progress < args.text_until else args.text_tokens // 3
            room = tokens // length if text and length <= TEACHER_TOKENS else 0
            lines = [text.row(rng, length) for _ in range(room)]
            kinds = [row[1] for row in rows] + [np.full(length + 1, RUNNING, np.float32)] * len(lines)
            yield np.stack([row[0] for row in rows] + lines), np.stack(kinds), *looks
            step += worker.num_workers


class Weights(NamedTuple):
    """Loss weights: KL and cross entropy of running text, hidden states, text around the answers (answers have 1), and
    the share of hard labels, beside a tuned teacher, in the answers."""

    kl: float
    ce: float
    hidden: float
    text: float
    hard: float


class Loss(NamedTuple):
    """The total loss, and its parts, detached: KL and cross entropy of running text, error of hidden states, −log p of
    the answers, KL of the other tokens of contexts, −log of the attention on the right keys to find and to copy."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    hidden: Tensor
    answer: Tensor
    kl_qa: Tensor
    find: Tensor
    copy: Tensor


def step_loss(
    student: Jamba,
    teacher: Jamba | None,
    rows: Tensor,
    kinds: Tensor,
    weights: Weights,
    looks: Sequence[Tensor] = (),
    looks_weight: float = 0.0,
    tuned: bool = True,
) -> Loss:
    """rows, kinds (b, t + 1), as `Steps` gives them.

    All tokens are distilled from the teacher's distribution and hidden states. Answers, weighted by kind, also have
    hard labels, and only those if the teacher is not `tuned`. Without a teacher, cross entropy on every token.
    `looks`: queries (b, m, 4) of the finding and the copying layer for the first b rows.
    """
    taps = TAPS if teacher is not None and weights.hidden > 0 else ()
    inputs = (FINDING - 1, COPYING - 1) if looks else ()
    hidden, kept = forward_hidden(student, rows[:, :-1], tuple({*taps, *inputs}))
    looked = torch.zeros(2, device=rows.device)
    if looks:
        layers = (student.layers[FINDING], student.layers[COPYING])
        looked = torch.stack([
            attention_to(layer, kept[i].unflatten(0, (len(rows), -1))[: len(queries)], queries)
            for layer, i, queries in zip(layers, inputs, looks, strict=True)
        ])  # fmt: skip
    places = kinds[:, 1:].flatten()
    answers = _shared(places * (places >= ANSWER))
    others, running = _shared((places >= TEXT) & (places < ANSWER)), _shared(places == RUNNING)
    hard = weights.hard if teacher is not None and tuned else 1.0
    kl_weights = (1 - hard) * answers + weights.text * others + weights.kl * running
    ce_weights = hard * answers + weights.ce * running
    other, theirs = None, {}
    if teacher is None:
        ce_weights = kl_weights + ce_weights
    else:
        with torch.no_grad():
            other, theirs = forward_hidden(teacher, rows[:, :-1], taps)
    loss, kl, ce = vocabulary_loss(
        hidden,
        student.lm_head.weight,
        other,
        None if teacher is None else teacher.lm_head.weight,
        rows[:, 1:].flatten(),
        kl_weights,
        ce_weights,
    )
    gap = torch.zeros((), device=rows.device)
    if taps:
        read = kinds[:, :-1].flatten()
        near = _shared(read >= TEXT) + _shared(read == RUNNING)
        gap = torch.stack([relative_error(kept[i], theirs[i], near) for i in taps]).mean()
    said = ((1 - hard) * answers * kl + hard * answers * ce).sum()
    return Loss(
        loss + weights.hidden * gap + looks_weight * looked.sum(),
        *((running * part).sum() for part in (kl, ce)),
        *(gap.detach(), said, (others * kl).sum(), *looked.detach()),
    )


def _shared(weights: Tensor) -> Tensor:
    """Weights normalised to a sum of at most 1; all 0 stays 0."""
    return weights / weights.sum().clamp(min=1)


def rate_of(name: str) -> float:
    """Learning rate factor: 1 for Mamba mixers, routers and attention, 0.5 for the rest."""
    return 1.0 if ".mamba." in name or ".router." in name or ".self_attn." in name else 0.5


def looks_weight(args: argparse.Namespace, share: float) -> float:
    """Weight of the attention loss: constant for 60% of the schedule, then linearly to 0 at 80%."""
    return args.looks * min(1.0, max(0.0, (0.8 - share) / 0.2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gguf", "corpora", "tokens", "tokenizer", "items", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="files of `model.train.pairs`")
    parser.add_argument("--checkpoint", type=Path, help="float checkpoint to start from, e.g. of `convert --to fp32`")
    parser.add_argument("--rivals", type=Path, help="output folder of `model.train.rivals`")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="saved masters to start from, in order")
    parser.add_argument("--tuned", type=Path, help="masters of `model.train.tune`; loaded when the file appears")
    parser.add_argument("--seconds", type=float, default=300, help="wall-clock time of this call, without startup")
    parser.add_argument("--from-share", type=float, default=0.0, help="where in the schedule this call starts")
    parser.add_argument("--to-share", type=float, default=1.0, help="and where it ends")
    parser.add_argument("--text-tokens", type=int, default=32_768, help="per step and process")
    parser.add_argument("--qa-tokens", type=int, default=32_768, help="per step and process")
    parser.add_argument("--text-until", type=float, default=0.0, help="share; after it, a third of the text")
    parser.add_argument("--rope-until", type=float, default=0.4, help="share; 0: no positions from the start")
    parser.add_argument("--quant-from", type=float, default=0.85)
    parser.add_argument("--long-from", type=float, default=1.0, help="share from which rows reach 16K; 1: never")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="else AdamW for all")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=0.1)
    parser.add_argument("--hidden", type=float, default=0.3)
    parser.add_argument("--aux", type=float, default=0.01)
    parser.add_argument("--looks", type=float, default=0.1, help="weight of the attention loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--text-weight", type=float, default=0.5, help="of documents and questions; answers have 1")
    parser.add_argument(
        "--hard", type=float, default=0.5, help="share of hard labels, beside the tuned teacher, in answers"
    )
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    parser.add_argument("--score-every", type=float, default=180, help="seconds")
    parser.add_argument("--eval-items", type=int, default=32, help="per set, during training")
    parser.add_argument("--final-items", type=int, default=200, help="per set, at the end")
    parser.add_argument("--profile", type=int, default=0, help="profile this many steps and stop")
    parser.add_argument("--profile-from", type=int, default=10, help="steps before profiling")
    return parser.parse_args()


def main() -> None:
    args, cluster = parse_arguments(), Cluster()
    run = Run(args, cluster)
    steps = Steps(args, cluster)
    loader = DataLoader(
        steps, batch_size=None, num_workers=args.workers, prefetch_factor=4, pin_memory=cluster.device.type == "cuda"
    )
    ended = time.monotonic()
    for step, batch in enumerate(loader):
        run.waited += time.monotonic() - ended
        share = run.share()
        if share >= args.to_share:
            break
        steps.progress.value = share
        run.step(step, share, [torch.as_tensor(x).to(cluster.device, non_blocking=True) for x in batch])
        ended = time.monotonic()
        if args.profile and step == args.profile_from - 1:
            run.profile(loader, args.profile)
            return
    run.finish(step)
    cluster.close()


class Run:
    """Teacher, student, optimizer and clock of one call."""

    def __init__(self, args: argparse.Namespace, cluster: Cluster) -> None:
        self.args, self.cluster, self.log = args, cluster, Log(args.out / "distill.jsonl", cluster)
        self.tokenizer = Tokenizer.load(args.tokenizer)
        self.teacher = build_teacher(args.gguf).requires_grad_(False)
        self.student = build_student(self.teacher).to(cluster.device)
        self.teacher.to(cluster.device, torch.bfloat16)
        if args.checkpoint is not None:
            self.student.load_state_dict(load_model(args.checkpoint, dtype=torch.float32).state_dict())
        for path in args.weights:
            load_into(self.student, path)
        self.optimizer = MasterOptimizer(self.student, rate_of, muon=args.muon)
        self.student.collect_router_stats = True
        accelerate(self.student)
        accelerate(self.teacher)
        self.items = evaluate.load_items(args.items, self.tokenizer, args.eval_items)
        self.tuned, self.clock, self.tokens, self.seconds = False, Clock(cluster), 0, args.seconds
        self.losses: list[Tensor] = []
        self.saved = self.scored = self.waited = 0.0

    def share(self) -> float:
        """Progress of the schedule at the start of a step; loading the first rows and compiling do not count."""
        args = self.args
        return args.from_share + (args.to_share - args.from_share) * self.clock.tick() / self.seconds

    def step(self, step: int, share: float, batch: list[Tensor]) -> None:
        """One update; logs, scores and saves every 20 steps."""
        args, (rows, kinds, *looks) = self.args, batch
        set_rope(self.student, max(0.0, 1.0 - share / args.rope_until) if args.rope_until > 0 else 0.0)
        weights = Weights(args.kl, args.ce, args.hidden, args.text_weight, args.hard)
        looks = looks if (weight := looks_weight(args, share)) > 0 else ()
        teacher = self.teacher if rows.shape[1] <= TEACHER_TOKENS + 1 else None
        loss = step_loss(self.student, teacher, rows, kinds, weights, looks, weight, self.tuned)
        (loss.total + self.student.load_balancing_loss(args.aux)).backward()
        self.tokens += rows.numel() * self.cluster.size
        self.cluster.mean_gradients([p for p in self.optimizer.parameters if p.grad is not None])
        quantize = fake_quantize if share >= args.quant_from else None
        norm = self.optimizer.step(cosine(args.rate, step, share, warmup=60), fake_quant=quantize)
        self.losses.append(torch.stack(loss[1:]))
        if step % 20 == 0:
            self.report(step, share, norm)
            self.watch(share)

    def report(self, step: int, share: float, norm: Tensor) -> None:
        recent, self.losses = torch.stack(self.losses).tolist(), []
        means = {}
        for name, values in zip(Loss._fields[1:], zip(*recent, strict=True), strict=True):
            told = [value for value in values if value > 0]  # not every step has every loss
            means[name] = sum(told) / max(1, len(told))
        use, waited, self.waited = self.student.expert_utilisation(), self.waited, 0.0
        self.log.write(stage="distill", step=step, share=share, tokens=self.tokens,
                       tok_per_s=self.tokens / max(self.clock.seconds, 1e-9), **means, waited=waited, norm=norm.item(),
                       tuned=int(self.tuned), expert_min=use.min().item(), expert_max=use.max().item())  # fmt: skip

    def watch(self, share: float) -> None:
        """Load the tuned teacher once it exists, read a new run length from OUT/seconds, score and save on schedule."""
        args, now, told = self.args, self.clock.seconds, self.args.out / "seconds"
        if args.tuned is not None and not self.tuned and args.tuned.exists():
            load_into(self.teacher, args.tuned)
            self.tuned = True
        given = float(told.read_text().strip() or 0) if told.exists() else 0.0
        self.seconds = self.cluster.of_first(given) or self.seconds  # all must end at the same step
        if now - self.saved >= args.save_every:
            self.saved = now
            self.save(f"distill-{now:.0f}s.safetensors")
        if now - self.scored >= args.score_every:
            self.scored = now
            self.score(self.items, share)

    def save(self, name: str) -> None:
        if self.cluster.rank == 0:
            self.optimizer.save(self.args.out / name)

    def score(self, items: Sequence[evaluate.Item], share: float) -> None:
        if self.cluster.rank == 0:
            began = time.monotonic()
            scores = evaluate.score(self.student, self.tokenizer, items)
            self.log.write(stage="eval", share=share, took=time.monotonic() - began, **scores)

    def finish(self, step: int) -> None:
        """Save the final weights, then score them on more questions."""
        self.save("distill.safetensors")
        self.score(evaluate.load_items(self.args.items, self.tokenizer, self.args.final_items), share=1.0)

    def profile(self, loader: DataLoader, steps: int) -> None:
        """Print the time per step and a profile of `steps` steps by operator."""
        from torch.profiler import ProfilerActivity, profile

        cuda, device = torch.cuda.is_available(), self.cluster.device
        batches = [[torch.as_tensor(x).to(device) for x in batch] for batch in islice(loader, 3 * steps)]
        began, done = time.monotonic(), self.tokens
        for step, batch in enumerate(batches[steps:], start=3):
            self.step(step, self.share(), batch)
        if cuda:
            torch.cuda.synchronize()
        seconds, done = time.monotonic() - began, self.tokens - done
        print(f"tok_per_s={done / seconds:.0f} ms_per_step={seconds / len(batches[steps:]) * 1e3:.1f}", flush=True)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as prof:
            for step, batch in enumerate(batches[:steps], start=3):
                self.step(step, self.share(), batch)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(prof.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70))


if __name__ == "__main__":
    main()
