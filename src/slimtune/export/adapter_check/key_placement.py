"""Find the place of each key of a foreign file in a base: as PEFT looks for it, and under which other name it is there.

expected   the keys and shapes that the config's adapter has on the base, on the meta device
renamed    a key that is expected under another name: a wrapper's component is too much, or the path before the
           layers differs, as between a text model and the vision wrapper that contains it
weights    the base's own weights, which PEFT writes and loads with some adapters
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ...core.adapters.adapter_files import rename_keys_of_older_transformers
from ...core.adapters.adapter_tensors import PREFIX, iterate_config_tensors
from ...core.adapters.peft_config import PeftConfig
from ...core.adapters.targets import match_targets
from .foreign_adapter import TensorHeader

Shape = tuple[int, ...]
Path = tuple[str, ...]
WRAPPERS = frozenset({
    "_orig_mod", "module", "inner", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
    "modules_to_save", "original_module",
})  # fmt: skip
"""Components that torch.compile, DDP, FSDP, DeepSpeed, layer streaming and PEFT's own modules put into a path."""
LORA_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?P<letter>lora_(?:embedding_)?[AB])(?P<adapter>\.(?!bias$)[^.]+)?(?P<end>\.weight)?"
)
_ADAPTER_NAME = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(\.weight)?$|\.(lora_embedding_[AB])\.([^.]+)$"
)
_OTHER_SPELLING = re.compile(r"\.(?:adapter\.)?(lora_down|lora_up|linear_in|linear_out)(?=\.weight$)")
"""Names of A and B in files of kohya's scripts and of NeMo."""
JOINED_PROJECTIONS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that some bases compute as one, rows one after the other."""
_MOST_SUBSTITUTIONS = 4


class LoraPairKeys(NamedTuple):
    """Keys of the two matrices of a module; None: the file lacks one."""

    a: str | None
    b: str | None


@dataclass
class KeyPlacement:
    """Where the keys of a file belong in a base."""

    expected: dict[str, Shape]  # by key, what the config's adapter has on the base
    whole_modules: tuple[str, ...]  # modules that the config trains in full
    placed: dict[str, str] = field(default_factory=dict)  # key of the file → key that is expected
    weights: dict[str, Shape] = field(default_factory=dict)  # key of the file → shape of the base's own weight
    weight_names: dict[str, str] = field(default_factory=dict)  # key of the file → as PEFT writes it, if other
    renamed: dict[str, list[str]] = field(default_factory=dict)  # what is wrong with the name → keys of the file
    older: list[str] = field(default_factory=list)
    untargeted: list[str] = field(default_factory=list)  # the base has the module, but the config does not select it
    other_expert_layout: list[str] = field(default_factory=list)
    other_method: dict[str, str] = field(default_factory=dict)  # key of a selected module → the tensor's name in it
    other_projections: dict[str, str] = field(default_factory=dict)  # key of the file → "qkv_proj for q_proj, …"
    unknown: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[str, str]:
        """The key as PEFT writes it, by key of the file; the base's own weights are left out if theirs is right."""
        return self.placed | self.weight_names

    def count_placed_by_own_name(self) -> int:
        """Return how many keys are as PEFT looks for them."""
        return len(self.placed) + len(self.weights) - sum(map(len, self.renamed.values()))


def group_lora_pairs(keys: Mapping[str, Any]) -> dict[str, LoraPairKeys]:
    """Return the keys of A and B by module and, where a file has several, adapter."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        if parts := LORA_TENSOR.fullmatch(key):
            adapter = parts["adapter"] or ""
            found[parts["module"] + ("" if adapter == ".weight" else adapter)][parts["letter"][-1]] = key
    return {module: LoraPairKeys(pair.get("A"), pair.get("B")) for module, pair in found.items()}


def list_adapter_names_in_keys(keys: Mapping[str, Any]) -> list[str]:
    """Return the adapter names that keys contain, which PEFT takes out before it writes them."""
    return sorted({name for key in keys if (name := split_adapter_name(key)[1]) is not None})


def split_adapter_name(key: str) -> tuple[str, str | None]:
    """Return a key without the adapter's name, and the name; None: it contains none."""
    if (match := _ADAPTER_NAME.search(key)) is None:
        return key, None
    plain = f".{match[1]}{match[3] or ''}" if match[1] else f".{match[4]}"
    return key[: match.start()] + plain, match[2] or match[5]


