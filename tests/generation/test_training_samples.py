"""Answers sampled between two training steps: exact log-probabilities, and nothing that changes the training."""

import contextlib

import pytest
import torch
from models_zoo import gemma2, llama, qwen2

from slimtune import LoraConfig, PrefixTuningConfig, get_peft_model
from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.generation.answer_queue import SamplingParams
from slimtune.generation.generation_models import GenerationModel
from slimtune.generation.training_samples import sample_answers_between_steps

PROMPTS = [[7, 8, 9, 20], [30, 31]]
COUNT = 4
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "lora_dropout": 0.2}
CONFIGS = {
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(use_dora=True, **LORA),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


def make_training(config, base=llama):
    """Return a model that trains, and a function that makes one step with dropout."""
    torch.manual_seed(0)
    model = get_peft_model(base(dtype=torch.float32), config())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.model.layers[0].eval()  # one module that the training itself does not train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

    def step():
        ids = torch.randint(3, 128, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def sample(model, tokenizer, adapter="default", ends=(5, 6), **params):
    answering = GenerationModel(adapter, tokenizer, frozenset(ends), 64)
    params = SamplingParams(**{"max_new_tokens": 10, "temperature": 1.0, "seed": 3, **params})
    return sample_answers_between_steps(model, answering, PROMPTS, params, count=COUNT)


@torch.no_grad()
def score_by_teacher_forcing(model, adapter, prompt, token_ids):
    """Return the log-probability of each token of an answer by one pass over prompt and answer."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with model.disable_adapter() if adapter == BASE_ROW else contextlib.nullcontext():
        ids = torch.tensor([[*prompt, *token_ids]])
        log_probs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for module, training in modes.items():
        module.training = training
    return log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(
    ("base", "config"), [(llama, "lora"), (llama, "dora"), (llama, "prefix"), (qwen2, "lora"), (gemma2, "lora")]
)
def test_log_probabilities_are_those_of_the_trainer(base, config, tokenizer):
    model, step = make_training(CONFIGS[config], base)
    for _ in range(3):
        step()
        with using_packed_attention(model):
            tuned, reference = (sample(model, tokenizer, name) for name in ("default", BASE_ROW))
        for adapter, groups in (("default", tuned), (BASE_ROW, reference)):
            for prompt, group in zip(PROMPTS, groups, strict=True):
                assert len({tuple(answer.token_ids) for answer in group}) == COUNT
                for answer in group:
                    expected = score_by_teacher_forcing(model, adapter, prompt, answer.token_ids)
                    assert [entry.token for entry in answer.logprobs] == answer.token_ids
                    assert [entry.logprob for entry in answer.logprobs] == pytest.approx(expected, abs=1e-5)
    assert [a.token_ids for group in tuned for a in group] != [a.token_ids for group in reference for a in group]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_training_goes_on_as_if_nothing_was_sampled(config, tokenizer):
    losses = []
    for samples in (False, True):
        model, step = make_training(CONFIGS[config])
        losses.append([])
        for _ in range(3):
            losses[-1].append(step())
            before = [
                {name: module.training for name, module in model.named_modules()},
                {name: parameter.requires_grad for name, parameter in model.named_parameters()},
                (model.active_adapters, torch.get_rng_state().tolist()),
            ]
            if samples:
                sample(model, tokenizer)
                sample(model, tokenizer, BASE_ROW)
            assert before == [
                {name: module.training for name, module in model.named_modules()},
                {name: parameter.requires_grad for name, parameter in model.named_parameters()},
                (model.active_adapters, torch.get_rng_state().tolist()),
            ]
    assert losses[0] == losses[1]


def test_answers_depend_on_their_seeds_only(tokenizer):
    model, _ = make_training(CONFIGS["lora"])
    first, again, greedy = (sample(model, tokenizer, temperature=t) for t in (1.5, 1.5, 0.0))
    assert [a.token_ids for g in first for a in g] == [a.token_ids for g in again for a in g]
    shifted = sample(model, tokenizer, temperature=1.5, seed=4)
    assert [a.token_ids for a in shifted[0][:-1]] == [a.token_ids for a in first[0][1:]]
    assert len({tuple(a.token_ids) for a in greedy[0]}) == 1


def test_an_answer_has_the_token_that_ends_it(tokenizer):
    model, _ = make_training(CONFIGS["lora"])
    ends = tuple(range(3, 60))
    for answer in (a for group in sample(model, tokenizer, ends=ends, max_new_tokens=40) for a in group):
        assert answer.finish_reason == "stop"
        assert answer.token_ids[-1] in ends
        assert not set(answer.token_ids[:-1]) & set(ends)


def test_other_adapters_do_not_stay_active(tokenizer):
    model, _ = make_training(CONFIGS["prefix"])
    model.add_adapter("other", CONFIGS["prefix"]())
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    sample(model, tokenizer, "other")
    assert model.active_adapters == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
