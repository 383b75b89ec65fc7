"""Find the place of each key of a foreign file in a base: as PEFT looks for it, and under which other name it is there.

expected   the keys and shapes that the config's adapter has on the base, on the meta device
renamed    a key that is expected under another name: a wrapper's component is too much, or the path before the
           layers differs, as between a text model and the vision wrapper that contains it
weights    the base's own weights, which PEFT writes and loads with some adapters
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
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
_LORA_MATRIX = re.compile(r"(?P<module>.+?)\.lora_(?:embedding_)?(?P<letter>[AB])(?:\.weight)?")
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:(?:embedding_)?[AB]|magnitude_vector))\.(?!weight$|bias$)([^.]+)((?:\.weight|\.bias)?)$"
)
_OTHER_SPELLING = re.compile(r"\.(?:adapter\.)?(lora_down|lora_up|linear_in|linear_out|lora_a|lora_b)(?=(\.weight)?$)")
"""Names of A and B in files of kohya's scripts, NeMo, torchtune and mlx-lm."""
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
    by_finding: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """By the code of a finding, keys of the file, and what they have: "lora_C", "qkv_proj for q_proj, …" or ""."""

    @property
    def names(self) -> dict[str, str]:
        """The key as PEFT writes it, by key of the file; the base's own weights are left out if theirs is right."""
        return self.placed | self.weight_names

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape that the base has for a tensor, by key of the file."""
        return {key: self.expected[place] for key, place in self.placed.items()} | self.weights

    def count_placed_by_own_name(self) -> int:
        """Return how many keys are as PEFT looks for them."""
        return len(self.shapes) - sum(map(len, self.renamed.values()))


def group_lora_pairs(keys: Mapping[str, Any]) -> dict[str, LoraPairKeys]:
    """Return the keys of A and B by module and, where a file has several, adapter."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        plain, adapter = split_adapter_name(key)
        if parts := _LORA_MATRIX.fullmatch(plain):
            found[parts["module"] + (f".{adapter}" if adapter else "")][parts["letter"]] = key
    return {module: LoraPairKeys(pair.get("A"), pair.get("B")) for module, pair in found.items()}


def list_adapter_names_in_keys(keys: Mapping[str, Any]) -> list[str]:
    """Return the adapter names that keys contain, which PEFT takes out before it writes them."""
    return sorted({name for key in keys if (name := split_adapter_name(key)[1]) is not None})


def split_adapter_name(key: str) -> tuple[str, str | None]:
    """Return a key without the adapter's name, and the name; None: it contains none."""
    if (match := _ADAPTER_NAME.search(key)) is None:
        return key, None
    return key[: match.start()] + match[1] + match[3], match[2]


def place_keys(tensors: Mapping[str, TensorHeader], model: nn.Module, config: PeftConfig) -> KeyPlacement:
    """Return where the keys of a file belong on a base, a model on the meta device without adapters.

    Raises:
        TargetError, UsageError: the config's method cannot adapt this base, or its targets match nothing.
    """
    report = match_targets(model, config, require_every_match=False)
    expected = {key: tuple(tensor.shape) for key, tensor in iterate_config_tensors(model, config)}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    parameters |= {name: tuple(b.shape) for name, b in model.named_buffers(remove_duplicate=False)}
    whole = tuple(f"{module}." for module in report.trained_whole)
    expected |= {PREFIX + name: shape for name, shape in parameters.items() if name.startswith(whole)}
    placement = KeyPlacement(expected, report.trained_whole)
    rest = [key for key in tensors if not _place_by_name(key, parameters, report.kinds, placement)]
    rest = _place_under_older_names(rest, model, placement)
    rest = _place_by_substitution(rest, tensors, placement)
    _sort_unplaced(rest, model, placement)
    return placement


def _place_by_name(
    key: str, parameters: Mapping[str, Shape], adapted: Collection[str], placement: KeyPlacement
) -> bool:
    """Place a key as it is, or without a wrapper's components and an adapter's name; return whether it has a place."""
    for name, faults in ((key, []), remove_wrappers(key)):
        weight = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        module, _, leaf = weight.rpartition(".")
        if name in placement.expected:
            placement.placed[key] = name
        elif weight in parameters and name.startswith(PREFIX):
            placement.weights[key] = parameters[weight]
            if module in adapted and ".base_layer." not in name:  # PEFT looks for it inside of the adapted layer
                name, faults = f"{PREFIX}{module}.base_layer.{leaf}", [*faults, "'base_layer.' is missing"]
        else:
            continue
        if name != key:
            placement.renamed.setdefault(" and ".join(faults), []).append(key)
            if key in placement.weights:
                placement.weight_names[key] = name
        return True
    return False


