"""Unknown config fields, other bases, run folders, AutoPeftModel, adapters beside a merged one."""

import json

import peft
import pytest
import torch
import transformers as tf
from models_zoo import ENCODER, bert_classifier, bert_encoder, llama, run, shake
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from slimtune.errors import AdapterError, ConfigError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def made(base, folder, **settings):
    model = get_peft_model(base, LoraConfig(**settings))
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_empty_unknown_field_is_ignored(value, tmp_path):
    model = made(llama(), tmp_path)
    edit_config(tmp_path, lora_magic=value, peft_version="9.9.9", runtime_config={"ephemeral_gpu_offload": True})
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(run(again), run(model))
    assert not hasattr(again.peft_config["default"], "lora_magic")


@pytest.mark.parametrize("value", [True, 3, 0.5, "on", ["x"], {"a": 1}], ids=repr)
def test_unknown_field_with_a_value_is_rejected(value, tmp_path):
    made(llama(), tmp_path)
    edit_config(tmp_path, lora_magic=value)
    with pytest.raises(AdapterError, match="LoraConfig has no field 'lora_magic'") as e:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert CONFIG in str(e.value)
    assert f"(given {value!r})" in str(e.value)
    assert "train this adapter with the library that has it" in str(e.value)


@pytest.mark.parametrize("name", ["megatron_core", "qalora_group_size"])
def test_unsupported_peft_field_is_accepted_at_its_default(name):
    default = LoraConfig.unsupported_peft_fields[name]
    assert PeftConfig.from_dict({"peft_type": "LORA", name: default}) == LoraConfig()
    with pytest.raises(ConfigError, match=f"LoraConfig has no field '{name}'"):
        PeftConfig.from_dict({"peft_type": "LORA", name: "another"})
    with pytest.raises(ConfigError, match=f"LoraConfig has no field '{name}'"):
        LoraConfig(**{name: "another"})


def test_peft_config_file_is_read(tmp_path):
    peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.target_modules, config.task_type) == (3, ["q_proj"], "CAUSAL_LM")


def test_another_base_is_rejected_by_its_fingerprint(tmp_path):
    made(llama(), tmp_path)
    said = r"was trained on another base: its config has fingerprint [0-9a-f]{16}, this one has [0-9a-f]{16}"
    for other in (llama(tie=True), llama(intermediate_size=64), llama(hidden_act="gelu")):
        with pytest.raises(AdapterError, match=said):
            PeftModel.from_pretrained(other, tmp_path)
    # peft's files tell nothing of the base's config: names and shapes alone speak.
    edit_tensors(tmp_path, lambda t: None)
    assert PeftModel.from_pretrained(llama(hidden_act="gelu"), tmp_path)


def test_a_run_folder_loads_its_adapter(tmp_path):
    model = made(llama(), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text("")
    again = PeftModel.from_pretrained(llama(), tmp_path / "run")
    assert torch.equal(run(again), run(model))
    again.load_adapter(tmp_path / "run", "second")
    assert PeftConfig.from_pretrained(tmp_path / "run") == PeftConfig.from_pretrained(tmp_path / "run" / "adapter")
    made(llama(), tmp_path / "run", r=2)
    assert PeftModel.from_pretrained(llama(), tmp_path / "run").peft_config["default"].r == 2
    (tmp_path / "empty" / "adapter").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"empty has no {WEIGHTS}; it has 'adapter'"):
        PeftModel.from_pretrained(llama(), tmp_path / "empty")


# --- one call for base and adapter -----------------------------------------------------------------------------------


def bert_reader():
    torch.manual_seed(0)
    return tf.BertForQuestionAnswering(tf.BertConfig(**ENCODER)).double().eval()


BASES = [
    (llama, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    (bert_classifier, "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    (bert_encoder, "FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
    (bert_reader, "QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
]


def from_disk(make, folder):
    base = make()
    base.save_pretrained(folder)
    return type(base).from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize(("make", "task", "name"), BASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("told", [True, False], ids=["task", "class"])
def test_auto_model_class_comes_from_the_adapter(make, task, name, told, tmp_path):
    base = from_disk(make, tmp_path / "base")
    made(base, tmp_path / "adapter", **({"task_type": task} if told else {"target_modules": "all-linear"}))
    for auto in (AutoPeftModel, getattr(slimtune, name)):
        again = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert isinstance(again, make().__class__)
        assert isinstance(again, PeftModel)
        mine = slimtune.get_peft_model_state_dict(again)
        theirs = load_file(tmp_path / "adapter" / WEIGHTS)
        assert all(torch.equal(mine[k], t) for k, t in theirs.items())
    if told:
        other = "AutoPeftModelForCausalLM" if task != "CAUSAL_LM" else "AutoPeftModelForSeq2SeqLM"
        with pytest.raises(UsageError, match=f"is an adapter for {task}") as e:
            getattr(slimtune, other).from_pretrained(tmp_path / "adapter")
        assert name.replace("ForFeatureExtraction", "") in str(e.value)
    else:
        theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert isinstance(theirs.get_base_model(), make().__class__)


def test_adapter_without_base_class_is_rejected(tmp_path):
    made(from_disk(llama, tmp_path / "base"), tmp_path / "adapter")
    for mapping in (None, {"base_model_class": "system", "parent_library": "os"}):
        edit_config(tmp_path / "adapter", auto_mapping=mapping)
        with pytest.raises(AdapterError, match="gives neither a task nor a class of transformers"):
            AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_short_base_name_points_to_load_run(tmp_path):
    made(from_disk(llama, tmp_path / "base"), tmp_path / "adapter", task_type="CAUSAL_LM")
    edit_config(tmp_path / "adapter", base_model_name_or_path="smollm2-135m")
    with pytest.raises(AdapterError, match="names the base 'smollm2-135m', which is not a local folder") as e:
        slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert "slimtune.load_run(" in str(e.value)


# --- while an adapter is merged --------------------------------------------------------------------------------------


def test_other_adapters_while_one_is_merged(tmp_path):
    model = made(llama(), tmp_path)
    expected, base = run(model), run(llama())
    model.merge_adapter()
    merged = run(model)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    model.load_adapter(tmp_path, "loaded")
    model.rename_adapter("other", "another")
    model.rename_adapter("default", "renamed")
    assert torch.equal(run(model), merged)
    for act in (lambda: model.delete_adapter("another"), lambda: model.set_adapter("another")):
        with pytest.raises(UsageError, match="'renamed' is merged into the base"):
            act()
    with pytest.raises(UsageError, match="'renamed' is merged into the base"):
        model.load_adapter(tmp_path, "renamed")
    assert torch.equal(run(model), merged)
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    model.set_adapter("loaded")
    assert torch.equal(run(model), expected)
    model.delete_adapter("renamed")
    assert list(model.peft_config) == ["another", "loaded"]
    assert torch.equal(run(model.unload()), base)