def place_keys(tensors: Mapping[str, TensorHeader], model: nn.Module, config: PeftConfig) -> KeyPlacement:
    """Return where the keys of a file belong on a base, a model on the meta device without adapters.

    Raises:
        TargetError, UsageError: the config's method cannot adapt this base, or its targets match nothing.
    """
    report = match_targets(model, config, require_every_match=False)
    expected = {key: tuple(tensor.shape) for key, tensor in iterate_config_tensors(model, config)}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    parameters |= {name: tuple(b.shape) for name, b in model.named_buffers(remove_duplicate=False)}
    for module in report.trained_whole:
        names = (n for n in parameters if n.startswith(f"{module}."))
        expected |= {f"{PREFIX}{name}": parameters[name] for name in names}
    placement = KeyPlacement(expected, report.trained_whole)
    rest = []
    for key in tensors:
        own_weight = parameters.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if key in expected:
            placement.placed[key] = key
        elif own_weight is not None and key.startswith(PREFIX):
            placement.weights[key] = own_weight
            module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            if module in report.kinds:  # PEFT looks for it inside of the adapted layer
                placement.weight_names[key] = f"{PREFIX}{module}.base_layer.{leaf}"
                placement.renamed.setdefault("'base_layer.' is missing", []).append(key)
        else:
            rest.append(key)
    rest = _place_under_older_names(rest, model, placement)
    rest = _place_without_wrappers(rest, parameters, placement)
    rest = _place_by_substitution(rest, tensors, placement)
    _sort_unplaced(rest, model, placement)
    return placement


def place_no_keys(tensors: Mapping[str, TensorHeader], model: nn.Module) -> KeyPlacement:
    """Return the placement of a file whose config selects no module of the base: why each key has no place."""
    placement = KeyPlacement({}, ())
    _sort_unplaced(list(tensors), model, placement)
    return placement


def _place_under_older_names(keys: list[str], model: nn.Module, placement: KeyPlacement) -> list[str]:
    """Place keys whose modules transformers has renamed; return the others."""
    taken = set(placement.placed.values())
    renamed = {old: new for new, old in rename_keys_of_older_transformers({k: k for k in keys}, model).items()}
    found = {k: new for k, new in renamed.items() if new != k and new in placement.expected and new not in taken}
    placement.placed |= found
    placement.older += found
    return [key for key in keys if key not in found]


def _place_without_wrappers(keys: list[str], parameters: Mapping[str, Shape], placement: KeyPlacement) -> list[str]:
    """Place keys that have a wrapper's components or an adapter's name too much, or lack PEFT's prefix."""
    rest = []
    for key in keys:
        plain, faults = remove_wrappers(key)
        if plain in placement.expected:
            placement.placed[key] = plain
        elif (name := plain.removeprefix(PREFIX).replace(".base_layer.", ".")) in parameters:
            placement.weights[key], placement.weight_names[key] = parameters[name], plain
        else:
            rest.append(key)
            continue
        placement.renamed.setdefault(" and ".join(faults) or "another spelling", []).append(key)
    return rest


def remove_wrappers(key: str) -> tuple[str, list[str]]:
    """Return a key as PEFT writes it, and what was wrong with it."""
    faults = []
    if match := _OTHER_SPELLING.search(key):
        right = "lora_A" if match[1] in ("lora_down", "linear_in") else "lora_B"
        faults.append(f"{match[0][1:]!r} stands for {right!r}")
        key = f"{key[: match.start()]}.{right}{key[match.end() :]}"
    key, name = split_adapter_name(key)
    if name is not None:
        faults.append(f"the adapter's name {name!r} is in the key")
    if match := re.search(r"(?<=\.modules_to_save)\.(?!weight$|bias$)([^.]+)(?=\.)", key):
        faults.append(f"the adapter's name {match[1]!r} is in the key")
        key = key[: match.start()] + key[match.end() :]
    parts = key.split(".")
    if wrappers := dict.fromkeys(p for p in parts if p in WRAPPERS):
        faults.append(f"{' and '.join(map(repr, wrappers))} of a wrapper is in the path")
        key = ".".join(p for p in parts if p not in WRAPPERS)
    if not key.startswith(PREFIX):
        faults.append(f"{PREFIX!r} is not in front")
        key = PREFIX + key.removeprefix("base_model.")
    return key, faults


