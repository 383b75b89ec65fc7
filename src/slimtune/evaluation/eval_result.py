"""What `eval --json` prints and a run folder keeps as `eval-<name>.json`, as types.

    EvalResult ─┬─ TextEvalResult ─┬─ TextOrPairEvalResult     losses, prompt dependence; of pairs: preferences
                │                  └─ KTOEvalResult     losses of good answers, and how good and bad ones are told apart
                ├─ ClassificationEvalResult             accuracy, F1, confusion table
                └─ RewardEvalResult                     accuracy and margin on pairs

What is measured on the rows is a `EvalMeasures` of its own; in JSON its keys stand beside the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.foundation.json_results import INLINE, OMIT_NONE, from_json_dict
from .estimate import Estimate

WHO: tuple[Literal["base", "tuned"], ...] = ("base", "tuned")
"""The two models of an evaluation, the base first."""


# --- on the rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvalMeasures:
    """What is measured on the rows."""

    rows: int
    """Rows that were measured."""
    different_rows: int
    """Rows that differ from each other; equal rows count as one in the intervals."""


@dataclass(frozen=True, kw_only=True)
class PromptDependence:
    """How much the loss of an answer rises after another row's prompt, in nats per token."""

    rows: int
    """Rows that were scored after another row's prompt."""
    base: Estimate
    """Of the base."""
    tuned: Estimate
    """Of the tuned model."""
    change: Estimate
    """Tuned model minus base; below 0, the tuned model depends less on its prompts."""
    passed: bool
    """Whether the answers of the tuned model still depend on their prompts."""


@dataclass(frozen=True, kw_only=True)
class LossMeasures(EvalMeasures):
    """Losses of base and tuned model on the supervised tokens; of preference rows, on the good answers."""

    tokens: int
    """Supervised tokens of the rows."""
    base_loss: Estimate
    """Loss of the base, in nats per supervised token."""
    tuned_loss: Estimate
    """Loss of the tuned model, in nats per supervised token."""
    loss_reduction: Estimate
    """Base minus tuned model, in nats per supervised token; above 0, the tuned model is better."""
    base_perplexity: Estimate | None
    """e to the base's loss; null: too large for a float."""
    tuned_perplexity: Estimate | None
    """e to the tuned model's loss; null: too large for a float."""
    base_accuracy: Estimate
    """Share of the tokens that are the base's likeliest, 0 to 1."""
    tuned_accuracy: Estimate
    """Share of the tokens that are the tuned model's likeliest, 0 to 1."""
    accuracy_gain: Estimate
    """Tuned model minus base; above 0, the tuned model is better."""
    rows_better: int
    """Rows on which the tuned model has the lower loss."""
    windowed_documents: int | None = None
    """Documents whose windows count as the rows, because they are fewer than 6; null: each document is a row."""
    prompt_dependence: PromptDependence | None = None
    """Whether answers depend on their prompts; null: not tested."""


@dataclass(frozen=True, kw_only=True)
class LengthSubsetAccuracy:
    """Preferences among the pairs whose chosen answer is the longer one, or the shorter one."""

    pairs: int
    """Number of such pairs."""
    base_accuracy: float | None
    """Share in which the base prefers the chosen answer, 0 to 1; null: there are no such pairs."""
    tuned_accuracy: float | None
    """The same of the tuned model."""


@dataclass(frozen=True, kw_only=True)
class PairPreferences:
    """How base and tuned model prefer the chosen answers of pairs."""

    pairs: int
    """Number of pairs."""
    base_accuracy: Estimate
    """Share of the pairs in which the base gives the chosen answer the higher log p, 0 to 1."""
    tuned_accuracy: Estimate
    """The same of the tuned model."""
    accuracy_gain: Estimate
    """Tuned model minus base."""
    base_token_accuracy: Estimate
    """Share of the pairs in which the base gives the chosen answer the higher log p per token, 0 to 1."""
    tuned_token_accuracy: Estimate
    """The same of the tuned model."""
    token_accuracy_gain: Estimate
    """Tuned model minus base."""
    base_margin: Estimate
    """Mean of log p(chosen) - log p(rejected) by the base, in nats per pair."""
    tuned_margin: Estimate
    """The same by the tuned model."""
    margin_gain: Estimate
    """Tuned model minus base; above 0, the tuned model is better."""
    pairs_better: int
    """Pairs whose margin is higher by the tuned model."""
    by_length: dict[str, LengthSubsetAccuracy]
    """The pairs whose chosen answer is the longer one (`chosen_longer`), and the shorter one (`chosen_shorter`)."""


