"""Greedy answers of many families, against transformers' `generate`: tokens, and log-probabilities in fp32."""

import pytest
import torch
from models_zoo import shake
from tiny_families import build

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.generation.answer_queue import GeneratedAnswer, SamplingParams
from slimtune.generation.generation_models import GenerationModel
from slimtune.generation.text_generator import TextGenerator

PROMPTS = [[7, 8, 9, 10, 11, 12], [30, 31, 32]]
COUNT = 8
FAMILIES = ["llama", "gpt2", "bloom", "gemma3_text", "gemma4_text", "deepseek_v3", "lfm2", "qwen3_next", "mamba"]
OWN_STATES = ["rwkv", "openai-gpt", "recurrent_gemma", "minimax"]
"""Families without a cache that can be handed in, or with states in their modules."""


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def generate_by_transformers(model, prompt):
    """Return greedy tokens and their log-probabilities."""
    settings = {"do_sample": False, "max_new_tokens": COUNT, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **settings
    )
    values = [logits[0].float().log_softmax(-1).max().item() for logits in found.logits]
    return found.sequences[0, len(prompt) :].tolist(), values


FAST = ("llama", "gemma3_text", "lfm2")


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in (*FAMILIES, *OWN_STATES)]
)
def test_answers_are_those_of_transformers(family):
    base = build(family).float()
    if family == "gemma3_text":
        base.get_input_embeddings().weight.data *= 0.05  # else one token has all of the probability
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).eval()
    shake(model)
    asked = [(adapter, prompt) for adapter in ("default", BASE_ROW) for prompt in PROMPTS]
    expected = [generate_by_transformers(model, prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        expected += [generate_by_transformers(model, prompt) for prompt in PROMPTS]
    assert expected[0] != expected[2]
    generator = TextGenerator(model)
    for batches in ([[each] for each in asked], [asked]):
        answers = []
        for batch in batches:
            models = [(GenerationModel(adapter, Numbers(), frozenset(), None), prompt) for adapter, prompt in batch]
            answers += [GeneratedAnswer(m, prompt, SamplingParams(COUNT, top_logprobs=0)) for m, prompt in models]
            generator.generate(answers[-len(batch) :])
        for answer, (tokens, values) in zip(answers, expected, strict=True):
            assert answer.token_ids == tokens
            assert [entry.logprob for entry in answer.logprobs] == pytest.approx(values, abs=1e-4)
