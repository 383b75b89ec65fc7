"""A run that learns from its own answers: it samples and scores those of a step, and measures them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.data.collator import Collator
from ..core.foundation import distributed
from ..core.foundation.registry import Registry
from ..core.foundation.sequences import IGNORE_INDEX
from ..core.training.loss import compute_supervised_token_nll, score_examples_by_number
from ..core.training.objective import Batch, Example
from ..core.training.prepared_run import PreparedRun
from ..core.training.validation_scores import score_across_processes
from ..errors import RunError, UsageError
from ..extras.rewards.reward_workers import RewardWorkers
from .policy_losses import estimate_token_kl
from .reward_probes import describe_fired_probes, score_probes
from .sampled_answers import AnswerSampling, SampledAnswer, make_answers_to_score
from .sampler_check import LARGEST_DIFFERENCES, SamplerCheck

if TYPE_CHECKING:
    from .policy_objective import PolicyObjective

MOST_STEPS_WITHOUT_SIGNAL = 10
"""Steps in a row in which no prompt has answers of different rewards, after which a run stops."""
SAMPLER_FOLDER = "sampler"
"""Folder of a run with the adapter that a server samples with."""
EVENT = "answers"
"""Value of `event` in the lines of metrics.jsonl with the best and the worst answer of a step."""


SampleAnswers = Callable[[Any, Any, Sequence[Sequence[int]], AnswerSampling], list[list[SampledAnswer]]]
"""`sample(model, tokenizer, prompts, how)` returns the answers to each prompt, which is token ids."""
POLICY_SAMPLERS: Registry[SampleAnswers] = Registry("slimtune.policy_samplers", "sampler")
"""Of the model that trains."""
SERVER_SAMPLERS: Registry[Callable[[str, Path, float], SampleAnswers]] = Registry(
    "slimtune.server_samplers", "sampler on a server"
)
"""From a server's address, a folder for the adapters that it gets, and the seconds that a request may take."""


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt with its sampled answers and their rewards."""

    answers: list[SampledAnswer]
    rewards: list[list[float]]  # of each answer by each reward


@dataclass
class StepMeasures:
    """TRL's measures of sampled answers, summed over steps until they are logged."""

    totals: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    clipped: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, values: dict[str, float]) -> None:
        """Add the measures of a step."""
        self.steps += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def add_clipped(self, clipped: Tensor, weights: Tensor | None) -> None:
        """Add whether the tokens, or answers, of a micro-batch were clipped, and their weights if a server sampled."""
        self.clipped.append(clipped)
        self.weights += [] if weights is None else [weights]

    def average_and_clear(self) -> dict[str, float]:
        """Return the means over the steps, and start again."""
        found = {name: total / self.steps for name, total in self.totals.items()}
        if self.clipped:
            found["clip_ratio/region_mean"] = float(torch.cat(self.clipped).double().mean())
        if self.weights:
            weights = torch.cat(self.weights).double()
            name = "sampling/importance_sampling_ratio"
            found |= {f"{name}/min": float(weights.min()), f"{name}/mean": float(weights.mean())}
            found[f"{name}/max"] = float(weights.max())
        self.totals, self.steps, self.clipped, self.weights = {}, 0, [], []
        return found


