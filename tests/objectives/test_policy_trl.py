"""Advantages, loss and gradients of sampled answers are those of TRL's trainers, in float64 on the same samples."""

import pytest
import torch
from objective_steps import get_gradients
from test_trl import WideTorch

from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_step_loss
from slimtune.objectives.policy_losses import compute_importance_weights
from slimtune.objectives.policy_run import SampledAnswer, make_answer_example

PROMPTS, K = [[7, 8, 9, 20], [30, 31, 32, 33], [11, 12, 13, 14]], 4  # padding would move TRL's positions
REWARDS = [0.0, 1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.3]
CASES = {
    "grpo": ("grpo", {"loss_type": "grpo", "beta": 0.1}),
    "dapo": ("grpo", {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ("grpo", {"loss_type": "bnpo", "scale_rewards": "batch", "beta": 0.05}),
    "dr-grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": ("rloo", {"beta": 0.05}),
    "rloo-normalized": ("rloo", {"beta": 0.2, "normalize_advantages": True, "epsilon": 0.1, "epsilon_high": 0.3}),
}


@pytest.fixture
def wide(monkeypatch):
    """Let TRL compute in float64."""
    monkeypatch.setattr("trl.kernels.chunked_logprob.torch", WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else t.to(torch.float32))


def make_trainer(name, settings, model, tokenizer, folder):
    """Return TRL's trainer whose generation returns fixed answers, and these answers."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config_class, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[name]
    args = config_class(
        str(folder), per_device_train_batch_size=len(PROMPTS) * K, num_generations=K, max_completion_length=9,
        num_iterations=2, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **settings,
    )  # fmt: skip
    rows = [{"prompt": f"prompt {i}"} for i in range(len(PROMPTS))]
    trainer = trainer_class(
        model,
        reward_funcs=lambda completions, **_: REWARDS,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    trainer.model.double()
    generator = torch.Generator().manual_seed(1)
    answers = [torch.randint(3, 250, (1 + i % 7,), generator=generator).tolist() for i in range(len(PROMPTS) * K)]
    prompts = [ids for ids in PROMPTS for _ in range(K)]
    texts = ["x"] * len(answers)
    generated = {"grpo": (prompts, answers, None, texts, None, {}, None, None), "rloo": (prompts, answers, texts)}[name]
    trainer._generate = lambda _: generated
    trainer.current_gradient_accumulation_steps = 1
    return trainer, answers


def sample_as_trl(trainer):
    rows = [{"prompt": f"prompt {i}"} for i in range(len(PROMPTS)) for _ in range(K)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_is_that_of_trl(case, tiny_llama, tiny_tokenizer, tmp_path, wide):
    name, settings = CASES[case]
    trainer, answers = make_trainer(name, settings, tiny_llama().double(), tiny_tokenizer(), tmp_path)
    model = trainer.model
    inputs = sample_as_trl(trainer)
    key = "old_per_token_logps" if name == "grpo" else "old_logps"
    noise = torch.Generator().manual_seed(2)
    old = inputs["completion_mask"] * 0.4 * torch.randn(inputs["completion_mask"].shape, generator=noise).double()
    with torch.no_grad():
        own_logps, reference = get_logps(trainer, inputs)
    inputs[key] = own_logps + old if name == "grpo" else ((own_logps + old) * inputs["completion_mask"]).sum(1)
    model.train()
    expected = trainer._compute_loss(model, inputs)
    expected.backward()
    expected_gradients = get_gradients(model)

    objective = load_objective_class(name)(rewards=["length:9"], num_generations=K, max_completion_length=9, **settings)
    rewards = torch.tensor(REWARDS, dtype=torch.float64).view(-1, K)
    mask = inputs["completion_mask"]
    ratios = ((own_logps - reference) * mask).sum(1).view(-1, K) if settings.get("beta") else torch.zeros_like(rewards)
    advantages = objective.compute_advantages(rewards, ratios).flatten()
    torch.testing.assert_close(advantages, inputs["advantages"].double(), atol=1e-6, rtol=1e-6)
    examples = make_examples(answers, inputs["advantages"].double(), own_logps + old, reference)
    items = objective.count_items(examples)
    for groups in ([range(12)], [range(5), range(5, 12)]):
        batches = [Collator(0, packing=False)([examples[i] for i in group]) for group in groups]
        loss = sum(compute_step_loss(model, batch, items, objective) for batch in batches)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        loss.backward()
        for parameter, gradient in get_gradients(model).items():
            torch.testing.assert_close(gradient, expected_gradients[parameter], atol=1e-9, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_answers_of_a_server_are_weighed_as_by_trl(mode, tiny_llama, tiny_tokenizer, tmp_path, wide):
    names = ("correction", "mode", "clip_max", "clip_min")
    values = dict(zip(names, (True, mode, 1.3, 0.8), strict=True))
    settings = {"loss_type": "dapo", "beta": 0.1, **{f"vllm_importance_sampling_{n}": v for n, v in values.items()}}
    trainer, answers = make_trainer("grpo", settings, tiny_llama().double(), tiny_tokenizer(), tmp_path)
    trainer.use_vllm = True
    with torch.no_grad():
        own, reference = get_logps(trainer, sample_as_trl_with(trainer, [[0.0] * len(ids) for ids in answers]))
    noise = 0.3 * torch.randn(own.shape, generator=torch.Generator().manual_seed(2)).double()
    said = ((own + noise) * 256).round() / 256  # TRL rounds them to float32
    inputs = sample_as_trl_with(trainer, [said[i, : len(ids)].tolist() for i, ids in enumerate(answers)])
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    expected_gradients = get_gradients(trainer.model)

    url = {"vllm_server_base_url": "http://127.0.0.1:1"}
    objective = load_objective_class("grpo")(
        rewards=["length:9"], num_generations=K, max_completion_length=9, **settings, **url
    )
    examples = make_examples(answers, inputs["advantages"].double(), said, reference)
    batch = Collator(0, packing=False)(examples)
    with torch.no_grad():
        weights = inputs["importance_sampling_ratio"].expand(own.shape)[inputs["completion_mask"].bool()]
        differences = torch.cat([(own - said)[i, : len(ids)] for i, ids in enumerate(answers)])
        found = compute_importance_weights(differences, [len(ids) for ids in answers], mode, 0.8, 1.3)
    assert 0.1 < float(((weights == 1.3) | (weights == 0) | (weights == 0.8)).double().mean()) < 1  # some are bounded
    counts = torch.tensor([len(ids) for ids in answers])
    spread = found.repeat_interleave(counts) if mode.startswith("sequence") else found
    torch.testing.assert_close(spread, weights.double(), atol=1e-9, rtol=0)
    loss = compute_step_loss(trainer.model, batch, objective.count_items(examples), objective)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    loss.backward()
    for parameter, gradient in get_gradients(trainer.model).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], atol=1e-9, rtol=1e-7)


def sample_as_trl_with(trainer, logps):
    """Let TRL weigh its answers as if vLLM had sampled them with these log-probabilities."""
    prompts, answers, *others = trainer._generate([])
    others[2] = logps
    trainer._generate = lambda _: (prompts, answers, *others)
    return sample_as_trl(trainer)


def get_logps(trainer, inputs):
    """Return log p of each token under the model and under its base, [N, L]."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    take = (ids, mask, inputs["completion_ids"].shape[1])
    own = trainer._get_per_token_logps_and_entropies(trainer.model, *take)[0]
    with trainer.model.disable_adapter():
        return own, trainer._get_per_token_logps_and_entropies(trainer.model, *take)[0]


def make_examples(answers, advantages, old, reference):
    examples = []
    for i, ids in enumerate(answers):
        prompt = {"input_ids": PROMPTS[i // K], "line": i // K}
        answer = SampledAnswer(ids, old[i].tolist(), "", True)
        examples.append(make_answer_example(prompt, answer, i) | {
            "advantage": advantages[i].item(), "sampled_logps": old[i].tolist(),
            "reference_logps": reference[i].tolist(),
        })  # fmt: skip
    return examples


def test_reinforce_is_the_plain_formula(tiny_llama):
    model = tiny_llama().double()
    objective = load_objective_class("reinforce")(rewards=["length:9"], beta=0.0)
    rewards = torch.tensor([[0.2], [1.0], [0.0]], dtype=torch.float64)
    advantages = objective.compute_advantages(rewards, torch.zeros(3, 1))
    assert advantages.flatten().tolist() == pytest.approx([-0.2, 0.6, -0.4])
    examples, expected = [], 0.0
    for i, prompt in enumerate(PROMPTS):
        ids, own = [5 + i, 9, 14][: i + 1], []
        logps = model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0]
        own = [logps[len(prompt) - 1 + at, token] for at, token in enumerate(ids)]
        expected = expected - advantages[i, 0] * sum(own) / 3
        example = make_answer_example({"input_ids": prompt, "line": i}, SampledAnswer(ids, [], "", True), i)
        said = [logp.item() for logp in own] + [0.0] * (3 - len(ids))
        examples.append(example | {"advantage": float(advantages[i, 0]), "sampled_logps": said})
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, parameters)
    compute_step_loss(model, Collator(0)(examples), objective.count_items(examples), objective).backward()
    for name, gradient, parameter in zip(names, wanted, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
