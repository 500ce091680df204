"""The forward of training gives what the model gives, faster or not; a tuned teacher's loss is the plain one."""

import pytest
import torch
import torch.nn.functional as F

from model.config import JambaConfig
from model.jamba import Jamba
from model.train import distill, forward, surgery
from model.train.data import ANSWER, QUESTION, RUNNING
from tests.numeric import assert_close


def small(seed: int = 1, **changes) -> Jamba:
    shape = {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 4, "mamba_dt_rank": 4}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "attn_layer_period": 2, "attn_layer_offset": 0}
    shape |= {"num_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(seed)
    return Jamba(JambaConfig(**(surgery.BASE | shape | changes)))


def gradients(model: Jamba, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden, _ = forward.forward_hidden(model, token_ids)
    (model.lm_head(hidden).logsumexp(-1).mean() + model.load_balancing_loss(0.1)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_accelerated_parts_change_neither_result_nor_gradient():
    plain, fast = small(), small()
    token_ids = torch.randint(64, (3, 21))
    forward.accelerate(fast)
    for model in (plain, fast):
        model.collect_router_stats = True
    expected = gradients(plain, token_ids)
    for name, grad in gradients(fast, token_ids).items():
        assert_close(name, grad, expected[name], ratio=1e-4)
    assert torch.equal(fast.expert_utilisation(), plain.expert_utilisation())
    with torch.no_grad():
        assert_close("without gradients", fast(token_ids), plain(token_ids), ratio=1e-5)


def test_hidden_states_end_in_the_logits_and_positions_count_each_row():
    model = small()
    token_ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        hidden, kept = forward.forward_hidden(model, token_ids, taps=(1, 3))
        assert_close("logits", model.lm_head(hidden), model(token_ids).flatten(0, 1), ratio=1e-6)
        assert_close("last layer", model.final_layernorm(kept[3]), hidden, ratio=1e-6)
    assert forward.Rows.fresh(2, 3, torch.device("cpu")).positions().tolist() == [0, 1, 2, 0, 1, 2]


def test_positions_that_faded_out_are_no_positions():
    model, bare = small(), small(rope_theta=None)
    token_ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        forward.set_rope(model, 0.0)
        assert torch.equal(model(token_ids), bare(token_ids))
        forward.set_rope(model, 1.0)
        assert torch.equal(model(token_ids), small()(token_ids))


@pytest.mark.parametrize("tuned", [False, True])
def test_answers_weigh_more_than_documents(tuned):
    student, weights = small(), distill.Weights(kl=1.0, ce=0.1, hidden=0.3, text=0.0, hard=0.5)
    student.collect_router_stats = True
    rows, kinds = torch.randint(64, (2, 17)), torch.zeros(2, 17)
    kinds[:, 5:9], kinds[:, 9:12] = QUESTION, ANSWER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "TAPS", (1, 3))
        loss = distill.step_loss(student, small() if tuned else None, rows, kinds, weights)
    logits = student(rows[:, :-1])
    ce = F.cross_entropy(logits[:, 8:11].flatten(0, 1), rows[:, 9:12].flatten())
    # a teacher that is the student itself adds no divergence and no distance
    assert_close("loss", loss.total, ce * (0.5 if tuned else 1.0), ratio=1e-4)
    assert loss.kl == loss.ce == 0


def test_running_text_below_the_questions_follows_the_teacher_as_it_would_alone():
    student, teacher = small(), small(seed=2)
    student.collect_router_stats = True
    weights = distill.Weights(kl=1.0, ce=0.1, hidden=0.3, text=0.5, hard=0.5)
    rows, kinds = torch.randint(64, (5, 17)), torch.zeros(5, 17)
    kinds[:2, 5:9], kinds[:2, 9:12], kinds[2:] = QUESTION, ANSWER, RUNNING
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "TAPS", (1, 3))
        both, questions, text = (
            distill.step_loss(student, teacher, rows[part], kinds[part], weights)
            for part in (slice(None), slice(2), slice(2, None))
        )
    assert_close("loss", both.total, questions.total + text.total, ratio=1e-5)
    for name in ("kl", "ce"):
        assert_close(name, getattr(both, name), getattr(text, name), ratio=1e-5)
    for name in ("answer", "kl_qa"):
        assert_close(name, getattr(both, name), getattr(questions, name), ratio=1e-5)
    log_q, log_p = (m(rows[2:, :-1]).log_softmax(-1).flatten(0, 1) for m in (student, teacher))
    assert_close("KL", text.kl, (log_p.exp() * (log_p - log_q)).sum(-1).mean(), ratio=1e-4)
    assert text.answer == 0 and questions.kl == 0
