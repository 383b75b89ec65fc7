"""Recipe × machine → model, rows and the step. Training, evaluation and (later) the plan all stand on these functions.

    loss = sum over supervised positions of -log p(token) / number of supervised tokens in the whole step

Logits are made at supervised positions only, by the model's own head (its soft-caps and scales stay right).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapt.model import PeftModel, get_peft_model
from .contract.config import PeftConfig
from .data.collate import Collator, supervised_loss
from .data.read import read_rows
from .data.rows import RowReport, encode_rows
from .errors import AdapterError, ModelError, UsageError
from .models.load import Base, load_base
from .recipe import Recipe
from .runs import ADAPTER_FILE, RunFolder

Example = dict[str, Any]


@dataclass
class Rows:
    """The encoded rows of a run, and what became of the rows read."""

    train: list[Example]
    validation: list[Example]
    train_report: RowReport
    validation_report: RowReport | None


@dataclass
class Loaded:
    """A trained adapter on its base.

    Args:
        model: the adapted model, in evaluation mode.
        base: the base it stands on, with tokenizer, dtype and device.
        adapter: the adapter's folder.
        recipe: the run's recipe; None where an adapter folder alone was given.
    """

    model: PeftModel
    base: Base
    adapter: Path
    recipe: Recipe | None


def base_of(recipe: Recipe) -> Base:
    """Load the recipe's base and tokenizer."""
    m = recipe.model
    return load_base(
        m.name,
        dtype=m.dtype,
        device=m.device,
        trust_remote_code=m.trust_remote_code,
        revision=m.revision,
        chat_template=recipe.data.chat_template,
    )


def continuing(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe with the method's settings of the adapter it continues from: those are what trains.

    Raises:
        UsageError: the adapter is of another method than the recipe's.
    """
    folder = adapter_folder(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.name != recipe.method.name:
        raise UsageError(
            f"{folder} is a {config.name} adapter, the recipe's method is {recipe.method.name}",
            f"an adapter of the method {recipe.method.name}",
            f"--method {config.name}",
        )
    shared = {f.name for f in dataclasses.fields(PeftConfig)} | {"peft_type"}
    settings = {k: v for k, v in config.to_dict().items() if k not in shared and v is not None}
    return recipe.model_copy(update={"method": type(recipe.method)(name=config.name, **settings)})


def adapted(base: Base, recipe: Recipe, continue_from: Path | None = None) -> PeftModel:
    """Attach the recipe's method to the base, or go on from an adapter folder; seeds the adapter's random start.

    Raises:
        UsageError: targets match nothing; the adapter to continue from is of another method.
        AdapterError: the adapter to continue from does not fit this base.
    """
    torch.manual_seed(recipe.train.seed)
    if continue_from is not None:
        folder = adapter_folder(continue_from)
        model = PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    else:
        config: Any = recipe.method_config()
        if getattr(config, "tokenizer_name_or_path", None) == recipe.model.name:
            config.tokenizer_name_or_path = base.tokenizer.name_or_path  # an alias is no place a tokenizer lies in
        model = get_peft_model(base.model, config)
    model.peft_config["default"].base_model_name_or_path = recipe.model.name
    if recipe.train.gradient_checkpointing:
        # transformers 5.2x renamed it; the old name warns there, the new one is missing before.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    return model


def rows_of(recipe: Recipe, tokenizer: Any) -> Rows:
    """Read and encode the recipe's training and validation rows; validation is cut from training if none is given."""
    data = recipe.data
    train, train_report = _encode(data.train, tokenizer, recipe)
    if data.validation is not None:
        validation, validation_report = _encode(data.validation, tokenizer, recipe)
        return Rows(train, validation, train_report, validation_report)
    held = round(len(train) * data.validation_fraction)
    if not held or held == len(train):
        return Rows(train, [], train_report, None)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    kept = set(order[:held])
    return Rows([e for i, e in enumerate(train) if i not in kept], [train[i] for i in sorted(kept)], train_report, None)


def held_out(recipe: Recipe, tokenizer: Any, path: Path) -> tuple[list[Example], RowReport]:
    """Read and encode rows to evaluate on, with the run's length rule."""
    return _encode(path, tokenizer, recipe)


def _encode(path: Path, tokenizer: Any, recipe: Recipe) -> tuple[list[Example], RowReport]:
    data = recipe.data
    return encode_rows(read_rows(path), tokenizer, max_seq_len=data.max_seq_len, too_long=data.too_long, path=path)


def logits_where_supervised(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Run the model on a collated batch; return logits `(batch, columns, vocabulary)` at supervised columns only."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    # With a cache, transformers would let packed rows see each other, silently.
    return model(**inputs, logits_to_keep=batch["logits_to_keep"], use_cache=False).logits


def step_loss(model: Any, batch: dict[str, Tensor], num_items: Tensor | int | None = None) -> Tensor:
    """Return a batch's loss: summed over its targets, divided by `num_items` (default: its own targets)."""
    return supervised_loss(logits_where_supervised(model, batch), batch["picked"], batch["targets"], num_items)


@torch.no_grad()
def require_exact_packing(model: Any, collator: Collator) -> None:
    """Lay two short rows end to end and alone; raise ModelError where the architecture does not tell them apart.

    Some read no `position_ids` (OPT, BLOOM), some carry a state from row to row (Mamba): transformers does not say.
    """
    device, was_training = next(model.parameters()).device, model.training
    size = model.config.get_text_config().vocab_size
    rows = [{"input_ids": [(7 * i * i + 3 + 11 * r) % size for i in range(9 + r)]} for r in range(2)]
    examples = [{**r, "labels": r["input_ids"]} for r in rows]

    def logits(some: Sequence[Example]) -> Tensor:
        batch = {k: v.to(device) for k, v in collator(some).items()}
        return logits_where_supervised(model, batch)[0].float()

    model.eval()
    try:
        alone = torch.cat([logits([e]) for e in examples])
        apart = (logits(examples) - alone).abs().mean() / alone.std().clamp_min(1e-12)
        half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    finally:
        model.train(was_training)
    if apart > (0.05 if half else 1e-3):
        raise ModelError(
            f"rows laid end to end change each other in a {type(model).__name__} (by {100 * apart.item():.2g} % of the "
            "logits' spread)",
            "an architecture that tells rows apart by position_ids",
            "--set train.packing=false",
        )


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], collator: Collator, tokens: int = 1024) -> list[tuple[float, int]]:
    """Return for each row its summed -log p over supervised tokens (nats), and their number, in the order given.

    Args:
        model: the model; put into evaluation mode here and back after.
        examples: encoded rows.
        collator: the collator of training.
        tokens: most positions laid out at once.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found: dict[int, tuple[float, int]] = {}
    try:
        for part in by_length(examples, tokens):
            batch = {k: v.to(device) for k, v in collator([examples[i] for i in part]).items()}
            logits = logits_where_supervised(model, batch).flatten(0, 1).index_select(0, batch["picked"])
            nats = torch.nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="none")
            counts = [targets_in(examples[i]) for i in part]
            for i, row in zip(part, nats.double().split(counts), strict=True):
                found[i] = (row.sum().item(), len(row))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(examples))]


def by_length(examples: Sequence[Example], tokens: int) -> Iterator[list[int]]:
    """Yield groups of row numbers, of like length, at most `tokens` positions a group (a longer row goes alone)."""
    part: list[int] = []
    held = 0
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"])):
        n = len(examples[i]["input_ids"])
        if part and held + n > tokens:
            yield part
            part, held = [], 0
        part.append(i)
        held += n
    if part:
        yield part


def targets_in(example: Example) -> int:
    """Return how many of a row's tokens are predicted and supervised: its first token never is."""
    return sum(1 for label in example["labels"][1:] if label != -100)


