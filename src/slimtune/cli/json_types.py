"""What each command prints with `--json`: the result types, by command.

`docs/internals/make_schemas.py` writes the JSON Schemas in docs/schemas from this table; a test checks the output of
every command in it.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..core.foundation.json_results import JsonObject
from .json_schemas import make_json_schema

JSON_TYPES: dict[str, Sequence[str]] = {
    "choose": ("hardware.hardware_results:ChooseResult", "hardware.serving_choice:ServingChoiceResult"),
    "plan": ("hardware.hardware_results:PlanResult", "hardware.hardware_results:MethodPlansResult"),
    "cost": ("hardware.hardware_results:CostResult", "hardware.answer_cost:AnswerCostResult"),
    "gpus": (
        "hardware.hardware_results:GpusResult",
        "hardware.hardware_results:GpuComparisonResult",
        "hardware.hardware_results:GpuVerdictsResult",
    ),
    "bench": ("hardware.hardware_results:BenchResult", "export.run_speed:RunSpeedResult"),
    "benchmarks": ("planning.published_speeds:PublishedSpeedsResult",),
    "models": (
        "planning.known_bases:KnownBasesResult",
        "planning.known_base_fits:KnownBaseFits",
        "hardware.base_choice:BaseChoiceResult",
    ),
    "methods": ("cli.methods_command:MethodsResult",),
    "data": ("evaluation.data_report.data_report:DataReport",),
    "import": ("extras.config_import.import_config:ImportResult",),
    "train": ("core.training.train_result:TrainResult",),
    "tune": ("experiments.experiment_results:TuneResult",),
    "eval": (
        "evaluation.eval_result:TextOrPairEvalResult",
        "evaluation.eval_result:KTOEvalResult",
        "evaluation.eval_result:ClassificationEvalResult",
        "evaluation.eval_result:RewardEvalResult",
        "evaluation.eval_result:PolicyEvalResult",
    ),
    "compare": ("experiments.experiment_results:CompareResult",),
    "report": ("cli.eval_command:RunReportResult",),
    "generate": ("cli.generate_command:GenerateResult",),
    "chat": ("cli.generate_command:ChatResult",),
    "predict": (
        "evaluation.predict:TextPrediction",
        "evaluation.predict:TextPredictions",
        "evaluation.predict:FilePredictions",
    ),
    "export": ("export.export_results:ExportResult",),
    "verify": ("export.export_results:AdapterReport",),
    "check": ("export.export_results:AdapterReport",),
    "repair": ("export.adapter_repair.repair_result:RepairResult",),
    "merge": ("export.export_results:MergeResult",),
    "push": ("export.export_results:PushResult", "export.export_results:PushPreview"),
    "serve": ("cli.serve_command:ServeResult",),
    "ui": ("cli.ui_command:UiExitResult",),
    "doctor": ("diagnostics.doctor_report:DoctorReport",),
    "explain": (
        "cli.explain_command:ExplainResult",
        "cli.explain_command:NoPageResult",
        "cli.explain_command:ErrorPagesResult",
    ),
}
"""`module:class` of the results of each command; several if the output depends on the run or on the arguments."""


def load_json_types(command: str) -> list[Any]:
    """Return the result types of a command."""
    package = __package__.rpartition(".")[0]
    found = []
    for path in JSON_TYPES[command]:
        module, _, name = path.partition(":")
        found.append(getattr(import_module(f"{package}.{module}"), name))
    return found


def make_command_output_schema(command: str) -> JsonObject:
    """Return the JSON Schema of what a command prints with `--json`."""
    schemas = [make_json_schema(cls) for cls in load_json_types(command)]
    start = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    if len(schemas) == 1:
        return start | schemas[0]
    return start | {"title": f"slimtune {command} --json", "anyOf": schemas}
