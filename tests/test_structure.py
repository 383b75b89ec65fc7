"""Rules for the source tree that no linter checks."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import slimtune
from slimtune.core.foundation.registry import Registry
from slimtune.parts import PARTS

SOURCE = Path(slimtune.__file__).parent
TREES = {file: ast.parse(file.read_text()) for file in sorted(SOURCE.rglob("*.py"))}
OPTIONAL_PACKAGES = {
    "bitsandbytes", "gguf", "jsonschema", "llama_cpp_py_sync", "llguidance", "lm_eval", "matplotlib", "mlx", "mlx_lm",
    "optuna", "peft", "ray", "reasoning_gym", "sacrebleu", "scipy", "sentencepiece", "starlette", "submitit",
    "tensorboard", "uvicorn", "xllamacpp", "vllm",
}  # fmt: skip
MOST_FUNCTION_LINES, MOST_INTERNAL_IMPORTS, MOST_DOUBLE_NAMES = 80, 20, 4
MOST_PROSE_ASSERTS = 40  # of about 4,000; screens hold the wording
MOST_CORE_LINES = 15_000
MOST_UNTYPED_RESULTS = 29
OPEN_DICTIONARIES = {
    "Batch",
    "Example",
    "Fields",
    "JsonObject",
    "LoadOptions",
    "Message",
    "ModelInputs",
    "RecipeTree",
    "Record",
}
"""Names for a dictionary of anything: what it contains is decided by others. A result has a dataclass instead."""
MOST_SETTINGS_LINES = 1_300
SETTINGS_FILES = ("core/config/*.py", "core/adapters/config_fields.py", "cli/options.py", "cli/input_checks.py",
                  "ui/form_fields.py")  # fmt: skip
"""What declares, reads, checks and shows settings; which methods and objectives there are is not counted."""
SLOW_PACKAGES = {"datasets", "huggingface_hub", "numpy", "pyarrow", "regex", "torch", "transformers"}


def folder_of(file: Path) -> str:
    """Return "cli", or "core/data" for a file of the core."""
    parts = file.relative_to(SOURCE).parts
    return "/".join(parts[:2]) if parts[0] == "core" else parts[0]


def imported_modules(node: ast.AST, file: Path) -> list[str]:
    """Absolute names of what an import statement imports; ours begin with "slimtune."."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    package = ["slimtune", *file.relative_to(SOURCE).parts[:-1]]
    base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
    return [f"{base}.{alias.name}" for alias in node.names]


def private_definitions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def test_import_loads_no_heavy_package():
    heavy = ["torch", "transformers", "peft", "datasets", "accelerate"]
    check = f"import sys, slimtune, slimtune.cli; dir(slimtune); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names_exist_and_are_sorted():
    assert slimtune.__all__ == sorted(set(slimtune.__all__))
    assert [n for n in slimtune.__all__ if not getattr(slimtune, n).__doc__] == []
    assert set(slimtune.__all__) <= set(dir(slimtune))
    with pytest.raises(AttributeError, match="'LoraConfi'"):
        slimtune.LoraConfi  # noqa: B018


def count_core_lines() -> int:
    return sum(len(file.read_text().splitlines()) for file in TREES if folder_of(file).startswith("core"))


def imports_of_parts() -> list[str]:
    """Imports by which the core reaches a part around it."""
    found = []
    for file, tree in TREES.items():
        if folder_of(file).partition("/")[0] == "core":
            for node in ast.walk(tree):
                modules = imported_modules(node, file)
                found += [f"{file.relative_to(SOURCE)}: {m}" for m in modules if m.partition(".")[0] == "slimtune"
                          and m.split(".")[1] not in ("core", "errors")]  # fmt: skip
    return found


def test_core_is_small():
    assert count_core_lines() <= MOST_CORE_LINES, (
        "move what only one part needs to that part (docs/internals/README.md)"
    )


def test_settings_are_declared_read_and_checked_in_few_lines():
    files = [
        file for pattern in SETTINGS_FILES for file in SOURCE.glob(pattern) if file.name != "objective_registry.py"
    ]
    assert sum(len(file.read_text().splitlines()) for file in files) <= MOST_SETTINGS_LINES


def test_core_imports_no_part():
    assert imports_of_parts() == []