def place_no_keys(tensors: Mapping[str, TensorHeader], model: nn.Module) -> KeyPlacement:
    """Return the placement of a file whose config selects no module of the base: why each key has no place."""
    placement = KeyPlacement({}, ())
    _sort_unplaced(list(tensors), model, placement)
    return placement


def _place_under_older_names(keys: list[str], model: nn.Module, placement: KeyPlacement) -> list[str]:
    """Place keys whose modules transformers has renamed; return the others."""
    free = placement.expected.keys() - placement.placed.values()
    renamed = rename_keys_of_older_transformers({k: k for k in keys}, model)
    found = {old: new for new, old in renamed.items() if new != old and new in free}
    placement.placed |= found
    placement.by_finding["older-names"] = dict.fromkeys(found, "")
    return [key for key in keys if key not in found]


def remove_wrappers(key: str) -> tuple[str, list[str]]:
    """Return a key as PEFT writes it, and what was wrong with it."""
    faults = []
    if match := _OTHER_SPELLING.search(key):
        right = "lora_A" if match[1] in ("lora_down", "linear_in", "lora_a") else "lora_B"
        faults.append(f"{match[0][1:]!r} stands for {right!r}")
        key = f"{key[: match.start()]}.{right}.weight"
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
    free = placement.expected.keys() - placement.placed.values()
    plain = {key: tuple(remove_wrappers(key)[0].removeprefix(PREFIX).split(".")) for key in keys}
    for _ in range(_MOST_SUBSTITUTIONS):
        votes = Counter(
            (old, new)
            for key in keys
            for old, new, place in _iterate_substitutions(plain[key], by_ending)
            if placement.expected[PREFIX + ".".join(place)] == tensors[key].shape
        )
        if not votes:  # no shape fits: it is another base
            break
        old, new = max(votes, key=lambda pair: (votes[pair], bool({"language_model", "text_model"} & {*pair[1]})))
        targets = {k: PREFIX + ".".join((*new, *plain[k][len(old) :])) for k in keys if plain[k][: len(old)] == old}
        found = {key: target for key, target in targets.items() if target in free}
        if not found:
            break
        wrong, right = (f"'{'.'.join(path)}.'" for path in (old, new))
        what = (
            f"{wrong} stands for {right}" if old and new else f"{wrong} is too much" if old else f"{right} is missing"
        )
        placement.placed |= found
        placement.renamed.setdefault(what, []).extend(found)
        free -= {*found.values()}
        keys = [key for key in keys if key not in found]
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
        code, what = "unknown-modules", ""
        if ".experts" in module and (re.search(r"\.experts\.\d+\.", module) is not None) == bool(stacked):
            code = "expert-layout"
        elif (found := _find_module(path, modules)) in selected:
            code, what = "another-method", path.removeprefix(f"{found}.").removesuffix(".weight")
        elif found is not None:
            code = "untargeted"
        elif what := _describe_other_projections(path, modules):
            code = "projection-layout"
        placement.by_finding[code][key] = what


def _find_module(path: str, modules: set[str]) -> str | None:
    """Return the module that a key's tensor belongs to; None: the base does not have it."""
    parents = [path.rsplit(".", depth)[0].removesuffix(".base_layer") for depth in (1, 2)]
    return next((name for name in parents if name in modules), None)


def _describe_other_projections(path: str, modules: set[str]) -> str:
    """Return which projections the file has for which of the base's, if one has them joined and the other split."""
    parent, _, name = path.rsplit(".", 2)[0].rpartition(".")
    own = JOINED_PROJECTIONS.get(name) or tuple(one for one, parts in JOINED_PROJECTIONS.items() if name in parts)
    return f"{name} for {', '.join(own)}" if own and all(f"{parent}.{part}" in modules for part in own) else ""
