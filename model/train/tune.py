"""Fine-tunes the Transformer on the questions: the teacher of answers, and an upper bound of what the data can teach.

Same rows as `model.train.distill`; cross entropy on the answers and, with a small weight, on the other tokens, so that
it stays a language model. Run: `python -m model.train.tune --help`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train import evaluate
from model.train.distill import Steps, Weights, step_loss
from model.train.forward import accelerate
from model.train.surgery import build_teacher
from model.train.trainer import Clock, Cluster, Log, MasterOptimizer, cosine, load_into


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gguf", "corpora", "tokenizer", "items", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="files of `model.train.pairs`")
    parser.add_argument("--rivals", type=Path, help="output folder of `model.train.rivals`")
    parser.add_argument("--weights", type=Path, help="masters of an earlier run to start from")
    parser.add_argument("--seconds", type=float, default=300, help="wall-clock time of training, without startup")
    parser.add_argument("--qa-tokens", type=int, default=32_768, help="per step and process")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--text-weight", type=float, default=0.1, help="of documents and questions; answers have 1")
    parser.add_argument("--final-items", type=int, default=120, help="questions per set, at the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    args, cluster = parse_arguments(), Cluster()
    args.text_tokens, args.text_until, args.long_from = 0, 0.0, 1.0  # all that `Steps` asks for
    weights = Weights(kl=0.0, ce=0.0, hidden=0.0, text=args.text_weight, hard=1.0)
    log, tokenizer = Log(args.out / "tune.jsonl", cluster), Tokenizer.load(args.tokenizer)
    model: Jamba = build_teacher(args.gguf).to(cluster.device)
    if args.weights:
        load_into(model, args.weights)
    optimizer = MasterOptimizer(model, lambda name: 1.0, weight_decay=0.01)
    accelerate(model)
    steps = Steps(args, cluster)
    loader = DataLoader(
        steps, batch_size=None, num_workers=args.workers, prefetch_factor=4, pin_memory=cluster.device.type == "cuda"
    )
    clock, tokens, losses = Clock(cluster), 0, []
    for step, batch in enumerate(loader):
        share = clock.tick() / args.seconds
        if share >= 1:
            break
        steps.progress.value = share
        rows, kinds = (torch.as_tensor(x).to(cluster.device, non_blocking=True) for x in batch[:2])
        loss = step_loss(model, None, rows, kinds, weights)
        loss.total.backward()
        cluster.mean_gradients([p for p in optimizer.parameters if p.grad is not None])
        rate = cosine(args.rate, step, share, warmup=50)
        norm = optimizer.step(rate)
        losses.append(loss.answer)
        tokens += rows.numel() * cluster.size
        if step % 20 == 0:
            answer, losses = torch.stack(losses).mean().item(), []
            log.write(stage="tune", step=step, share=share, tokens=tokens, rate=rate, answer=answer, norm=norm.item(),
                      tok_per_s=tokens / max(1e-9, clock.seconds))  # fmt: skip
    if cluster.rank == 0:
        optimizer.save(args.out / "tuned.safetensors")
        began = time.monotonic()
        scores = evaluate.score(model, tokenizer, evaluate.load_items(args.items, tokenizer, args.final_items))
        log.write(stage="eval", took=time.monotonic() - began, **scores)
        (args.out / "tuned.json").write_text(json.dumps(scores, indent=1) + "\n")
        print(evaluate.table(scores), flush=True)
    cluster.close()


if __name__ == "__main__":
    main()