class PolicyRun:
    """Samples, scores and measures the answers of a run's steps.

    Args:
        objective: its settings.
        prepared: the run; its model samples.

    Raises:
        UsageError: the adapter has dropout, so that the sampler would not be the model that trains.
    """

    def __init__(self, objective: "PolicyObjective", prepared: PreparedRun) -> None:
        self.objective, self.prepared, self.model = objective, prepared, prepared.model
        self.tokenizer, self.file = prepared.base.tokenizer, prepared.recipe.data.train
        if prepared.settings.fsdp:
            raise UsageError("train.fsdp is true, and a sharded base does not sample", "train.fsdp false")
        _disable_dropout_of_base(prepared)
        bound = objective.max_logp_difference
        bound = LARGEST_DIFFERENCES[prepared.base.dtype] if bound == "auto" else bound
        self.check = SamplerCheck(float(bound), self.tokenizer, self.file)
        self.sample: SampleAnswers = self._make_sampler()
        self.workers = RewardWorkers(objective.rewards, objective.reward_weights, float(objective.reward_timeout))
        prompt = prepared.data.train[:1]
        self.workers.try_out(make_answers_to_score(prompt, [[SampledAnswer([], [], "0", True)]], str(self.file)))
        self.measures = StepMeasures()
        self.steps_without_signal = 0
        self._sampled: tuple[int, list[Example]] = (-1, [])  # the last step and its answers

    def _make_sampler(self) -> SampleAnswers:
        """Return what samples: this model, or a server, which is tried out by an answer of one token."""
        url = self.objective.vllm_server_base_url
        if not url:
            return POLICY_SAMPLERS.load("model")
        if distributed.world_size() > 1:
            raise UsageError(
                f"{distributed.world_size()} processes train, and a server samples for one alone",
                "one process, or the model that trains as the sampler",
                "leave --sampler out",
                field="task.vllm_server_base_url",
            )
        folder = self.prepared.run.path / SAMPLER_FOLDER
        sample = SERVER_SAMPLERS.load("http")(url, folder, float(self.objective.vllm_server_timeout))
        prompt = self.prepared.data.train[:1][0]["input_ids"]
        how = AnswerSampling("default", 1, float(self.objective.temperature), max_new_tokens=1, seed=0)
        sample(self.model, self.tokenizer, [prompt], how)
        return sample

    # --- a step -------------------------------------------------------------------------------------------------------

    def sample_step(self, prompts: Sequence[Example]) -> list[Example]:
        """Return the answers to a step's prompts as examples: each with its advantage and what the sampler said of it.

        A step that is repeated, because a gradient overflowed, has the same answers.

        Raises:
            RunError: a reward failed, or no step of the last ones had answers of different rewards.
        """
        step = self.prepared.state.step + 1
        if self._sampled[0] != step:
            self._sampled = (step, self._sample_new_step(prompts, step))
        return self._sampled[1]

    def _sample_new_step(self, prompts: Sequence[Example], step: int) -> list[Example]:
        objective, count = self.objective, self.objective.num_generations
        scored = self._sample_and_score(
            prompts, count, float(objective.temperature), mix_seed(self.prepared.settings.seed, step)
        )
        answers = [answer for prompt in scored for answer in prompt.answers]
        rewards = torch.tensor([one.rewards for one in scored], dtype=torch.float64)  # [P, K, rewards]
        sums = self.workers.sum_weighted(rewards)
        examples = [
            make_answer_example(prompt, answer, number * count + i)
            for number, (prompt, one) in enumerate(zip(prompts, scored, strict=True))
            for i, answer in enumerate(one.answers)
        ]
        self.check.begin_step(step, {e["answer"]: e["line"] for e in examples})
        for example, answer in zip(examples, answers, strict=True):
            learned = [label for label in example["labels"] if label != IGNORE_INDEX]
            self.check.require_same_tokens(example["answer"], answer.token_ids, learned)
            example |= objective.temperature_column
        log_ratios, kl = self._compare_with_reference(examples, answers)
        computed = objective.compute_advantages(sums, log_ratios.view_as(sums))
        without_signal, advantages = objective.find_prompts_without_signal(sums, computed), computed.flatten().tolist()
        width = max(len(answer.token_ids) for answer in answers)
        totals = sums.flatten().tolist()
        for example, answer, advantage, total in zip(examples, answers, advantages, totals, strict=True):
            padding = width - len(answer.token_ids)
            example |= {
                "advantage": advantage,
                "reward": total,
                "sampled_count": len(answer.token_ids),
                "sampled_tokens": answer.token_ids + [IGNORE_INDEX] * padding,
                "sampled_logps": answer.logps + [0.0] * padding,
            }
            if "reference_logps" in example:
                example["reference_logps"] = example["reference_logps"] + [0.0] * padding
        self._measure(sums, rewards, answers, kl, float(without_signal.double().mean()))
        self._record_best_and_worst(step, prompts, scored, sums)
        if step == 1:
            self._probe_rewards(prompts, scored, sums)
        self._require_signal(sums, bool(without_signal.all()), step)
        return examples

    def sample_greedy(self, prompts: Sequence[Example]) -> list[Example]:
        """Return the likeliest answer to each prompt as an example with its `reward`."""
        scored = self._sample_and_score_here(prompts, 1, 0.0, 0)
        sums = self.workers.sum_weighted(torch.tensor([one.rewards for one in scored], dtype=torch.float64))
        what = f"{len(prompts)} held-out prompts (the likeliest answer to each)"
        self.prepared.logger.say(f"step {self.prepared.state.step}: reward {float(sums.mean()):.3f} on {what}")
        return [
            make_answer_example(prompt, one.answers[0], number) | {"reward": float(sums[number, 0])}
            for number, (prompt, one) in enumerate(zip(prompts, scored, strict=True))
        ]

    def _sample_and_score(
        self, prompts: Sequence[Example], count: int, temperature: float, seed: int
    ) -> list[ScoredPrompt]:
        """Return the scored answers to prompts; each process samples a part of them."""
        world, rank = distributed.world_size(), distributed.rank()
        own = self._sample_and_score_here(prompts[rank::world], count, temperature, seed + (rank << 20))
        if world == 1:
            return own
        parts = distributed.all_gather_object(own)
        return [parts[number % world][number // world] for number in range(len(prompts))]

    def _sample_and_score_here(
        self, prompts: Sequence[Example], count: int, temperature: float, seed: int
    ) -> list[ScoredPrompt]:
        if not prompts:
            return []
        sampled = self.sample(
            self.model,
            self.tokenizer,
            [e["input_ids"] for e in prompts],
            AnswerSampling("default", count, temperature, self.objective.max_completion_length, seed),
        )
        rewards = self.workers.score(make_answers_to_score(prompts, sampled, str(self.file)))
        return [
            ScoredPrompt(answers, rewards[number * count : (number + 1) * count])
            for number, answers in enumerate(sampled)
        ]

    # --- the reference ------------------------------------------------------------------------------------------------

    def _compare_with_reference(
        self, examples: Sequence[Example], answers: Sequence[SampledAnswer]
    ) -> tuple[Tensor, float]:
        """Return the summed log ratio to the reference of each answer [N], 0 without `beta`, and the KL of a token.

        Without `beta` the KL divergence is measured on the first answer to each prompt.
        """
        every = 1 if self.objective.beta else self.objective.num_generations
        chosen = examples[::every]
        with self.model.disable_adapter():
            logps = score_token_logps(self.prepared, chosen)
        log_ratios, kl = torch.zeros(len(examples), dtype=torch.float64), []
        for number, own in enumerate(logps):
            said = torch.tensor(answers[number * every].logps, dtype=torch.float64)
            reference = torch.tensor(own, dtype=torch.float64)
            kl.append(estimate_token_kl(said, reference))
            if self.objective.beta:
                examples[number]["reference_logps"] = own
                log_ratios[number] = (said - reference).sum()
        return log_ratios, float(torch.cat(kl).mean())

    # --- measures -----------------------------------------------------------------------------------------------------

    def _measure(
        self, sums: Tensor, rewards: Tensor, answers: Sequence[SampledAnswer], kl: float, without_signal: float
    ) -> None:
        lengths = [len(answer.token_ids) for answer in answers]
        logps = [logp for answer in answers for logp in answer.logps]
        values = {
            "reward": float(sums.mean()),
            "reward_std": float(sums.std()) if sums.numel() > 1 else 0.0,
            "frac_reward_zero_std": without_signal,
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/clipped_ratio": sum(not answer.is_complete for answer in answers) / len(answers),
            "entropy": -sum(logps) / len(logps),
            "kl": kl,
        }
        if len(self.workers.names) > 1:
            means = zip(self.workers.names, rewards.flatten(0, 1).mean(0).tolist(), strict=True)
            values |= {f"rewards/{name}/mean": mean for name, mean in means}
        self.measures.add(values)

    def _probe_rewards(self, prompts: Sequence[Example], scored: Sequence[ScoredPrompt], sums: Tensor) -> None:
        """Warn, once in a run, of answers without any worth that the rewards give more than the model's own."""
        if distributed.is_main_process():
            probes = score_probes(self.objective, self.workers, prompts, [p.answers for p in scored], str(self.file))
            for sentence in describe_fired_probes(probes, sums):
                self.prepared.logger.say(f"warning: {sentence}")

    def say_measures(self, found: dict[str, float]) -> None:
        """Say the measures of the steps since the last line."""
        step, without = self.prepared.state.step, found["frac_reward_zero_std"]
        self.prepared.logger.say(
            f"step {step}: reward {found['reward']:.3f} (deviation {found['reward_std']:.3f}), "
            f"{100 * without:.0f} % of prompts without signal, "
            f"{found['completions/mean_length']:.0f} tokens an answer, entropy {found['entropy']:.2f}, "
            f"KL {found['kl']:.4f}, "
            f"largest difference to the sampler {found['sampling/sampling_logp_difference/max']:.1e} nats"
        )

    def take_measures(self) -> dict[str, float]:
        """Return the measures for the log, with the largest and the mean difference between sampler and trainer."""
        found = [d for part in distributed.all_gather_object([*self.check.differences.values()]) for d in part]
        if not found:
            return self.measures.average_and_clear()
        tokens = sum(d.tokens for d in found)
        measures = self.measures.average_and_clear() | {
            "sampling/sampling_logp_difference/max": max(d.largest for d in found),
            "sampling/sampling_logp_difference/mean": sum(d.total for d in found) / tokens,
        }
        self.say_measures(measures)
        return measures

    def _record_best_and_worst(
        self, step: int, prompts: Sequence[Example], scored: Sequence[ScoredPrompt], sums: Tensor
    ) -> None:
        found: dict[str, Any] = {"event": EVENT, "step": step}
        for name, place in (("best", int(sums.argmax())), ("worst", int(sums.argmin()))):
            number, i = divmod(place, sums.shape[1])
            found[name] = {
                "line": prompts[number]["line"],
                "reward": float(sums[number, i]),
                "text": scored[number].answers[i].text,
            }
        self.prepared.logger.record(found)

    def _require_signal(self, sums: Tensor, without: bool, step: int) -> None:
        self.steps_without_signal = self.steps_without_signal + 1 if without else 0
        if self.steps_without_signal < MOST_STEPS_WITHOUT_SIGNAL:
            return
        names = ", ".join(self.workers.names)
        if float(sums.amax() - sums.amin()) < 1e-12:
            found = f"every answer of step {step} has the reward {float(sums.flatten()[0]):g}"
        else:
            found = "each prompt's answers have one reward, though those of different prompts differ"
        raise RunError(
            f"{MOST_STEPS_WITHOUT_SIGNAL} steps in a row had no signal: {found} ({names})",
            "prompts to which some answers are better than others",
            "prompts that the base answers right in 5 to 50 % of its answers, a reward with steps between 0 and 1, "
            "more answers (task.num_generations), or a higher task.temperature; the best and worst answers of each "
            "step are in metrics.jsonl",
            code="no-reward-signal",
        )


def make_answer_example(prompt: Example, answer: SampledAnswer, number: int) -> Example:
    """Return a prompt and a sampled answer as an example: the sampled tokens themselves, all of them learned."""
    ids, tokens = prompt["input_ids"], answer.token_ids
    return {
        "input_ids": ids + tokens,
        "labels": [IGNORE_INDEX] * len(ids) + tokens,
        "line": prompt["line"],
        "answer": number,
    }


def score_token_logps(prepared: PreparedRun, examples: Sequence[Example]) -> list[list[float]]:
    """Return log p of each learned token of some examples, computed by all processes without gradient."""

    def score(model: Any, rows: Sequence[Example], collator: Collator, **options: Any) -> dict[int, list[float]]:
        def measure(batch: Batch) -> Sequence[Tensor]:
            return (-compute_supervised_token_nll(model, batch).double()).split(batch["row_targets"])

        return score_examples_by_number(model, rows, collator, measure, **options)

    where = "the reference of a step"
    return score_across_processes(score, where, prepared.model, examples, prepared.sharder, prepared.recovery)


def mix_seed(seed: int, step: object) -> int:
    """Return the seed of a step's answers: a number below 2 ** 62 that the run's seed and the step decide."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _disable_dropout_of_base(prepared: PreparedRun) -> None:
    """Turn off the dropout of the base; raise UsageError if the adapter has dropout of its own."""
    settings = prepared.recipe.method.settings
    for name, value in settings.items():
        if "dropout" in name and isinstance(value, int | float) and value:
            raise UsageError(
                f"method.{name} is {value:g}, and the model that samples has no dropout: the answers would be learned "
                "by another model than the one that sampled them",
                f"method.{name} 0 for {prepared.objective.name}",
                f"--set method.{name}=0",
                field=f"method.{name}",
            )
    for module in prepared.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # some layers keep a rate alone: OPT `dropout`, MPT `attn_dropout_p`
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
