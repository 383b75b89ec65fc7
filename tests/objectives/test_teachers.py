"""Objectives with a teacher: values are those of TRL, packed rows are learned as alone, killed runs resume."""

import pytest
import torch
from tiny_families import build_family

from slimtune import LoraConfig, get_peft_model
from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.models.lm_head import LMHead
from slimtune.core.training.loss import make_collator
from slimtune.objectives.teacher_divergence import compute_token_divergences, compute_top_k_divergences
from slimtune.objectives.teacher_rows import TeacherCollator, make_teacher_example

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def make_heads(vocabulary=53, cap=None):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(8, vocabulary, bias=False).double().requires_grad_(False)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
    states = torch.randn(2, 37, 8, generator=generator).double()
    return LMHead(linear, vocabulary, 1 / 0.7, cap), states[0].requires_grad_(), states[1]


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_gradient_are_those_of_gkd_and_sdft_in_trl(beta):
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    head, student, teacher = make_heads()
    logits = head.module(student), head.module(teacher)
    expected = GKDTrainer.generalized_jsd_loss(*logits, beta=beta, temperature=0.7)
    (slope,) = torch.autograd.grad(expected, student)
    found = compute_token_divergences(student, head, teacher, head, beta)
    assert found.mean().item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found.mean(), student)[0], slope, atol=1e-9, rtol=0)
    sdft = compute_full_logit_self_distillation_loss(*(z / 0.7 for z in logits), distillation_alpha=beta)
    torch.testing.assert_close(found, sdft, atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_of_capped_logits_in_chunks_has_the_gradient_of_finite_differences(beta, monkeypatch):
    monkeypatch.setattr("slimtune.objectives.teacher_divergence.count_rows_per_logit_chunk", lambda *_: 16)
    head, student, teacher = make_heads(cap=5.0)
    assert torch.autograd.gradcheck(
        lambda h: compute_token_divergences(h, head, teacher, head, beta), student, fast_mode=True
    )


def take_top_k(head, teacher, k):
    top = head.module(teacher).mul(head.scale).log_softmax(-1).topk(k)
    return top.indices, top.values.detach()


@pytest.mark.parametrize("k", [1, 5])
def test_forward_kl_over_the_likeliest_tokens_and_its_gradient_are_those_of_trl(k):
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    head, student, teacher = make_heads()
    ids, logps = take_top_k(head, teacher, k)
    logps[3, -1] = -torch.inf if k > 1 else logps[3, -1]  # one token fewer
    valid = logps > -torch.inf
    known = (head.module(student) * head.scale).log_softmax(-1).gather(-1, ids).masked_fill(~valid, -torch.inf)
    (ours, mask), (theirs, _) = (trl._add_tail_bucket(x, valid) for x in (known, logps))
    expected = trl._jsd_divergence(ours, theirs, 0, mask).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    found = compute_top_k_divergences(student, head, ids.int(), logps)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), student)[0], slope, atol=1e-9, rtol=0)


def test_all_tokens_of_a_teacher_elsewhere_are_its_whole_distribution():
    head, student, teacher = make_heads()
    found = compute_top_k_divergences(student, head, *take_top_k(head, teacher, 53))
    whole = compute_token_divergences(student, head, teacher, head, 0.0)
    torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)
    slopes = [torch.autograd.grad(x.sum(), student)[0] for x in (found, whole)]
    torch.testing.assert_close(*slopes, atol=1e-9, rtol=0)


def test_tokens_that_the_student_lacks_are_left_out():
    head, student, teacher = make_heads()
    ids, logps = take_top_k(head, teacher, 5)
    lacking = ids.clone()
    lacking[:, -1] = 53
    found = compute_top_k_divergences(student, head, lacking, logps)
    others = logps[:, :4] - torch.log1p(-logps[:, 4:].exp())
    torch.testing.assert_close(found, compute_top_k_divergences(student, head, ids[:, :4], others))


def make_examples(shared):
    random, examples = torch.Generator().manual_seed(0), []
    for i, length in enumerate((5, 9, 1, 7)):
        seed = torch.Generator().manual_seed(i)
        context, prompt, answer = (
            torch.randint(3, 96, (n,), generator=g).tolist()
            for n, g in ((20, torch.Generator().manual_seed(99) if shared else seed), (12, seed), (length, random))
        )
        examples.append(make_teacher_example(prompt, context + prompt, answer, i))
    return examples


def take_step(model, examples, objective, collator, groups=None):
    from objective_steps import get_gradients

    from slimtune.core.attention.attention_functions import using_packed_attention
    from slimtune.core.training.loss import compute_step_loss

    batches = [collator([examples[i] for i in group]) for group in groups or collator.group_rows(examples)]
    with using_packed_attention(model):
        items = objective.count_items(examples)
        loss = sum(compute_step_loss(model, batch, items, objective) for batch in batches)
        loss.backward()
    return loss.item(), get_gradients(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("shared", [True, False], ids=["one context", "contexts of their own"])
def test_packed_rows_are_learned_as_alone(family, shared):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build_family(family).float(), config).train()
    objective, examples = load_objective_class("context")(context="x", beta=0.3), make_examples(shared)
    packed, alone = TeacherCollator(make_collator(model, 0)), TeacherCollator(Collator(0, packing=False))
    assert packed(examples)["teacher"]["input_ids"].shape[1] == 22 + 4 * 12 + 20 * (1 if shared else 4)
    loss, gradients = take_step(model, examples, objective, packed)
    other_loss, other_gradients = take_step(model, examples, objective, alone, [[0], [1], [2], [3]])
    assert loss == pytest.approx(other_loss, rel=1e-5, abs=1e-5)
    for name, gradient in gradients.items():
        scale = float(other_gradients[name].abs().max())
        torch.testing.assert_close(gradient, other_gradients[name], atol=1e-5 * scale + 1e-7, rtol=1e-4)
