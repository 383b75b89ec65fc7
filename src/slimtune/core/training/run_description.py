"""What a run says about itself before its first step, in its log and on stderr."""

import math

from ..attention.attention_functions import packing_unsupported_reason_or_empty
from ..config import Recipe
from ..foundation import distributed
from ..foundation.dtype_names import dtype_name
from ..foundation.formatting import format_count
from .datasets import RunDatasets
from .default_learning_rate import compute_default_learning_rate, describe_far_learning_rate
from .held_out_rows import MIN_EVAL_ROWS, count_rows_split_off_for_eval, find_test_or_validation_split
from .prepared_run import PreparedRun
from .progress_logger import ProgressLogger

FEW_STEPS = 30
"""A run of whole epochs with fewer optimizer steps gets a warning: by default one on fewer than 80 rows."""


def log_run_description(prepared: PreparedRun) -> None:
    """Say what is trained, on which rows, in how many processes, and how fast if the recipe has no learning rate."""
    logger, base, model, settings = prepared.logger, prepared.base, prepared.model, prepared.settings
    if prepared.init_adapter is not None:
        logger.say(f"continuing from {prepared.init_adapter}, with its settings of the method")
    trained, total = model.get_nb_trainable_parameters()
    quantization = f"{base.quantization}, computing in " if base.quantization else ""
    logger.say(f"base: {base.source.name}, {quantization}{dtype_name(base.dtype)} on {base.device}")
    share = f"{format_count(trained)} of {format_count(total)} parameters train ({100 * trained / total:.2f} %)"
    logger.say(f"{model.match_report()}; {share}")
    if not (method := prepared.recipe.method_config()).is_exported():
        no_engine = "serve no such adapter, merged or beside the base; slimtune and PEFT do: `slimtune methods`"
        logger.say(f"note: {method.name} has no export: Ollama, llama.cpp and vLLM {no_engine}")
    _describe_rows(logger, prepared.recipe, prepared.data)
    processes = distributed.world_size()
    if processes > 1:
        logger.say(f"{processes} processes, {distributed.local_world_size()} on this machine, share each step's rows")
    if settings.fsdp:
        sharded = "each process keeps its part of the base and gathers one layer at a time"
        logger.say(f"train.fsdp: {sharded if processes > 1 else 'there is one process, which keeps the whole base'}")
    rate, rows = float(settings.learning_rate), len(prepared.data.train)
    default_rate = compute_default_learning_rate(prepared.recipe, rows, base.hidden_size)
    if rate == default_rate:
        steps = f"{settings.count_steps(rows)} steps over {rows} rows on this base"
        default = f"the default of {prepared.recipe.method.name} for {steps}"
        logger.say(f"learning rate: {rate:g}, {default}; --lr sets another")
    elif far := describe_far_learning_rate(rate, default_rate):
        logger.say(f"warning: {far}")


def _describe_rows(logger: ProgressLogger, recipe: Recipe, data: RunDatasets) -> None:
    logger.say(f"rows: {data.train_stats.text()}")
    for split, rows in (("validation", data.validation), ("test", data.test)):
        if getattr(recipe.data, split) is None and getattr(recipe.data, f"{split}_fraction") > 0:
            logger.say(f"{len(rows.documents)} of them set aside for {split}")
    if (documents := data.train.documents) is not data.train:
        logger.say(
            f"{len(documents):,} documents to train on, cut into {len(data.train):,} windows of at most "
            f"{recipe.data.max_seq_len} tokens, elsewhere in each epoch"
        )
    if (warning := _warn_of_few_held_out_rows(recipe, data)) is not None:
        logger.say(f"warning: {warning}")
    for name, report in data.data_reports.items():
        if report is not None:
            verdict, *lines = report.summarize()
            for line in (f"{name} data: {verdict}", *lines):
                logger.say(line)


def _warn_of_few_held_out_rows(recipe: Recipe, data: RunDatasets) -> str | None:
    """Return why `slimtune eval` will not be able to say whether the run is better, and the flag that helps."""
    count, split = count_rows_split_off_for_eval(recipe, data), find_test_or_validation_split(recipe.data)
    if count is None or count >= MIN_EVAL_ROWS:
        return None
    rows = sum(len(part.documents) for part in (data.train, data.validation, data.test))
    share = math.ceil(100 * MIN_EVAL_ROWS / rows) / 100
    way = f"--{split}-fraction {share:g} sets {round(share * rows)} aside" if share <= 0.5 else "write more rows"
    few = "1 held-out row is" if count == 1 else f"{count} held-out rows are"
    least = f"slimtune eval needs {MIN_EVAL_ROWS} to say whether the tuned model is better"
    return f"{few} too few: {least}; {way}, or give others to it later: slimtune eval RUN --data held_out.jsonl"


def log_row_packing_and_warn_of_few_steps(prepared: PreparedRun) -> None:
    """Say how the rows of a step are put together, and warn if the steps are few."""
    settings, say = prepared.settings, prepared.logger.say
    steps = settings.count_steps(len(prepared.data.train))
    if settings.max_steps is None and steps < FEW_STEPS:
        epochs = math.ceil(FEW_STEPS / prepared.steps_per_epoch)
        more = f"more rows, or --epochs {epochs} for {epochs * prepared.steps_per_epoch}"
        say(f"warning: {steps} steps are few, and may change little: {more}")
    if settings.packing is None and (reason := packing_unsupported_reason_or_empty(prepared.model)):
        say(f"rows are not packed: {reason}")
    collator, report = prepared.collator, prepared.data.data_reports["train"]
    limit = f"at most {collator.max_tokens} tokens in a micro-batch"
    if not collator.with_packed_layout:
        say(f"rows are {'packed' if collator.packing else 'padded'}, {limit}")
        return
    saved = report.saved_share if report is not None and collator.share_prefix else 0.0
    shared = f", shared prefixes are computed once ({100 * saved:.1f} % fewer tokens)" if saved else ""
    say(f"rows are packed{shared}; {limit}")
