"""Private names of other libraries that src uses, and what each one stands in for."""

import ast
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models_zoo import llama

import slimtune

IN_MODULES = {
    "transformers.masking_utils.is_tracing": "a setting: read masks, although fake tensors trace",
    "transformers.PreTrainedModel._supports_attention_backend": "whether attention is called by transformers' table",
    "transformers.PreTrainedModel._keep_in_fp32_modules": "layers that bitsandbytes leaves in fp32",
    "transformers.PreTrainedModel._keys_to_ignore_on_save": "tensors that are not in checkpoints",
    "transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN": "the families whose layers PEFT takes for experts",
    "transformers.core_model_loading.revert_weight_conversion": "the names of tensors in a checkpoint",
    "transformers.utils.chat_template_utils._compile_jinja_template": "the environment of chat templates",
    "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert": "layers that are not quantized",
    "transformers.quantizers.base.HfQuantizer.remove_quantization_config": "saving a dequantized model",
    "transformers.quantizers.quantizers_utils.should_convert_module": "whether a layer is quantized",
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": "Llama 3's rotary frequencies",
    "transformers.models.llama.modeling_llama.eager_attention_forward": "eager attention, which is in no table",
    "transformers.integrations.moe._can_use_grouped_mm": "products of experts on tensors without values",
    "transformers.trainer._is_peft_model": "registering a PeftModel when peft is not installed",
    "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse": "undoing the CPU layout of 4-bit weights",
}
OF_OBJECTS = {
    "_supports_default_dynamic_cache": "whether a model takes a cache that is made outside it",
    "_attn_implementation": "a getter for what `set_attn_implementation` sets",
    "_attn_implementation_internal": "another attention for one layer",
    "_experts_implementation": "how a model runs its experts",
    "_gradient_checkpointing_func": "offloading what activation checkpointing saves",
    "_hf_hook": "the device of a weight that accelerate offloads",
    "_old_forward": "a module's forward without accelerate's hook",
    "support_avx512bf16_for_cpu": "switching off the CPU layout of 4-bit weights",
}
OF_TORCH = (
    torch,
    torch._C,
    torch._C._autograd,
    torch.ops.aten,
    torch.nn.Module(),
    torch.zeros(1),
    torch.zeros(1).untyped_storage(),
    os,
)
OF_TORCH_OBJECTS = {"_linear_pointwise", "_overloadpacket", "_use_count", "_orig_mod", "_compiled_call_impl"}
OF_NAMED_TUPLES = {"_asdict", "_replace"}
OWN = {"_joined", "_virtual_tokens"}  # set on objects of other libraries
OWN |= {"_checkpoint_conversion_mapping"}  # of models written for transformers 4


@pytest.mark.parametrize("path", IN_MODULES)
def test_name_in_module(path):
    package, *names = path.split(".")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = import_module(package)
    for i, name in enumerate(names):
        is_module = name.islower() and i < len(names) - 1
        found = import_module(".".join([package, *names[: i + 1]])) if is_module else getattr(found, name)


def test_names_of_objects():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hooked = add_hook_to_module(torch.nn.Linear(2, 2), ModelHook())
    names = {*dir(type(model)), *dir(model.config), *vars(model.config), *vars(model.model.layers[0]), *vars(hooked)}
    if find_spec("bitsandbytes") is not None:
        names |= vars(import_module("bitsandbytes.nn").Linear4bit(64, 64)).keys()
        assert OF_OBJECTS.keys() <= names
    assert OF_OBJECTS.keys() - {"support_avx512bf16_for_cpu"} <= names


def test_every_private_name_is_listed():
    used, defined = set(), set().union(*map(dir, OF_TORCH), OF_TORCH_OBJECTS, OF_NAMED_TUPLES, OF_OBJECTS, OWN)
    defined |= {path.rpartition(".")[2] for path in IN_MODULES}
    for file in Path(slimtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                    defined.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case (
                    ast.Attribute(attr=name)
                    | ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_])
                ):
                    used.add(name)
    unknown = {name for name in used - defined if name.startswith("_") and not name.startswith("__")}
    assert unknown == set()
