"""Reinforcement learning with a reward that a program can check: TRL's GRPOTrainer with an adapter, offline.

    python examples/grpo.py [BASE] [--dora] [--steps 15] [--out runs/grpo]

SmolLM2 learns to answer a sum with the number alone, "12" and not "The answer is 12.". Each step samples several
answers to each of a few sums, and makes those likelier that earned more than the other answers to the same sum. The
reward is measured before and after on sums that were not trained on. docs/preferences.md says more.
"""

import argparse
import random
import re

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from slimtune import LoraConfig, get_peft_model
from slimtune.core.models.loader import load_base

ANSWER_TOKENS = 16


def make_sums(count: int, seed: int) -> list[tuple[int, int]]:
    """Return different sums of two numbers from 1 to 9, in an order that the seed decides."""
    return random.Random(seed).sample([(a, b) for a in range(1, 10) for b in range(1, 10)], count)


def ask(a: int, b: int) -> list[dict[str, str]]:
    """Return the conversation that asks for a sum."""
    return [{"role": "user", "content": f"What is {a} + {b}? Answer with the number alone."}]


def reward_number(completions: list[list[dict[str, str]]], total: list[int], **_: object) -> list[float]:
    """Return the reward of each answer: 1 for the right number alone, 0.5 if it is somewhere in the answer, else 0."""
    rewards = []
    for (message,), right in zip(completions, total, strict=True):
        answer = message["content"].strip()
        found = str(right) in re.findall(r"\d+", answer)
        rewards.append(1.0 if answer == str(right) else 0.5 * found)
    return rewards


@torch.no_grad()
def measure(model: torch.nn.Module, tokenizer: object, sums: list[tuple[int, int]]) -> tuple[float, list[str]]:
    """Return the mean reward of the greedy answers to some sums, and the answers."""
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(ask(*s), tokenize=False, add_generation_prompt=True) for s in sums]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    model.eval()
    out = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = reward_number(completions=[[{"content": text}] for text in answers], total=[a + b for a, b in sums])
    return sum(rewards) / len(rewards), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2-135m", help="a folder, an id of the Hub, or a name")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="runs/grpo", help="folder of the adapter")
    options = parser.parse_args()

    sums = make_sums(81, seed=0)
    held_out, trained = sums[:24], sums[24:]
    rows = [{"prompt": ask(a, b), "total": a + b} for a, b in trained]
    base = load_base(options.base, dtype="float32")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=options.dora, task_type="CAUSAL_LM")
    model, tokenizer = get_peft_model(base.model, config), base.tokenizer
    before, answers = measure(model, tokenizer, held_out)
    print(f"before: reward {before:.3f} on {len(held_out)} sums; {sum(held_out[0])}: {answers[0]!r}")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_number,
        args=GRPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=32,  # answers of a step: 4 sums, each with 8 answers
            num_generations=8,
            max_completion_length=ANSWER_TOKENS,
            learning_rate=1e-4,
            beta=0.0,  # no penalty for the distance from the base
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']}: reward {entry['reward']:.3f} (sampled)")
    after, answers = measure(model, tokenizer, held_out)
    print(f"after: reward {after:.3f} on {len(held_out)} sums; {sum(held_out[0])}: {answers[0]!r}")
    model.save_pretrained(f"{options.out}/adapter")


if __name__ == "__main__":
    main()
