"""Muon: SGD with Nesterov momentum whose updates are orthogonalized.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; updates are scaled as in "Muon is
Scalable for LLM Training" (arXiv 2502.16982), so that learning rates of AdamW carry over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2  # about that of AdamW's updates


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """matrices (m, r, c), r <= c -> approximately U·Vᵀ of each SVD, in bfloat16, by Newton–Schulz iteration.

    The singular values of the result are between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """For 2-D and 3-D parameters, whose last two dimensions are a matrix.

    A group's `parts` is the number of matrices that are stacked along the rows of each.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:
        alike = defaultdict(list)  # matrices of equal shape are batched
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                matrices = update.view(-1, p.shape[-2] // group["parts"], p.shape[-1])
                tall = matrices.shape[1] > matrices.shape[2]
                matrices = matrices.mT if tall else matrices
                alike[*matrices.shape[1:], tall, number].append((p, matrices))
        for (_, columns, tall, number), members in alike.items():
            updates = orthogonalize(torch.cat([matrices for _, matrices in members]))
            updates = (updates.mT if tall else updates).float().contiguous()
            updates = updates.split([len(matrices) for _, matrices in members])
            params = [p for p, _ in members]
            updates = [update.view_as(p) for p, update in zip(params, updates, strict=True)]
            torch._foreach_add_(params, updates, alpha=-self.param_groups[number]["lr"] * UPDATE_RMS * columns**0.5)
