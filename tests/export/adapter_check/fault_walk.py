"""Walk a faulty adapter from its file to an engine and back: named, asked for, repaired, asked for again.

PEFT is the engine: it computes what it makes of the file, and answers over HTTP in vLLM's dialect.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import transformers as tf
from engine_dialects import serving

from slimtune.errors import SlimtuneError
from slimtune.export.adapter_repair.adapter_mends import RepairAnswers
from slimtune.export.adapter_repair.repair_adapter import repair_adapter
from slimtune.export.export_results import EngineVerdict
from slimtune.export.verify import ServedPlace, check_adapter

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class FaultWalk:
    """What was said of a faulty adapter on its way."""

    file: list[str]  # codes of the findings in the file
    peft: str  # what PEFT computes of the file, by its log-probabilities
    repaired: str  # what PEFT computes of the repaired file


def walk_fault(base: Path, folder: Path, out: Path) -> FaultWalk:
    """Check a faulty adapter, ask PEFT, repair it, and ask PEFT again."""
    file = [finding.code for finding in check_adapter(folder, str(base)).file.findings]
    return FaultWalk(file, ask_peft(base, folder), _repair(base, folder, out))


def _repair(base: Path, folder: Path, out: Path) -> str:
    try:
        repair_adapter(folder, "peft", out, str(base), RepairAnswers(adapter_name="a", alpha=8))
    except SlimtuneError:
        return "refused"
    return ask_peft(base, out)


def ask_peft(base: Path, adapter: Path) -> str:
    """Return the verdict on PEFT, which serves an adapter as it reads it."""
    auto = tf.AutoModelForCausalLM
    try:
        model = peft.PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
    except Exception as error:  # PEFT raises many kinds
        return f"PEFT raises {type(error).__name__}"
    return describe_verdict(ask_server(base, adapter, {"base": auto.from_pretrained(base).eval(), "tuned": model}))


def ask_server(base: Path, adapter: Path, models: dict[str, Any]) -> EngineVerdict:
    """Return the verdict on a server of these models."""
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    with serving(models, tokenizer, "vllm", parents={"tuned": "base"}, template=TEMPLATE) as url:
        place = ServedPlace(url, name="tuned", timeout=60, precision="f32")
        return check_adapter(adapter, str(base), place).checks[0]


def describe_verdict(verdict: EngineVerdict) -> str:
    """Return an engine's verdict in a few words."""
    if verdict.cause is None:
        return "loads it; not comparable as it is"
    more = f" {verdict.scale:.2g}" if verdict.scale is not None else ""
    return f"{verdict.cause}{more}" + (f" ({', '.join(verdict.missing)})" if verdict.missing else "")
