"""What objectives that learn from the model's own answers have in common: prompts, sampling, rewards and the log.

    a step    prompts ─▶ K sampled answers each ─▶ rewards ─▶ advantages ─▶ one packed tree: prompt once, K branches

The sampler is the model that trains, with the adapter on, or a server that gets the adapter before each step
(generation/server_sampler.py). What it says a token's log-probability is, is compared with
what the training step computes, before anything is learned from it (sampler_check.py). The answers of a step follow
from the run's seed and the number of the step, so a run that is resumed samples the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..core.data.tokenize import format_line_numbers
from ..core.training.objective import Batch, Example, Objective, ScoreRows, sum_targets_by_row
from ..errors import DataError
from ..extras.rewards.reward_specs import find_reward_error, make_reward_path_absolute
from .prompt_rows import PromptRows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.config import Recipe
    from ..core.data.class_labels import ClassLabels
    from ..core.data.tokenized_dataset import TokenizedDataset
    from ..core.training.datasets import RunDatasets
    from ..core.training.prepared_run import PreparedRun
    from .policy_losses import ClippedLosses
    from .policy_run import PolicyRun


@dataclass
class PolicyObjective(Objective):
    """An objective on prompts, whose answers the model samples itself; TRL's names.

    A subclass gives `compute_advantages`, and how the losses of tokens become the loss of a step.
    """

    formats: ClassVar[tuple[str, ...]] = ("prompt",)
    learning_rate_factor: ClassVar[float] = 0.1
    measures: ClassVar[tuple[str, ...]] = ("reward", "length", "nats")

    rewards: list[str] = config_field(
        [], "what scores the answers: file.py:function, http://…, or a built-in reward such as numeric-match:answer"
    )
    reward_weights: list[float] = config_field([], "weight of each reward in the sum; empty: 1 each")
    num_generations: int = config_field(8, "answers sampled to each prompt of a step", ge=2, le=1024)
    max_completion_length: int = config_field(256, "longest answer, in tokens", ge=1, le=10**6)
    temperature: Number = config_field(1.0, "temperature of sampling and of the learned log-probabilities", ge=0.01)
    beta: Number = config_field(0.0, "weight of the KL divergence from the base; 0: it is only measured", ge=0)
    epsilon: Number = config_field(0.2, "how far below 1 the ratio of a probability to the sampled one may fall", gt=0)
    epsilon_high: Number | None = config_field(
        None, "how far above 1 that ratio may rise; DAPO takes 0.28", when_null="as epsilon", gt=0
    )
    reward_timeout: Number = config_field(60.0, "seconds that a reward may take for the answers of a step", gt=0)
    max_logp_difference: Literal["auto"] | Number = config_field(
        "auto",
        "largest difference between log p of a token where it is sampled and where it is learned; auto: by the dtype",
        gt=0,
    )
    vllm_server_base_url: str = config_field(
        "", "address of a server that samples the answers: slimtune serve, or vLLM; empty: the model that trains"
    )
    vllm_server_timeout: Number = config_field(240.0, "seconds that a request to that server may take", gt=0)
    vllm_importance_sampling_correction: bool = config_field(
        True, "weigh what a server sampled by p where it is learned / p where it was sampled; false: PPO's ratio alone"
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        config_field("sequence_mask", "weights of tokens or of whole answers; outside the bounds clipped, or 0")
    )
    vllm_importance_sampling_clip_max: Number | None = config_field(
        3.0, "largest such weight", when_null="no bound", gt=0
    )
    vllm_importance_sampling_clip_min: Number | None = config_field(
        None, "smallest such weight", when_null="no bound", ge=0
    )

    @property
    def corrects_sampler(self) -> bool:
        """Whether answers are weighed, because a server sampled them."""
        return bool(self.vllm_server_base_url) and self.vllm_importance_sampling_correction

    @property
    def _weight_bounds(self) -> tuple[float | None, float | None]:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        return None if low is None else float(low), None if high is None else float(high)

    @property
    def high(self) -> float:
        """`epsilon_high`, or `epsilon` in its place."""
        return float(self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def run(self) -> PolicyRun | None:
        """What samples and scores answers, once a run is prepared."""
        found: PolicyRun | None = vars(self).get("_run")
        return found

    @classmethod
    def set_paths_absolute_in_place(cls, settings: dict[str, Any], folder: Path) -> None:
        if isinstance(rewards := settings.get("rewards"), list):
            settings["rewards"] = [make_reward_path_absolute(str(spec), folder) for spec in rewards]

    def find_missing(self) -> Iterator[FieldError]:
        if not self.rewards:
            hint = "--reward rewards.py:function, or --reward numeric-match:answer"
            yield self.error("rewards", "at least one reward, which scores the answers", hint)

    def find_conflicts(self) -> Iterator[FieldError]:
        for spec in self.rewards:
            if (problem := find_reward_error(spec)) is not None:
                yield self.error("rewards", problem.expected, problem.hint, f": {problem.problem}")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            yield self.error("reward_weights", f"one weight for each of the {len(self.rewards)} rewards, or none")
        address = urlsplit(self.vllm_server_base_url)
        if self.vllm_server_base_url and (address.scheme not in ("http", "https") or not address.hostname):
            yield self.error("vllm_server_base_url", "the address of a server", "such as http://127.0.0.1:8000")

    def list_plan_notes(self) -> Sequence[str]:
        by_whom = "a server samples them, and waiting for it" if self.vllm_server_base_url else "sampling them"
        return (
            f"Learning is planned for answers of {self.max_completion_length} tokens, {self.num_generations} to each "
            f"prompt; {by_whom} before each step takes time that this plan does not count.",
        )

    # --- rows ---------------------------------------------------------------------------------------------------------

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        data, found = recipe.data, super().prepare_datasets(datasets, recipe, tokenizer)
        for rows in (found.train, found.validation, found.test):
            lengths = zip(rows.lines, rows.lengths.tolist(), strict=True)
            if long := [line for line, n in lengths if n > data.max_seq_len]:
                longest = int(rows.lengths.max())
                raise DataError(
                    f"{data.train}: {len(long)} prompts leave no room for an answer of {self.max_completion_length} "
                    f"tokens ({format_line_numbers(long)}): the longest has {longest - self.max_completion_length}",
                    f"prompt and answer of at most max_seq_len = {data.max_seq_len} tokens together",
                    f"--max-seq-len {longest}, a smaller task.max_completion_length, or shorter prompts",
                )
        return found

    def prepare_rows(
        self, rows: TokenizedDataset, classes: ClassLabels | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return prompts that know how long their answers may become."""
        return PromptRows(rows, self.num_generations, self.max_completion_length)

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Start the rewards, and make what samples."""
        from .policy_run import PolicyRun

        vars(self)["_run"] = PolicyRun(self, prepared)

    # --- steps --------------------------------------------------------------------------------------------------------

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the sampled answers to the prompts of a step, each an example, with what was said of its tokens."""
        return examples if self.run is None or "is_probe" in examples[0] else self.run.sample_step(examples)

    def prepare_evaluation(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return one greedy answer to each prompt, with its reward."""
        return examples if self.run is None else self.run.sample_greedy(examples)

    def measure_steps(self) -> dict[str, float]:
        """Return TRL's measures of the sampled answers, means over the steps since the last call."""
        return {} if self.run is None else self.run.take_measures()

    def make_longest_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Return the answers of a step as if each were as long as it may be, to measure the memory of learning."""
        length = self.max_completion_length
        filler: Example = {"sampled_logps": [0.0] * length, "reference_logps": [0.0] * length, "is_probe": True}
        filler |= {"answer": 0, "advantage": 1.0, "sampled_count": length, **self.temperature_column}
        # The prompt's tokens from another one on for each answer: what answers have in common would be computed once.
        return [
            {
                "input_ids": e["input_ids"] + answer,
                "labels": e["labels"] + answer,
                "line": e["line"],
                "sampled_tokens": answer,
                **filler,
            }
            for e in examples
            for number in range(self.num_generations)
            for answer in [[*islice(cycle(e["input_ids"]), number, number + length)]]
        ]

    @property
    def temperature_column(self) -> dict[str, float]:
        """What an example says of the temperature; nothing if it is 1."""
        return {} if self.temperature == 1 else {"temperature": float(self.temperature)}

    # --- values -------------------------------------------------------------------------------------------------------

    def compute_advantages(self, rewards: Tensor, summed_log_ratios: Tensor) -> Tensor:
        """Return the advantages [P, K] of a step's answers.

        Args:
            rewards: weighted sums [P, K].
            summed_log_ratios: log p of each answer minus that under the reference [P, K]; 0 if `beta` is 0.
        """
        raise NotImplementedError

    def find_prompts_without_signal(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Return the prompts that nothing is learned from, bool [P]: all their answers have one reward."""
        from .group_advantages import find_groups_without_signal

        return find_groups_without_signal(rewards)

    def compute_clipped(self, logps: Tensor, old_logps: Tensor, batch: Batch) -> ClippedLosses:
        """Return the losses of the tokens [T], or of the answers [N], of a micro-batch."""
        raise NotImplementedError

    def sum_losses(self, found: ClippedLosses, logps: Tensor, batch: Batch) -> Tensor:
        """Return what the losses of a micro-batch add to the step's loss, before `count_items` divides it."""
        raise NotImplementedError

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the micro-batch's share of the step's loss."""
        from .policy_losses import compute_importance_weights, remove_padding, repeat_for_tokens

        logps, counts = -values, batch["row_targets"]
        if self.run is not None and "is_probe" not in batch:
            self.run.check.compare(logps.detach(), batch)
        old_logps = remove_padding(batch["sampled_logps"].to(values.dtype), counts)
        weights = None
        if self.corrects_sampler:
            mode, (low, high) = self.vllm_importance_sampling_mode, self._weight_bounds
            weights = compute_importance_weights(logps.detach() - old_logps, counts, mode, low, high)
            old_logps = logps.detach()
        clipped = self.compute_clipped(logps, old_logps, batch)
        if self.run is not None and "is_probe" not in batch:
            self.run.measures.add_clipped(clipped.clipped.detach(), weights)
        if weights is not None:
            are_of_tokens = len(clipped.losses) == len(logps)
            spread = repeat_for_tokens(weights, counts) if are_of_tokens and len(weights) != len(logps) else weights
            clipped = clipped._replace(losses=clipped.losses * spread)
        return self.sum_losses(clipped, logps, batch) / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the reward, the number of tokens and the summed −log p of each answer."""
        import torch

        counts = torch.tensor(batch["row_targets"], dtype=torch.float64, device=values.device)
        return torch.stack([batch["reward"].double(), counts, sum_targets_by_row(values.double(), batch)], dim=1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the mean reward, its negative as the loss, and the mean length in tokens."""
        reward, length, _ = scores.mean(axis=0).tolist()
        return {"loss": -reward, "reward": reward, "completions/mean_length": length}
