"""The training runs of test_trainer.py; as a script, without peft: `trainer_runs.py FOLDER` prints what they found."""

import importlib.util
import json
import sys
from pathlib import Path


def block_peft() -> None:
    """Make this process one where peft is not installed."""

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "peft":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == "peft" else real(name, *a)


if __name__ == "__main__":  # before anything asks for peft
    block_peft()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from models_zoo import llama, same_base, snapshot, tokens  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments  # noqa: E402

from slimtune import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from slimtune import get_peft_model_state_dict as state_of  # noqa: E402

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def trainer_of(model, out, **settings):
    rows = [{"input_ids": r, "labels": r} for r in tokens(16, 9)]
    held = [{"input_ids": r, "labels": r} for r in tokens(4, 9, seed=8)]
    settings = {"save_steps": 2, "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | settings
    return Trainer(model, TrainingArguments(str(out), **QUIET, **settings), train_dataset=rows, eval_dataset=held)


def plain_trainer(out):
    """Save, resume, and the best model, under transformers' own Trainer."""
    make = lambda: get_peft_model(llama(dtype=torch.float32), LoraConfig(r=4, lora_dropout=0.1))  # noqa: E731
    torch.manual_seed(0)
    whole = make()
    base = {n: p for n, p in snapshot(whole).items() if ".default." not in n}
    trainer_of(whole, out / "run").train()
    expected = state_of(whole)
    torch.manual_seed(7)  # another start: all must come from the checkpoint
    resumed = make()
    trainer_of(resumed, out / "run").train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
    found = state_of(resumed)

    class GrowingWorse(Trainer):
        def evaluate(self, *a, **k):
            metrics = super().evaluate(*a, **k)
            metrics["eval_loss"] = float(self.state.global_step)
            return metrics

    torch.manual_seed(0)
    best = make()
    trainer = trainer_of(best, out / "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    trainer.__class__ = GrowingWorse
    trainer.train()
    first = load_file(out / "best" / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(out / "best" / "checkpoint-6" / "adapter_model.safetensors")
    now = state_of(best)
    return {
        "files": files(out / "run" / "checkpoint-4"),
        "moved": not all(torch.equal(t, torch.zeros_like(t)) for k, t in expected.items() if "lora_B" in k),
        "resumed": all(torch.equal(expected[k], found[k]) for k in expected),
        "base kept": same_base(whole, base),
        "best checkpoint": Path(trainer.state.best_model_checkpoint).name,
        "best loaded": all(torch.equal(now[k], first[k]) for k in now),
        "best is not the last": any(not torch.equal(now[k], last[k]) for k in now),
    }


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "alone in bad company a bore person who talks when you wish"
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words.split(" ")])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sft(out):
    """TRL's SFTTrainer with a model of ours."""
    from trl import SFTConfig, SFTTrainer

    model = get_peft_model(llama(dtype=torch.float32), LoraConfig(r=4))
    base = {n: p for n, p in snapshot(model).items() if ".default." not in n}
    args = SFTConfig(str(out), max_steps=2, save_steps=2, max_length=16, bf16=False, learning_rate=1e-2, **QUIET)
    data = Dataset.from_dict({"text": ["alone in bad company", "a person who talks when you wish"] * 4})
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return {
        "files": files(out / "checkpoint-2"),
        "ours": trainer.model is model and isinstance(model, PeftModel),
        "trained": all(torch.any(t) for k, t in state_of(model).items()),
        "base kept": same_base(model, base),
    }


def dpo(out):
    """TRL's DPOTrainer with a model of ours; the reference says what the base says."""
    from trl import DPOConfig, DPOTrainer

    llama(dtype=torch.float32).save_pretrained(out / "base")
    load = lambda: AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)  # noqa: E731
    model = get_peft_model(load(), LoraConfig(r=4))
    settings = {"max_steps": 3, "save_steps": 3, "max_length": 16, "learning_rate": 1e-1, "bf16": False, **QUIET}
    args = DPOConfig(str(out), per_device_train_batch_size=2, **settings)
    rows = {"prompt": ["a bore"] * 4, "chosen": [" talks when you wish"] * 4, "rejected": [" alone in bad"] * 4}
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer())
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    # Without peft TRL loads the base a second time; with it, the reference is the model itself with its adapter put by.
    reference = trainer.model if trainer.ref_model is None else trainer.ref_model
    chosen, rejected = trainer.compute_ref_log_probs(reference, batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def said_by(net):
        with torch.no_grad():
            logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        return (picked * (labels[:, 1:] >= 0)).sum(1)

    both, tuned = said_by(load()), said_by(model.eval())
    return {
        "files": files(out / "checkpoint-3"),
        "ours": isinstance(trainer.model, PeftModel),
        "reference is the base": (torch.cat([chosen, rejected]) - both).abs().max().item(),
        "tuned has moved": (tuned - both).abs().max().item(),
        "adapters": sorted(model.peft_config),
    }


def main() -> None:
    out = Path(sys.argv[1])
    found = {"plain": plain_trainer(out / "plain"), "sft": sft(out / "sft"), "dpo": dpo(out / "dpo")}
    found["peft imported"] = "peft" in sys.modules
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
