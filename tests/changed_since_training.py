"""What can change between a training and the use of its adapter, who uses it, and what slimtune then does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

FORMS = ("run", "adapter folder", "copied run")
USES = ("resume", "generate", "chat", "eval", "merge", "export", "verify", "serve", "init-adapter")


class Change(NamedTuple):
    """A change of the files that a run was trained on; `part` is the fingerprint's part that it belongs to."""

    name: str
    part: str
    make: Callable[[Path], None]  # gets the folder with base/, train.jsonl and the run


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        file = home / "base" / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})

    return change


def _add_to_one_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][31, 17] += 0.5


def _clear_middles(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor.view(-1)[len(tensor.view(-1)) // 4 : -len(tensor.view(-1)) // 4] = 0


def _replace_three_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][100:103] = 0.3


def _edit_json(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        file = home / "base" / name
        values = json.loads(file.read_text())
        edit(values)
        file.write_text(json.dumps(values))

    return change


def _swap_ids(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["x"] = vocabulary["x"], vocabulary["a"]


def _cut_texts(tokenizer: Any) -> None:
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def _add_token(tokenizer: Any) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": 300, "content": "say", **flags})


def _make_end_of_turn_plain(home: Path) -> None:
    def edit(tokenizer: Any) -> None:
        for token in tokenizer["added_tokens"]:
            if token["content"] == "<|endoftext|>":
                token["special"] = False

    _edit_json("tokenizer.json", edit)(home)


def _change_template(home: Path) -> None:
    file = home / "base" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", " <|im_end|>"))


def _edit_rows(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        file = home / "train.jsonl"
        file.write_text("\n".join(edit(file.read_text().splitlines())) + "\n")

    return change


def _edit_recipe(home: Path) -> None:
    for file in home.glob("*/recipe.yaml"):
        file.write_text(file.read_text().replace("epochs: 2", "epochs: 9"))


CHANGES = (
    Change("one value of a weight", "weights", _edit_weights(_add_to_one_value)),
    Change("the middle of every matrix", "weights", _edit_weights(_clear_middles)),
    Change("embeddings of three tokens", "weights", _edit_weights(_replace_three_embeddings)),
    Change("rms_norm_eps in the config", "config", _edit_json("config.json", lambda c: c.update(rms_norm_eps=0.1))),
    Change("ids of two tokens swapped", "tokenizer", _edit_json("tokenizer.json", _swap_ids)),
    Change("truncation in the tokenizer", "tokenizer", _edit_json("tokenizer.json", _cut_texts)),
    Change(
        "a normalizer in the tokenizer",
        "tokenizer",
        _edit_json("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
    ),
    Change("a token added", "tokenizer", _edit_json("tokenizer.json", _add_token)),
    Change("a special token made plain", "tokenizer", _make_end_of_turn_plain),
    Change("the chat template", "template", _change_template),
    Change("a word in a training row", "rows", _edit_rows(lambda r: [r[0].replace("say", "tell"), *r[1:]])),
    Change("the order of the rows", "rows", _edit_rows(lambda r: r[::-1])),
    Change("a row added", "rows", _edit_rows(lambda r: [*r, r[0].replace("say", "shout")])),
    Change("a row removed", "rows", _edit_rows(lambda r: r[1:])),
    Change("a setting in the run's recipe.yaml", "recipe", _edit_recipe),
)


def expect(part: str, use: str, form: str) -> str:
    """Return what slimtune does: "refused", "told", or "harmless": nothing is said, and the results are the same."""
    if use == "resume":
        return "refused"
    if use == "init-adapter":
        return {"weights": "refused", "config": "refused", "tokenizer": "told", "template": "told"}.get(
            part, "harmless"
        )
    if part == "template" and form == "adapter folder":
        return "harmless"  # it has the template that it was trained with, and uses that one
    if part == "rows":
        return "refused" if use == "eval" and form != "adapter folder" else "harmless"
    return "harmless" if part == "recipe" else "refused"


class FolderBackup:
    """The files of a folder as they are now, to put them back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files = folder, {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def restore(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_file() and path not in self._files:
                path.unlink()
            elif path.is_dir() and not any(path in p.parents for p in self._files):
                shutil.rmtree(path, ignore_errors=True)
        for path, content in self._files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
