"""A measurement of this machine, made by hand."""

import torch

from slimtune.planning.measured_speeds import (
    MachineMeasurement,
    MeasuredTrainingStep,
    ServingSpeedFit,
    TrainingSpeedFit,
)

NARROW = (0.9, 1.1)
FOUND = MachineMeasurement(
    name="this machine", processor="a CPU", threads=torch.get_num_threads(), date="2026-11-26",
    versions={"slimtune": "1", "torch": "2"}, memory=16 << 30, bf16=True, device="cpu",
    rates={"bfloat16": 4e11, "float16": 1e10, "float32": 1e11}, vector_rates={"bfloat16": 1e10}, bandwidth=2e10,
    training=TrainingSpeedFit(1.5, 0.5, 2.0, 1e-5, NARROW),
    serving={
        "llama.cpp": ServingSpeedFit(
            {"Q4_K_M": 1e10, "F16": 2e10}, 1e-10, {"Q4_K_M": 1e-4, "F16": 1e-4}, 1e-8, 0.0,
            {"Q4_K_M": 1e11, "F16": 5e10}, NARROW,
        )
    },
    steps=[MeasuredTrainingStep(512, 4, [128], 0.2, 0.21)], skipped={},
)  # fmt: skip
