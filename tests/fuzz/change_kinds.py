"""What a run was trained on changes before it is resumed, or before its adapter is used: base, rows, recipe, files.

What comes of it must be refused, told (a warning), or the same bit for bit: the adapter of a resumed run that of a run
without a stop, the log-probabilities of a chat those from before.
"""

import atexit
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mutations import mutate_bytes, mutate_json, mutate_text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slimtune.errors import PeftWarning

sys.path.append(str(Path(__file__).parents[1]))

USES = ("resume", "resume", "run", "adapter folder", "copied run")
CHAT = [{"role": "user", "content": "say A lion, 12"}, {"role": "assistant", "content": "abc"}]


def build_workshop(home: Path) -> None:
    """Write a base, rows, a run that has ended, and one that was stopped after two steps."""
    import pytest
    from kinds import base_model, chatml_tokenizer
    from tiny_run import recipe_of, train_until, write_rows

    from slimtune.core.training.train import train

    chatml_tokenizer().save_pretrained(home / "base")
    base = base_model()
    base.resize_token_embeddings(len(chatml_tokenizer()))
    base.save_pretrained(home / "base")
    settings: dict[str, Any] = {
        "model": {"name": str(home / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(write_rows(home / "train.jsonl", 16)), "validation_fraction": 0.25},
        "method": {"name": "lora", "r": 2},
        "train": {"epochs": 1, "batch_size": 3, "learning_rate": 1e-2, "save_steps": 1},
        "output_dir": str(home / "whole"),
    }
    train(recipe_of(settings))
    with pytest.MonkeyPatch.context() as patch:
        train_until(recipe_of({**settings, "output_dir": str(home / "stopped")}), patch, 2)


@cache
def get_workshop() -> Path:
    """Return a folder with a workshop, `sound`, that another process built: autograd does not survive a fork."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-changes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([sys.executable, __file__, str(folder / "home")], check=True, capture_output=True)
    (folder / "home").rename(folder / "sound")
    return folder


def restore_workshop() -> Path:
    """Return the workshop as it was built, at the path that its files name."""
    home = get_workshop() / "home"
    shutil.rmtree(home, ignore_errors=True)
    return shutil.copytree(get_workshop() / "sound", home)


# --- changes ----------------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_weights(rng: random.Random, home: Path) -> None:
    file = home / "base/model.safetensors"
    tensors = load_file(file)
    values = tensors[rng.choice(sorted(tensors))].view(-1)
    place = rng.randrange(len(values))
    values[place : place + rng.choice([1, 1, 8, len(values)])] += rng.choice([1e-3, 0.5, -4.0])
    save_file(tensors, file, {"format": "pt"})


def change_weight_file(rng: random.Random, home: Path) -> None:
    file = home / "base/model.safetensors"
    file.write_bytes(mutate_bytes(rng, file.read_bytes(), 0, 3_000 if rng.random() < 0.5 else None))


def change_config(rng: random.Random, home: Path) -> None:
    file = home / "base/config.json"
    values = json.loads(file.read_text())
    name = rng.choice(["rms_norm_eps", "rope_theta", "hidden_act", "attention_bias", "tie_word_embeddings", "mlp_bias"])
    other = {"rms_norm_eps": 0.03, "rope_theta": 500.0, "hidden_act": "gelu"}.get(name, not values.get(name))
    file.write_text(json.dumps({**values, name: other} if rng.random() < 0.5 else mutate_json(rng, values)))


def change_tokenizer(rng: random.Random, home: Path) -> None:
    file = home / "base" / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    values = json.loads(file.read_text())
    if file.name == "tokenizer.json" and rng.random() < 0.5:
        vocabulary = values["model"]["vocab"]
        one, other = rng.sample(sorted(vocabulary), 2)
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    else:
        values = mutate_json(rng, values)
    file.write_text(json.dumps(values))


def change_template(rng: random.Random, home: Path) -> None:
    file = home / "base/chat_template.jinja"
    write(file, mutate_text(rng, file.read_text()))


def change_rows(rng: random.Random, home: Path) -> None:
    file = home / "train.jsonl"
    rows = file.read_text().splitlines()
    place = rng.randrange(len(rows))
    rows = rng.choice([
        [*rows[:place], *rows[place + 1 :]],
        [*rows, rows[place].replace("say", "tell")],
        [*rows[:place], rows[place].replace("abc", "abd"), *rows[place + 1 :]],
        [*rows[:place], mutate_text(rng, rows[place]), *rows[place + 1 :]],
        rng.sample(rows, len(rows)),
    ])  # fmt: skip
    write(file, "\n".join(rows) + "\n")


def change_recipe(rng: random.Random, home: Path) -> None:
    for file in home.glob("*/recipe.yaml"):
        text = file.read_text()
        lines = [i for i, line in enumerate(text.splitlines()) if line.rstrip()[-1:].isdigit()]
        at = rng.choice(lines)
        changed = [f"{line[:-1]}{rng.randrange(10)}" if i == at else line for i, line in enumerate(text.splitlines())]
        write(file, "\n".join(changed) + "\n" if rng.random() < 0.6 else mutate_text(rng, text))


def change_checkpoint(rng: random.Random, home: Path) -> None:
    folders = sorted((home / "stopped/checkpoints").iterdir())
    file = rng.choice(sorted(p for p in rng.choice(folders).iterdir() if p.is_file()))
    change = rng.randrange(4)
    if change == 0:
        file.unlink()
    elif change == 1 and len(folders) > 1 and (folders[0] / file.name).is_file():
        shutil.copy(folders[0] / file.name, folders[-1] / file.name)
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()) if file.stat().st_size else b"x")


def change_record(rng: random.Random, home: Path) -> None:
    for run in ("whole", "stopped"):
        for name in rng.sample(["fingerprint.json", "result.json", "report.html"], rng.choice([1, 2])):
            file = home / run / name
            change = rng.randrange(3)
            if not file.is_file() or change == 0:
                file.unlink(missing_ok=True)
            elif change == 1 or file.suffix == ".html":
                file.write_bytes(mutate_bytes(rng, file.read_bytes()))
            else:
                file.write_text(json.dumps(mutate_json(rng, json.loads(file.read_text()))))


CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (
    change_weights,
    change_weight_file,
    change_config,
    change_tokenizer,
    change_template,
    change_rows,
    change_recipe,
    change_checkpoint,
    change_record,
)


# --- uses -------------------------------------------------------------------------------------------------------------


class WarningCollector(logging.Handler):
    """Collects what is told of changes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.module == "training_fingerprint":
            self.texts.append(record.getMessage())


def use(how: str, home: Path) -> dict[str, torch.Tensor]:
    """Use a run as it is now; return the tensors that must be those from before."""
    from slimtune.core.config import load_recipe
    from slimtune.core.training.train import train
    from slimtune.core.training.trained_model import load_run

    if how == "resume":
        train(load_recipe(home / "stopped/recipe.yaml"), resume=True)
        return load_file(home / "stopped/adapter/adapter_model.safetensors")
    path = home / {"run": "whole", "adapter folder": "whole/adapter", "copied run": "copy"}[how]
    if how == "copied run":
        (home / "whole").rename(path)
    loaded = load_run(path)
    ids = loaded.base.tokenizer.apply_chat_template(CHAT, return_dict=False)
    with torch.no_grad():
        return {"ids": torch.tensor(ids), "logits": loaded.model(input_ids=torch.tensor([ids])).logits}


@cache
def get_expected(how: str) -> dict[str, torch.Tensor]:
    if how == "resume":
        return load_file(get_workshop() / "sound/whole/adapter/adapter_model.safetensors")
    return use(how, restore_workshop())


def make_changed_run(rng: random.Random, folder: Path, changes: int) -> Callable[[], str]:
    os.environ["SLIMTUNE_CACHE"] = str(get_workshop() / "cache")
    how = rng.choice(USES)
    expected = get_expected(how)
    home = restore_workshop()
    done = [rng.choice(CHANGES) for _ in range(changes)]
    for change in done:
        with suppress(ValueError, LookupError, AttributeError, TypeError, OSError, SafetensorError):
            change(rng, home)  # unless a change before has left nothing to change there

    def work() -> str:
        collector, log = WarningCollector(), logging.getLogger("slimtune")
        log.addHandler(collector)
        try:
            silence = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
            with silence[0], silence[1], warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = use(how, home)
        finally:
            log.removeHandler(collector)
        if found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected):
            return ""
        if changes and (collector.texts or [w for w in warned if w.category is PeftWarning]):
            return ""
        return f"{how} after {[change.__name__ for change in done]} has another result, and nothing is told"

    return work


CHANGE_KINDS = {"changes": make_changed_run}

if __name__ == "__main__":
    build_workshop(Path(sys.argv[1]))
