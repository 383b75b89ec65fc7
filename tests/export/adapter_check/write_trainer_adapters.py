"""Write the adapters in `trainers/` by the code of LLaMA-Factory and ms-swift, each in an environment that has it.

    pip install llamafactory; PYTHONPATH=tests python tests/export/adapter_check/write_trainer_adapters.py llamafactory
    pip install ms-swift modelscope-hub; … ms-swift

LLaMA-Factory 0.9.5 ran with TRL 0.24 and DISABLE_VERSION_CHECK=1 beside transformers 5.24, and without torchaudio, of
which there was no release (an empty module stood for it); ms-swift 4.6.0 with PEFT 0.21.2 and TRL 1.16.
They train on the tiny base of `make_trainer_base` for three steps. The tests read the files; nothing else is kept.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from faulty_adapters import make_base
from tiny_tokenizer import CHATML, make_tokenizer, template_text

FOLDER = Path(__file__).parent / "trainers"
KEPT = ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer_config.json")
LLAMA_FACTORY = {
    "plain": {"lora_target": "all"},
    "rslora": {"lora_target": "q_proj,v_proj", "use_rslora": True, "lora_alpha": 32},
    "dora": {"lora_target": "all", "use_dora": True},
    "pissa": {"lora_target": "all", "pissa_init": True, "pissa_iter": -1},
    "head": {"lora_target": "q_proj", "additional_target": "embed_tokens,lm_head"},
}
MS_SWIFT = {
    "plain": [],
    "rslora": ["--use_rslora", "true", "--lora_alpha", "32"],
    "dora": ["--use_dora", "true"],
    "pissa": ["--init_weights", "pissa"],
    "head": ["--target_modules", "q_proj", "--modules_to_save", "embed_tokens", "lm_head"],
}


def make_trainer_base(folder: Path) -> Path:
    """Save the base that they train on, with a tokenizer."""
    make_base("llama", vocab_size=448).save_pretrained(folder)
    make_tokenizer(template_text("qwen2_5"), CHATML).save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"Define word {i}."},
                          {"role": "assistant", "content": "A polite lie."}]} for i in range(16)]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {
        "rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return file


def train_with_llama_factory(base: Path, rows: Path, out: Path, settings: dict) -> Path:
    from llamafactory.train.tuner import run_exp

    run_exp({
        "model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
        "dataset": "rows", "dataset_dir": str(rows.parent), "template": "chatml", "cutoff_len": 128,
        "output_dir": str(out), "per_device_train_batch_size": 4, "learning_rate": 0.05, "max_steps": 3,
        "report_to": "none", "save_only_model": True, "use_cpu": True, "disable_gradient_checkpointing": True,
        **settings,
    })  # fmt: skip
    return out


def train_with_ms_swift(base: Path, rows: Path, out: Path, settings: list) -> Path:
    from swift import sft_main

    sft_main([
        "--model", str(base), "--model_type", "llama", "--template", "chatml", "--dataset", str(rows),
        "--tuner_type", "lora", "--lora_rank", "4", "--target_modules", "all-linear", "--torch_dtype", "float32",
        "--output_dir", str(out), "--add_version", "false", "--per_device_train_batch_size", "4",
        "--learning_rate", "0.05", "--max_steps", "3", "--save_steps", "3", "--eval_strategy", "no",
        "--report_to", "none", "--save_only_model", "true", "--use_cpu", "true", "--max_length", "128", *settings,
    ])  # fmt: skip
    return out / "checkpoint-3"


TRAINERS = {"llamafactory": (train_with_llama_factory, LLAMA_FACTORY), "ms-swift": (train_with_ms_swift, MS_SWIFT)}


if __name__ == "__main__":
    trainer = sys.argv[1]
    train, variants = TRAINERS[trainer]
    for name in sys.argv[2:] or variants:
        with tempfile.TemporaryDirectory() as temporary:
            base = make_trainer_base(Path(temporary, "base"))
            written = train(base, write_rows(Path(temporary)), Path(temporary, "out"), variants[name])
            kept = FOLDER / trainer / name
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            for file in KEPT:
                if (written / file).is_file():
                    shutil.copyfile(written / file, kept / file)
            values = json.loads((kept / "adapter_config.json").read_text())
            (kept / "adapter_config.json").write_text(
                json.dumps(values | {"base_model_name_or_path": "base"}, indent=1)
            )
            print(trainer, name, sorted(f.name for f in kept.iterdir()))