@dataclass(frozen=True, kw_only=True)
class ContextMeasures:
    """The base with the context in its prompt, beside base and tuned model without it."""

    loss: Estimate
    """Loss of the base with the context, in nats per supervised token."""
    gain: Estimate
    """Loss of the base without the context minus with it; above 0, the context helps."""
    kept: Estimate | None
    """Share of this gain that the tuned model has without the context; null: there is no gain."""
    tokens_saved: float
    """Tokens that a prompt has fewer without the context, on average."""
    sampled_answers: bool
    """Whether the answers are those of the base with the context, sampled; false: those of the rows."""
    prefill_seconds: float | None = None
    """Time that the tuned model takes to read a prompt without the context here, median of some; null: not measured."""
    prefill_seconds_with_context: float | None = None
    """Time that the base takes to read the same prompts with the context, in turns with the tuned model."""


@dataclass(frozen=True, kw_only=True)
class SFTMeasures(LossMeasures):
    """Measures of answers, texts, documents and preference pairs."""

    preference: PairPreferences | None = None
    """Preferences of pairs; null: the rows are no pairs."""
    context: ContextMeasures | None = field(default=None, metadata=OMIT_NONE)
    """What the context does, of a run of the task `context`; left out for other runs."""


@dataclass(frozen=True, kw_only=True)
class UnpairedPreferences:
    """How base and tuned model tell good answers from bad ones."""

    good: int
    """Number of good answers."""
    bad: int
    """Number of bad answers."""
    tuned_auc: Estimate
    """Probability that the tuned model gives a good answer a higher log p than a bad one; chance is 0.5."""
    base_auc: Estimate
    """The same of the base."""
    auc_gain: Estimate
    """Tuned model minus base."""
    tuned_token_auc: Estimate
    """Probability that the tuned model gives a good answer a higher log p per token than a bad one."""
    base_token_auc: Estimate
    """The same of the base."""
    token_auc_gain: Estimate
    """Tuned model minus base."""
    reward_auc: Estimate
    """Probability that a good answer has a higher reward, log p by the tuned model - log p by the base."""
    good_reward: float
    """Mean reward of the good answers, in nats."""
    bad_reward: float
    """Mean reward of the bad answers, in nats."""
    margin: float
    """Good minus bad reward, in nats."""


@dataclass(frozen=True, kw_only=True)
class KTOMeasures(LossMeasures):
    """Measures of answers with a label, good or bad; the losses are those of the good ones."""

    unpaired_preference: UnpairedPreferences
    """How good answers are told from bad ones."""


@dataclass(frozen=True, kw_only=True)
class BaselineComparisonMeasures(EvalMeasures):
    """Accuracy of a model with a head beside that of a baseline."""

    loss: float
    """Mean loss of the rows, in nats."""
    accuracy: Estimate
    """Share of the rows that are predicted correctly, 0 to 1."""
    accuracy_gain: Estimate
    """Model minus baseline; above 0, the model is better."""
    baseline: str
    """The baseline: the most frequent class of the rows, or "chance"."""
    baseline_accuracy: float
    """Share of the rows that the baseline predicts correctly, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Scores of one class."""

    name: str
    """Name of the class."""
    rows: int
    """Rows with this label."""
    precision: float
    """Share of the predictions of this class that are correct, 0 to 1; 0 without a prediction."""
    recall: float
    """Share of the rows with this label that are predicted so, 0 to 1; 0 without a row."""
    f1: float
    """Harmonic mean of precision and recall, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ClassificationMeasures(BaselineComparisonMeasures):
    """Measures of a classifier."""

    macro_f1: Estimate
    """Mean F1 over the classes that occur, 0 to 1."""
    classes: Sequence[ClassScore]
    """Scores of each class."""
    confusion: Sequence[Sequence[int]] | None
    """Number of rows by label (outer) and prediction (inner); null: a row may have several classes."""


@dataclass(frozen=True, kw_only=True)
class RewardModelMeasures(BaselineComparisonMeasures):
    """Measures of a reward model on pairs."""

    margin: Estimate
    """Mean reward of the chosen answer minus that of the rejected one."""
    chosen_reward: float
    """Mean reward of the chosen answers."""
    rejected_reward: float
    """Mean reward of the rejected answers."""


@dataclass(frozen=True, kw_only=True)
class RewardProbe:
    """What the rewards give to answers without any worth (objectives/reward_probes.py)."""

    name: str
    """empty, longest, repeated, echo or format."""
    answers: str
    """What the answers are, in words."""
    reward: float
    """Mean reward of these answers, one in place of each of the base's."""
    gain: Estimate
    """It minus the mean reward of the base's answers; above 0, the rewards can be pleased in this way."""


