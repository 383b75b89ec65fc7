"""Write the table of common claims in docs/plan.md: `python docs/internals/make_claims.py`.

Its figures are those of the commands named here, without a network and for any machine.
"""

import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "plan.md"
BEGIN, END = "<!-- table: docs/internals/make_claims.py -->\n", "<!-- end of the table -->\n"
RUN_COMMAND = runpy.run_path(str(Path(__file__).parent / "make_blocks.py"))["run_command"]
JOB = "plan llama-3.1-8b --gpu rtx-3090 --batch-size 1 --max-seq-len 2048 --gradient-accumulation-steps 4 --json"
QV = "--set method.target_modules=[q_proj,v_proj]"


def plan(flags: str) -> dict[str, Any]:
    """Return what `plan --json` prints with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads("\n".join(RUN_COMMAND(f"{JOB} {flags}".split(), Path(folder))))


def gb(plan_result: dict[str, Any]) -> str:
    """Return what tensors take at most, as `17.8 GB`."""
    return f"{plan_result['allocated_bytes'] / 1e9:.1f} GB"


def make_table() -> str:
    """Return the claims, and our step beside PEFT's."""
    plain, checkpointed, nf4, full, rounded, adapter = (
        plan(flags)
        for flags in (
            "",
            "--gradient-checkpointing",
            "--quantization nf4 --gradient-checkpointing",
            "--method full --gradient-checkpointing",
            "--method full --gradient-checkpointing --optimizer adamw-8bit --set method.bf16_stochastic_round=true",
            QV,
        )
    )
    weights = plain["parts"]["weights"] / 1e9
    bf16 = 4 * weights  # gradients and two moments, each as large
    lines = [
        "| claim | is it true? |",
        "| --- | --- |",
        f'| "LoRA of an 8B in 16 GB" | In NF4: {gb(nf4)}. Not in bf16: the weights alone are {weights:.2f} GB |',
        f'| "LoRA of an 8B in 24 GB" | With checkpointing: {gb(checkpointed)} at 2048 tokens. Without: {gb(plain)}; '
        f"{plain['max_seq_len']} tokens fit |",
        f'| "full fine-tuning in 60 GB" | Weights, gradients and AdamW\'s moments all in bf16 take {bf16:.1f} GB. '
        f"slimtune trains copies of the weights, with checkpointing: {gb(rounded)} in bf16 with 8-bit moments, "
        f"{weights:.1f} GB of them the base; {gb(full)} in fp32 |",
        '| "a 34 MB adapter" | Of Llama 2 7B, r = 16 on q and v in fp32: 33,571,656 bytes. Of this 8B '
        f"{adapter['adapter_bytes']:,} |",
    ]
    return "\n".join([*lines, ""])


def make_page() -> str:
    """Return the page with its table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