def _place_by_substitution(keys: list[str], tensors: Mapping[str, TensorHeader], placement: KeyPlacement) -> list[str]:
    """Place keys whose path begins otherwise than the base's: one beginning for as many keys as possible at a time."""
    by_ending: dict[Path, list[Path]] = defaultdict(list)
    for key in placement.expected:
        path = tuple(key.removeprefix(PREFIX).split("."))
        for start in range(len(path)):
            by_ending[path[start:]].append(path)
    taken = set(placement.placed.values())
    plain = {key: tuple(remove_wrappers(key)[0].removeprefix(PREFIX).split(".")) for key in keys}
    for _ in range(_MOST_SUBSTITUTIONS):
        votes: Counter[tuple[Path, Path]] = Counter()
        for key in keys:
            for old, new, place in _iterate_substitutions(plain[key], by_ending):
                same = placement.expected[PREFIX + ".".join(place)] == tensors[key].shape
                votes[old, new] += 1000 if same else 1
        if not votes:
            break
        old, new = max(votes, key=lambda pair: (votes[pair], bool({"language_model", "text_model"} & {*pair[1]})))
        if votes[old, new] < 1000:  # no shape fits: it is another base
            break
        rest = []
        wrong, right = (f"'{'.'.join(path)}.'" for path in (old, new))
        what = (
            f"{wrong} stands for {right}" if old and new else f"{wrong} is too much" if old else f"{right} is missing"
        )
        for key in keys:
            target = PREFIX + ".".join((*new, *plain[key][len(old) :]))
            if plain[key][: len(old)] == old and target in placement.expected and target not in taken:
                placement.placed[key] = target
                taken.add(target)
                placement.renamed.setdefault(what, []).append(key)
            else:
                rest.append(key)
        if len(rest) == len(keys):
            break
        keys = rest
    return keys


def _iterate_substitutions(path: Path, by_ending: Mapping[Path, list[Path]]) -> Iterator[tuple[Path, Path, Path]]:
    """Yield beginnings of a path and of the expected paths with the same longest ending, and these paths."""
    for start in range(len(path)):
        ending = path[start:]
        if not any(part.isdigit() for part in ending) and len(ending) < 3:
            return
        if ending in by_ending:
            for place in by_ending[ending]:
                new = place[: len(place) - len(ending)]
                if [p for p in path[:start] if p.isdigit()] == [p for p in new if p.isdigit()]:  # not another layer
                    yield path[:start], new, place
            return


def _sort_unplaced(keys: list[str], model: nn.Module, placement: KeyPlacement) -> None:
    """Say of each key without a place whether the base has its module, has its experts otherwise, or has neither."""
    modules = {name for name, module in model.named_modules() if module._parameters}
    selected = {name for key in placement.expected if (name := _find_module(key.removeprefix(PREFIX), modules))}
    stacked = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}
    for key in keys:
        path = remove_wrappers(key)[0].removeprefix(PREFIX)
        module = path.partition(".lora_")[0].removesuffix(".base_layer")
        if ".experts" in module and (re.search(r"\.experts\.\d+\.", module) is not None) == bool(stacked):
            placement.other_expert_layout.append(key)
        elif (found := _find_module(path, modules)) in selected:
            placement.other_method[key] = path.removeprefix(f"{found}.").removesuffix(".weight")
        elif found is not None:
            placement.untargeted.append(key)
        elif what := _describe_other_projections(path, modules):
            placement.other_projections[key] = what
        else:
            placement.unknown.append(key)


def _find_module(path: str, modules: set[str]) -> str | None:
    """Return the module that a key's tensor belongs to; None: the base does not have it."""
    parents = [path.rsplit(".", depth)[0].removesuffix(".base_layer") for depth in (1, 2)]
    return next((name for name in parents if name in modules), None)


def _describe_other_projections(path: str, modules: set[str]) -> str:
    """Return which projections the file has for which of the base's, if one has them joined and the other split."""
    parent, _, name = path.rsplit(".", 2)[0].rpartition(".")
    own = JOINED_PROJECTIONS.get(name) or tuple(one for one, parts in JOINED_PROJECTIONS.items() if name in parts)
    return f"{name} for {', '.join(own)}" if own and all(f"{parent}.{part}" in modules for part in own) else ""