def mean_loss(scores: Iterable[tuple[float, int]]) -> float:
    """Return the mean -log p per supervised token over scored rows, in nats."""
    every = list(scores)
    return sum(s for s, _ in every) / max(1, sum(n for _, n in every))


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter folder a run folder, or an adapter folder itself, stands for."""
    path = Path(path)
    if (path / ADAPTER_FILE).is_file() or (path / "adapter_config.json").is_file():
        return path
    return RunFolder.open(path).adapter


def load_run(path: str | Path, *, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load a run's adapter, or a bare adapter folder, on its base.

    Args:
        path: a run folder or an adapter folder.
        dtype: dtype of the base's weights; None: as the run had it (a bare adapter: "auto").
        device: likewise.

    Raises:
        UsageError: there is neither a run nor an adapter.
        AdapterError: the adapter names no base, or does not fit it.
    """
    folder = adapter_folder(path)
    recipe = RunFolder.open(path).recipe() if folder != Path(path) else None
    config = PeftConfig.from_pretrained(folder)
    if recipe is not None:
        m = recipe.model.model_copy(update={k: v for k, v in (("dtype", dtype), ("device", device)) if v})
        base = base_of(recipe.model_copy(update={"model": m}))
    elif config.base_model_name_or_path:
        template = folder / "chat_template.jinja"
        base = load_base(
            config.base_model_name_or_path,
            dtype=dtype or "auto",
            device=device or "auto",
            chat_template=template if template.is_file() else None,
        )
    else:
        raise AdapterError(f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json")
    model = PeftModel.from_pretrained(base.model, folder, config=config)
    return Loaded(model, base, folder, recipe)
