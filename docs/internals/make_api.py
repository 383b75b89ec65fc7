"""Write docs/api.md: every public name with its signature and docstring, in groups, and how to do a run from Python.

    python docs/internals/make_api.py

The text between the groups is here; which names exist, and in which module each one is, says `slimtune.__all__`.
"""

from pathlib import Path

import slimtune
from slimtune.compat.public_names import HOMES, map_method_names_to_modules
from slimtune.compat.tuner_models import TUNER_TYPES

PAGE = Path(__file__).parents[1] / "api.md"
ALL_HOMES = {**map_method_names_to_modules(), **HOMES}
HEAD = """# Python

Names, arguments and files are those of HF PEFT: `from slimtune import …` stands where a script says
`from peft import …`. Every name on this page is imported from `slimtune` itself. The settings of each method are on
[its page](methods/README.md), several adapters on one model have [a page of their own](adapters.md).

```python
from transformers import AutoModelForCausalLM
from slimtune import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=8, target_modules="all-linear"))
model.print_trainable_parameters()
...  # the Trainer, or your own loop
model.save_pretrained("adapter")  # adapter_model.safetensors, adapter_config.json
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "adapter")
merged = model.merge_and_unload()
```

## Plan, train, evaluate, export

What the commands do, as functions. Each returns a dataclass whose fields are the keys of the command's `--json`
([schemas](schemas.md)); an error is a `SlimtuneError` with `message`, `expected` and `hint`.

```python
from pathlib import Path

from slimtune.core.config import load_recipe
from slimtune.core.training.train import train
from slimtune.evaluation.evaluate import evaluate
from slimtune.export.exporter import export
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

recipe = load_recipe(None, {"model.name": "smollm2-135m", "data.train": "rows.jsonl", "output_dir": "runs/mine"})
plan = estimate_resources(build_plan_request(recipe, detect_gpu_or_cpu_spec()))  # no weight is loaded
print(plan.verdict, plan.reason)
result = train(recipe)  # runs/mine: adapter/, result.json, report.html
print(result.validation_loss, result.tokens_per_second)
judged = evaluate(Path("runs/mine"))  # base against tuned, on held-out rows
print(judged.verdict)
export(Path("runs/mine"), "gguf", Path("gguf"))  # written, then checked in llama.cpp
model = slimtune.load_run("runs/mine").model  # a PeftModel on its base
```

"""
GROUPS = {
    "Add an adapter": ["get_peft_model", "PeftConfig", "get_peft_config", "inject_adapter_in_model",
                       "prepare_model_for_kbit_training", "find_kappa_target_modules"],
    "The adapted model": ["PeftModel", "PeftMixedModel", "PeftModelFor*", "AutoPeftModel*",
                          "find_modules_without_gradient", "get_layer_status", "get_model_status", "load_run"],
    "Methods": ["*Config"],
    "Start from something better than noise": ["initialize_*", "get_eva_state_dict", "replace_lora_weights_loftq",
                                               "preprocess_*"],
    "Train": ["parameter_groups", "create_loraplus_optimizer", "cast_mixed_precision_params", "shift_tokens_right"],
    "Files and weights": ["*state_dict", "load_peft_weights", "convert_to_lora", "save_as_lora", "hotswap_adapter",
                          "prepare_model_for_compiled_hotswap"],
    "Names that code written for PEFT uses": ["*"],
}  # fmt: skip
"""Heading → names, with `*` for any letters; a name is under the first heading that has it."""
OPTIONS = {
    "PeftConfig": "    options:\n      members: [from_pretrained, save_pretrained]\n",
    "PeftModel": '    options:\n      inherited_members: true\n      filters: ["!^_"]\n',
}
ERRORS = """## Errors

`PeftError` and `NoMatchingPeftModuleError`, which code written for PEFT catches, are names of the first two classes.

"""


def matches(name: str, pattern: str) -> bool:
    """Return whether a name fits a pattern with at most one `*`."""
    before, star, after = pattern.partition("*")
    return name == pattern if not star else name.startswith(before) and name.endswith(after)


def group_names() -> dict[str, list[str]]:
    """Return the public names under the first heading that has them, in the order of the patterns."""
    left = [name for name in slimtune.__all__ if ALL_HOMES[name] != "errors"]
    groups = {}
    for heading, patterns in GROUPS.items():
        found = [name for pattern in patterns for name in left if matches(name, pattern)]
        groups[heading] = list(dict.fromkeys(found))
        left = [name for name in left if name not in groups[heading]]
    return groups


def make_page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for heading, names in group_names().items():
        parts.append(f"## {heading}\n\n")
        for name in names:
            if name in TUNER_TYPES:  # no statement in the source has its name
                parts.append(f"`{name}`: {TUNER_TYPES[name].__doc__}\n\n")
            elif callable(getattr(slimtune, name)):
                parts.append(f"::: slimtune.{ALL_HOMES[name]}.{name}\n{OPTIONS.get(name, '')}\n")
            else:
                doc = (Path(slimtune.__file__).parent / f"{ALL_HOMES[name].replace('.', '/')}.py").read_text()
                after = doc.partition(f"\n{name}")[2].partition('"""')[2].partition('"""')[0]
                parts.append(f"`{name}`: {' '.join(after.split()) or 'a table that PEFT has, too.'}\n\n")
    errors = ("SlimtuneError", "TargetError", "ConfigError", "AdapterError", "PeftWarning")
    return "".join(parts) + ERRORS + "\n".join(f"::: slimtune.errors.{name}\n" for name in errors)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