def test_functions_of_the_core_are_short():
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree) if folder_of(file).startswith("core") else ():
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
                found.append(f"{file.relative_to(SOURCE)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert found == []


def test_modules_of_the_core_import_few_others():
    found = {}
    for file, tree in TREES.items():
        modules = {m.rpartition(".")[0] for node in ast.walk(tree) for m in imported_modules(node, file)}
        ours = {m for m in modules if m.startswith("slimtune.")}
        if folder_of(file).startswith("core") and len(ours) > MOST_INTERNAL_IMPORTS:
            found[str(file.relative_to(SOURCE))] = len(ours)
    assert found == {}


def test_few_functions_return_an_untyped_dictionary():
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            returns = node.returns if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
            if returns is not None and "dict[str, Any]" in ast.unparse(returns).split(" | "):
                found.append(f"{file.relative_to(SOURCE)}: {node.name}")
    assert len(found) <= MOST_UNTYPED_RESULTS, "\n".join(found)


def test_names_of_untyped_dictionaries_are_known():
    found = set()
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in ("dict[str, Any]", "Mapping[str, Any]"):
                found.add(ast.unparse(node.targets[0]))
    assert found == OPEN_DICTIONARIES


def test_file_names_are_told_from_each_other():
    names = Counter(file.name for file in TREES if file.name not in ("__init__.py", "__main__.py"))
    double = [name for name, count in names.items() if count > 1]
    assert len(double) <= MOST_DOUBLE_NAMES, double


def test_folders_at_the_top_are_few():
    assert len({folder_of(file).partition("/")[0] for file in TREES if len(file.relative_to(SOURCE).parts) > 1}) <= 15


def test_every_registered_part_exists():
    for group, paths in PARTS.items():
        registry: Registry = Registry(group, group)
        assert all(registry.load(name) is not None for name in paths), group


def test_nothing_is_cut_out_of_a_message():
    """A field, a label or a code is given where an error is raised or a setting is declared."""
    cuts = {"partition", "rpartition", "split", "removeprefix", "removesuffix", "replace", "startswith", "endswith"}
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            texts = ("message", "help", "expected", "hint", "description")
            if isinstance(node, ast.Attribute) and node.attr in cuts and getattr(node.value, "attr", "") in texts:
                found.append(f"{file.relative_to(SOURCE)}: {ast.unparse(node)}")
    shown = [
        "cli/plan_command.py",
        "experiments/run_grid.py",
        "experiments/comparison.py",  # one line of several
        "core/training/checkpoint.py",
        "core/training/resuming.py",
    ]  # without the folder that the line names
    assert [f for f in found if f.partition(":")[0] not in shown] == []


WORD_PAIR = re.compile(r"(?<![-\w./'])(?=([A-Za-z][a-z']+[,:;]? [a-z']{2,}(?![-\w./='])))")
PROGRAMS = {"pip", "slimtune", "vllm"}


def list_strings(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def find_word_pairs(text: str) -> set[str]:
    """Return the pairs of adjacent words, without those of a command line."""
    pairs = {re.sub("[,:;']", "", pair) for pair in WORD_PAIR.findall(text)}
    return {pair for pair in pairs if not PROGRAMS & set(pair.split())}


def collect_message_words() -> tuple[set[str], set[str]]:
    """Return the word pairs of the source's strings and templates, and the values of `Literal[...]`, which are data."""
    words = set().union(*(find_word_pairs(file.read_text()) for file in SOURCE.rglob("*.j2")))
    values = set()
    for tree in TREES.values():
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                words |= find_word_pairs(node.value)
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal":
                values |= set(list_strings(node))
    return words, values


def test_few_asserts_hold_wording():
    """Decisions are asserted as data (class, code, field, names, numbers), so that English can be improved freely."""
    words, values = collect_message_words()

    def holds_wording(node: ast.AST) -> bool:
        return any(find_word_pairs(s.replace("\\", "")) & words for s in list_strings(node) if s not in values)

    found = []
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())) if file.parent.name != "peft_suite" else ():
            if isinstance(node, ast.Assert):
                compared = [n for n in ast.walk(node.test) if isinstance(n, ast.Compare)]
            else:
                compared = [node.value] if isinstance(node, ast.keyword) and node.arg == "match" else []
            if any(map(holds_wording, compared)):
                found.append(f"{file.name}:{compared[0].lineno} {ast.unparse(node)}")
    assert len(found) <= MOST_PROSE_ASSERTS, "\n".join(found)


def test_no_pickle():
    pickles = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            found += [f"{file}: {m}" for m in imported_modules(node, file) if m.partition(".")[0] in pickles]
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
                found.append(f"{file}:{node.lineno}")
    assert found == []


def test_imports_stand_at_the_top():
    """Functions import optional packages only; the command line may also import what loads torch."""
    found = []
    for file, tree in TREES.items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or folder_of(file) == "cli":
                continue
            for node in ast.walk(function):
                for module in imported_modules(node, file):
                    package = module.partition(".")[0]
                    if package not in OPTIONAL_PACKAGES | SLOW_PACKAGES | {"slimtune"}:
                        found.append(f"{file}:{node.lineno} {module}")
    assert found == []


def test_names_of_test_files_are_unique():
    """They are imported by their name alone."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("*.py") if file.parent.name != "peft_suite")
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__.py", "conftest.py")] == []


def test_no_private_name_of_another_folder():
    defined = defaultdict(set)
    for file, tree in TREES.items():
        defined[folder_of(file)] |= {n for n in private_definitions(tree) if n.startswith("_") and n[:2] != "__"}
    found = []
    for file, tree in TREES.items():
        elsewhere = set().union(*(names for folder, names in defined.items() if folder != folder_of(file)))
        foreign = {n for n in elsewhere - defined[folder_of(file)] if not hasattr(torch.Tensor, n)}
        for node in ast.walk(tree):
            owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
            own = owner in ("self", "cls") or owner.startswith("torch.")  # operators of torch may have the same names
            if isinstance(node, ast.Attribute) and node.attr in foreign and not own:
                found.append(f"{file}:{node.lineno} {ast.unparse(node)}")
            for module in imported_modules(node, file):
                name = module.rpartition(".")[2]
                if module.startswith("slimtune.") and name in foreign:
                    found.append(f"{file}:{node.lineno} {module}")
    assert found == []


def test_json_of_files_has_no_nan():
    """Rows are rendered as the model reads them, and hashes and requests are no files."""
    others = {"core/data", "extras", "fingerprint.py", "inference_engines.py"}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                safe = any(k.arg == "allow_nan" for k in node.keywords) or others & {folder_of(file), file.name}
                assert safe, f"{file}:{node.lineno}: use core.foundation.files.to_json, or allow_nan=False"
