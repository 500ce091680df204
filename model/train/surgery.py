"""Converts SmolLM2 to Jamba: the teacher as a Jamba with attention in every layer, and the hybrid initialized from it.

The hybrid keeps embedding, norms, MLPs and the attention of every eighth layer. Other attention layers become Mamba
mixers, initialized from the value and output projections; every second MLP becomes experts (upcycling).
Measured choices: docs/small-model.md. Start at `build_student`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.config import JambaConfig
from model.jamba import Jamba
from model.mamba import MambaMixer
from model.moe import MoE
from model.train import smollm2
from model.train.tokenizer_cut import VOCAB_SIZE

BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 1,
    "mamba_dt_rank": 36,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 100_000.0,
}
TEACHER = JambaConfig(**BASE, attn_layer_period=1, attn_layer_offset=0, num_experts=1, num_experts_per_tok=1)
STUDENT = JambaConfig(**BASE, attn_layer_period=8, attn_layer_offset=4, num_experts=2, num_experts_per_tok=1)


def jamba_name(name: str) -> str:
    """Llama tensor name -> ours: `layers.0.mlp.up_proj.weight` -> `layers.0.feed_forward.up_proj.weight`."""
    name = name.replace("post_attention_layernorm", "pre_ff_layernorm").replace(".mlp.", ".feed_forward.")
    return "final_layernorm.weight" if name == "norm.weight" else name


def build_teacher(gguf: Path) -> Jamba:
    """SmolLM2-135M-Instruct with its first 16,384 tokens, float32."""
    tensors = {jamba_name(name): tensor for name, tensor in smollm2.read_tensors(gguf, VOCAB_SIZE).items()}
    teacher = Jamba(TEACHER)
    missing, extra = teacher.load_state_dict(tensors, strict=False)
    if extra or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{gguf} does not fit: missing {missing}, unexpected {extra}")
    return teacher


@torch.no_grad()
def build_student(teacher: Jamba, seed: int = 0, noise: float = 0.02) -> Jamba:
    """The hybrid: shared parameters are copied from the teacher, mixers and experts are initialized from it.

    `noise`: relative size of the random difference between the experts.
    """
    torch.manual_seed(seed)
    student = Jamba(STUDENT)
    given = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
    for layer, origin in zip(student.layers, teacher.layers, strict=True):
        if not layer.is_attention:
            start_mixer(layer.mamba, origin.self_attn.v_proj.weight, origin.self_attn.o_proj.weight)
        if isinstance(layer.feed_forward, MoE):
            upcycle(layer.feed_forward, origin.feed_forward, noise)
    return student


@torch.no_grad()
def start_mixer(mixer: MambaMixer, values: Tensor, outputs: Tensor) -> None:
    """x half of in_proj = values, repeated over the heads; out_proj = 2·outputs; conv = identity; rest default."""
    heads, p = STUDENT.num_attention_heads, STUDENT.head_dim
    per_head = values.unflatten(0, (-1, p)).repeat_interleave(heads // STUDENT.num_key_value_heads, dim=0)
    mixer.in_proj.weight[: heads * p] = per_head.flatten(0, 1)
    mixer.out_proj.weight.copy_(2 * outputs)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()


@torch.no_grad()
def upcycle(moe: MoE, mlp: torch.nn.Module, noise: float) -> None:
    """Copy the MLP to every expert. Top-k weights are not renormalised, so down_proj is scaled by experts / k."""
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    growth = moe.num_experts / moe.top_k
    for i in range(moe.num_experts):
        moe.experts.gate_up_proj[i] = gate_up + noise * gate_up.std() * torch.randn_like(gate_up)
        moe.experts.down_proj[i] = growth * mlp.down_proj.weight
    moe.router.weight.normal_(std=1e-3)