@dataclass(frozen=True, kw_only=True)
class PolicyMeasures(EvalMeasures):
    """Rewards of the answers that base and tuned model sample to held-out prompts."""

    answers: int
    """Answers that each model sampled to each prompt."""
    rewards: Sequence[str]
    """Names of the rewards, whose weighted sum is measured."""
    base_reward: Estimate
    """Mean reward of the base's answers."""
    tuned_reward: Estimate
    """Mean reward of the tuned model's answers."""
    reward_gain: Estimate
    """Tuned model minus base; above 0, the tuned model is better."""
    base_best_reward: Estimate
    """Mean over prompts of the highest reward of the base's answers; pass@K, if rewards are 0 or 1."""
    tuned_best_reward: Estimate
    """The same of the tuned model."""
    best_reward_gain: Estimate
    """Tuned model minus base."""
    base_length: float
    """Mean tokens of the base's answers."""
    tuned_length: float
    """Mean tokens of the tuned model's answers."""
    probes: Sequence[RewardProbe] = ()
    """What the rewards give to answers without any worth."""


# --- on general text, answers and tasks ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """Losses of base and tuned model on a text that the adapter never saw."""

    tokens: int
    """Tokens that were scored."""
    base_loss: float
    """Loss of the base, in nats per token."""
    tuned_loss: float
    """Loss of the tuned model, in nats per token."""
    change: Estimate
    """Tuned model minus base, in nats per token; above 0, something was forgotten."""


@dataclass(frozen=True, kw_only=True)
class ForgettingMeasures(LossChange):
    """Forgetting on general text."""

    text: str
    """File of the text."""
    budget: float
    """Nats per token that may be lost."""
    within: bool
    """Whether no more is shown to be forgotten than the budget."""
    kinds: dict[str, LossChange]
    """The losses by kind of text."""


@dataclass(frozen=True, kw_only=True)
class BaseAndTunedAnswerMeasure:
    """A check of answers by base and tuned model."""

    base: bool | float
    """Of the base's answer, or its mean over answers."""
    tuned: bool | float
    """Of the tuned model's answer, or its mean over answers."""


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """The answers of base and tuned model to one held-out prompt."""

    line: int
    """Line of the row in its file."""
    prompt: Sequence[dict[str, Any]]
    """Messages before the answer: `role`, `content`."""
    reference: str
    """The row's own answer."""
    base: str
    """Answer of the base."""
    tuned: str
    """Answer of the tuned model."""
    checks: dict[str, BaseAndTunedAnswerMeasure]
    """Checks of both answers by their names."""
    judged: tuple[int | None, int | None] | None = field(default=None, metadata=OMIT_NONE)
    """Verdicts of a judge with the base's answer first, and with the tuned model's first: 1 if the tuned model's is
    better, 0 if they are equal, -1 if it is worse, null if not clear. Left out without a judge."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often a judge prefers the tuned model's answer."""

    judge: str
    """The judge, as `--judge` names it."""
    prompts: int
    """Prompts that were judged."""
    wins: int
    """Prompts whose better answer is the tuned model's in both orders."""
    losses: int
    """Prompts whose better answer is the base's in both orders."""
    ties: int
    """The other prompts with a clear verdict in both orders."""
    unclear: int
    """Prompts without a clear verdict in one of the orders; they are left out."""
    win_rate: Estimate | None
    """(wins + ties / 2) / prompts, 0 to 1; null: no verdict is clear."""
    consistent: float | None
    """Share of the prompts with the same verdict in both orders; null: no verdict is clear."""
    base_characters: float
    """Mean length of the base's answers, in characters."""
    tuned_characters: float
    """Mean length of the tuned model's answers, in characters."""
    longer_won: float | None
    """Share of the decided prompts that the longer answer won; null: none is decided."""


