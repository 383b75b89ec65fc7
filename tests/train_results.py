"""A result of training, as result.json has it."""

import dataclasses
from typing import Any

from slimtune.core.data.tokenize import TokenizationStats
from slimtune.core.training.train_result import ExportFormatsResult, ExportSupport, TokenizedRowsResult, TrainResult

TRAIN_ROWS = TokenizationStats(max_seq_len=1024, rows=779, kept=779, tokens=64700, supervised_tokens=36400, longest=251)
TRAIN_RESULT = TrainResult(
    run="runs/x", adapter="runs/x/adapter", steps=40, best_step=40, epochs=0.41, stopped_early=False, rows=779,
    held_out_rows=None, trained_tokens=26800, supervised_tokens=15100, skipped_steps=0, tokens_per_second=504.08,
    train_seconds=53.2, train_cpu_seconds=50.0, load_seconds=1.0, prepare_seconds=0.0, start_seconds=5.0,
    train_loss=3.95, validation_loss=3.91, forgetting=None, adapter_bytes=19593096, trainable_params=4884480,
    total_params=139399488, peak_bytes=2096062464, oom_events=1, dtype="bfloat16", quantization=None, base_weights={},
    device="cpu", finished="2026-11-25 15:04:07+00:00", untrained_experts={},
    target_summary="adapted 210 modules (q_proj × 30); left 2: 'model.embed_tokens', 'lm_head'",
    data_report=TokenizedRowsResult(TRAIN_ROWS, dataclasses.replace(TRAIN_ROWS, rows=92, kept=92)),
    export_formats=ExportFormatsResult("gguf", ExportSupport(merged=True, gguf=True, vllm=True, as_lora=True)),
    versions={"python": "3.11.9", "torch": "2.13.0"},
)  # fmt: skip


def make_train_result(**changes: Any) -> TrainResult:
    return dataclasses.replace(TRAIN_RESULT, **changes)
