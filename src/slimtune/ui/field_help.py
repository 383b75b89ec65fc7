"""What the fields of the forms are for, in plain words; the recipe's own help speaks to those who know the trade."""

import re

from ..core.adapters.config_fields import SettingSpec

FIELD_HELP = {
    "data.train_on": "Which answers of a conversation are learned: every one, or the last",
    "data.max_seq_len": "In tokens; a token is about three quarters of a word",
    "data.on_overlong": "What happens to a longer row",
    "method.name": "How the base is changed; lora suits most",
    "train.epochs": "How often each row is learned",
    "train.max_steps": "How often the model is changed, in place of epochs",
    "train.batch_size": "Rows that are learned at once",
    "train.learning_rate": "How large each change is: too small learns little, too large forgets; try automatic first",
    "data.validation_fraction": "Part of your rows that is not learned, but measured during training; 0.1 is a tenth",
    "data.test_fraction": "Part of your rows that is kept for the evaluation",
    "model.quantization": "Hold the base in fewer bits (nf4: 4, int8: 8), where memory is short",
}
"""What the field of each setting is for."""

OBJECTIVE_HELP = {
    "sft": "Answer as in the rows",
    "classification": "Sort texts into classes",
    "context": "Answer as with a long text in the prompt, without it",
    "distill": "Answer as a larger base does",
    "dpo": "Prefer the better of two answers",
    "grpo": "Find better answers to prompts by trying, where a program can score them",
    "kto": "Prefer answers with a thumb up to those with a thumb down",
    "orpo": "Answer as in the better of two answers, and prefer it",
    "reinforce": "As grpo, one answer to each prompt against the mean of the steps before",
    "reward": "Score answers, from pairs of a better and a worse one",
    "rloo": "As grpo, each answer against the mean of the others",
    "sdft": "Answer as in the rows, and forget less: learns from its own answers",
    "simpo": "Prefer the better of two answers, by its mean per token",
}
"""What each objective teaches, in plain words; of one that is not here its own summary is shown."""

AUTOMATIC = "automatic"
"""What a field shows whose default is "auto"; typed, it means the default."""
NULL_MEANS = {"train.max_steps": "as many as the epochs have", "model.quantization": "as the base is"}
"""What an empty field means where null is the default and the setting itself does not say it."""


def describe_field(setting: SettingSpec) -> str:
    """Return what the field of a setting is for, and its limits."""
    help = FIELD_HELP.get(setting.path, setting.help)
    return f"{help} ({setting.limits})." if setting.limits else f"{help}."


def hint_at_decimal_comma(text: str) -> str:
    """Return how a number with a decimal comma is written; empty: it is none."""
    return f", with a point: {text.strip().replace(',', '.')}" if re.fullmatch(r"\s*\d+,\d+\s*", text) else ""
