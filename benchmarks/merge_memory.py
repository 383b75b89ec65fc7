"""How much memory `slimtune merge` takes on a model that is large beside one of its files.

    python benchmarks/merge_memory.py            # 4.6 GB of bfloat16 in 10 files, made in a temporary folder
    python benchmarks/merge_memory.py --layers 4 # a small one, to try it

Makes a checkpoint shaped as a Llama (random weights; hidden 2048, 32 heads, MLP 8192, 32,000 tokens, untied) with a
run whose LoRA has rank 16 on all linear maps, then merges it in a process of its own. From outside, that process's
anonymous memory (RssAnon in /proc/PID/status: what is no view of a file) is read every 5 ms. The baseline is what it
has once slimtune, torch and transformers are imported. One shard is the largest weight file of the base.

Exit code 1 where the peak is over the baseline by more than 1.5 shards. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

MOST = 1.5
"""Shards over the baseline."""
PER_FILE = 500_000_000
SIZES = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
MORE = {"num_key_value_heads": 8, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}


def make_base(base: Path, layers: int, dtype: torch.dtype) -> torch.Generator:
    """Write the base file by file, and a tokenizer of bytes; return what drew the weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**SIZES, **MORE, num_hidden_layers=layers, dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in special])
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokens = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0], "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(base)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    split = split_torch_state_dict_into_shards(
        outline, filename_pattern="model{suffix}.safetensors", max_shard_size=PER_FILE
    )
    draws = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            shape = outline[name].shape
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draws) * 0.02
            tensors[name] = values.to(dtype)
        save_file(tensors, base / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return draws


def make(base: Path, path: Path, layers: int) -> None:
    """Write the base, file by file, its tokenizer, and a run folder with an adapter of random weights."""
    from transformers import AutoModelForCausalLM

    from slimtune import get_peft_model
    from slimtune.core.config import Recipe
    from slimtune.core.training.run_dir import RunDir

    draws = make_base(base, layers, torch.bfloat16)
    rows = path.with_suffix(".jsonl")
    asked, said = {"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It. " * 40}
    rows.write_text(json.dumps({"messages": [asked, said]}) + "\n")
    recipe = {
        "model": {"name": str(base), "dtype": "bfloat16", "device": "cpu"},
        "data": {"train": str(rows), "validation": str(rows)},
        "method": {"name": "lora", "rank": 16, "target_modules": "all-linear"},
        "output_dir": str(path),
    }
    run = RunDir.create(path, Recipe.from_dict(recipe))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = get_peft_model(model, run.load_recipe().method_config())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.005, generator=draws)
    adapted.save_pretrained(run.adapter)


def merge_it(run: Path, out: Path) -> None:
    """Import everything, say so, merge when told."""
    from slimtune.export import merge as merging
    from slimtune.export.merge import merge

    merging.SMALL_MODEL = 0  # a small one takes the way of a large one
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(merge(run, out)), flush=True)


def anonymous(pid: int) -> int:
    """Bytes of a process's anonymous memory; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(run: Path, out: Path) -> tuple[int, int, dict]:
    """Return baseline and peak in bytes, and what the merge returned."""
    command = [sys.executable, __file__, "--merge", str(run), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout.readline()
        if said.strip() != "ready":
            raise SystemExit(f"the merging process said {said!r}")
        baseline = anonymous(process.pid)
        seen = [baseline]

        def watch() -> None:
            while process.poll() is None:
                seen.append(anonymous(process.pid))
                time.sleep(0.005)

        watcher = Thread(target=watch)
        watcher.start()
        process.stdin.write("go\n")
        process.stdin.flush()
        result = process.stdout.readline()
        code = process.wait()
        watcher.join()
    if code:
        raise SystemExit(f"the merge failed with exit code {code}")
    return baseline, max(seen), json.loads(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder (15 GB)")
    parser.add_argument("--make", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(*given.make, given.layers)
        return 0
    if given.merge:
        merge_it(*given.merge)
        return 0
    with tempfile.TemporaryDirectory(prefix="slimtune-merge-", dir=given.folder) as folder:
        base, run, out = (Path(folder, name) for name in ("base", "run", "merged"))
        command = [sys.executable, __file__, "--layers", str(given.layers), "--make", str(base), str(run)]
        subprocess.run(command, check=True)
        files = [f.stat().st_size for f in base.glob("*.safetensors")]
        print(
            f"base: {sum(files) / 1e9:.2f} GB in {len(files)} files, the largest {max(files) / 1e9:.3f} GB", flush=True
        )
        baseline, peak, found = measure(run, out)
        shards = (peak - baseline) / max(files)
        written = sorted(f.stat().st_size for f in out.glob("*.safetensors"))
        print(
            f"merged: {sum(written) / 1e9:.2f} GB, {len(written)} files of {found.comparison.dtype}, "
            f"{found.seconds:.0f} s; "
            f"mean difference {found.comparison.mean_difference:.2g} nats over {found.comparison.positions} positions "
            f"(effect {found.comparison.effect:.2g})"
        )
        print(
            f"anonymous memory: {baseline / 1e6:.0f} MB after imports, {peak / 1e6:.0f} MB at most: "
            f"{(peak - baseline) / 1e6:.0f} MB more, {shards:.2f} shards (at most {MOST})"
        )
    return int(shards > MOST)


if __name__ == "__main__":
    sys.exit(main())