@dataclass(frozen=True, kw_only=True)
class LmEvalTaskScores:
    """A metric of an lm-evaluation-harness task."""

    base: float
    """Score of the base."""
    base_stderr: float | None
    """Its standard error; null: the harness gives none."""
    tuned: float
    """Score of the tuned model."""
    tuned_stderr: float | None
    """Its standard error; null: the harness gives none."""
    higher_is_better: bool | None
    """Whether a higher score is better; null: the harness does not say."""


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextStep:
    """A command that may mend an evaluation which does not pass."""

    why: str
    """What it does about it."""
    command: str
    """The command, with numbers from the run."""


@dataclass(frozen=True, kw_only=True)
class EvalVerdict:
    """Whether an evaluation passes, and why not."""

    passed: bool
    """Whether the tuned model is better and forgot no more than its budget."""
    reasons: Sequence[str] = ()
    """Why not, one sentence each."""
    warning: str = ""
    """What a pass does not prove; empty: nothing."""
    next_steps: Sequence[NextStep] = ()
    """What mends it if it does not pass, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What every evaluation has."""

    run: str
    """The run folder or adapter folder."""
    task: str
    """Objective of the run's recipe."""
    split: str | None
    """Rows of the recipe that were measured, "test" or "validation"; null: those of another file."""
    data: str
    """File of the rows."""
    training_rows: int | None
    """Rows that are also training rows and were left out; null: the training rows cannot be read."""
    measures: EvalMeasures = field(metadata=INLINE)
    improved: bool
    """Whether the tuned model is better on the rows."""
    verdict: EvalVerdict
    """Whether the whole evaluation passes; the exit code is 1 if not."""
    dropped: int
    """Rows that are longer than `data.max_seq_len` and were left out."""
    truncated: int
    """Rows that are longer than `data.max_seq_len` and were cut."""
    dtype: str
    """Dtype of the base's weights."""
    quantization: str | None
    """How the base's linear layers are quantized; null: they are not."""
    seconds: float = 0.0
    """Time of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class TextEvalResult(EvalResult):
    """Evaluation of a model that writes text."""

    measures: LossMeasures = field(metadata=INLINE)
    forgetting: ForgettingMeasures | None = None
    """Loss on general text; null: not measured."""
    generations: Sequence[AnswerPair] | None = None
    """Answers of both models to held-out prompts; null: none were asked for."""
    generation_summary: dict[str, BaseAndTunedAnswerMeasure] | None = None
    """Mean of each check of the answers; of a check that is true or false, the share."""
    win_rate: WinRate | None = None
    """How often a judge prefers the tuned model's answer; null: without a judge."""
    tasks: dict[str, dict[str, LmEvalTaskScores]] | None = None
    """Scores by task of lm-evaluation-harness and by metric; null: none were asked for."""


@dataclass(frozen=True, kw_only=True)
class TextOrPairEvalResult(TextEvalResult):
    """Evaluation on answers, texts, documents or preference pairs."""

    measures: SFTMeasures = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class KTOEvalResult(TextEvalResult):
    """Evaluation on answers with a label, good or bad."""

    measures: KTOMeasures = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class ClassificationEvalResult(EvalResult):
    """Evaluation of a classifier."""

    measures: ClassificationMeasures = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class RewardEvalResult(EvalResult):
    """Evaluation of a reward model."""

    measures: RewardModelMeasures = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class PolicyEvalResult(EvalResult):
    """Evaluation of a model that learned from rewards of its own answers."""

    measures: PolicyMeasures = field(metadata=INLINE)
    forgetting: ForgettingMeasures | None = None
    """Loss on general text; null: not measured."""


EVAL_RESULTS: tuple[type[EvalResult], ...] = (
    TextOrPairEvalResult, KTOEvalResult, ClassificationEvalResult, RewardEvalResult, PolicyEvalResult,
)  # fmt: skip
"""The results that `slimtune eval` prints."""


def read_eval_result(values: Mapping[str, Any], *, strict: bool = True) -> EvalResult:
    """Return the result that `eval-<name>.json` contains.

    Unless `strict`, optional parts that are missing or damaged are None, and unknown keys are ignored.

    Raises:
        ValueError: a value is missing or of another type; the message begins with its key.
    """
    cls: type[EvalResult] = TextOrPairEvalResult
    if "unpaired_preference" in values:
        cls = KTOEvalResult
    elif "reward_gain" in values:
        cls = PolicyEvalResult
    elif "baseline" in values:
        cls = ClassificationEvalResult if "macro_f1" in values else RewardEvalResult
    return from_json_dict(cls, values, strict=strict)
