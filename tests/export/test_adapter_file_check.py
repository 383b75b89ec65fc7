"""An adapter's file is compared with the trained one matrix by matrix: one wrong matrix of any module is named.

An engine's log-probabilities do not see half of one matrix of a base like SmolLM2 (`test_real_adapter_gguf.py`).
"""

import pytest
from models_zoo import shake
from tiny_ggufs import model_of

from slimtune import LoraConfig, get_peft_model
from slimtune.errors import AdapterError
from slimtune.export import gguf as ours
from slimtune.export.adapter_file_check import require_trained_adapter_in_gguf, require_trained_adapter_in_model

gguf = pytest.importorskip("gguf")
KINDS = ("llama", "gemma3_text", "gpt_oss", "gpt_neox", "gpt2")


def adapted(kind, **settings):
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model_of(kind, 64), LoraConfig(**lora | settings))
    shake(model)
    return model.eval()


def list_matrices(model):
    """Return the parameters of one layer's adapters, and of all modules outside of layers, by name."""
    return {n: p for n, p in model.named_parameters() if ".adapters." in n and ".1." not in n}


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_written_file_is_the_trained_adapter(kind, precision, tmp_path):
    patterns = {"rank_pattern": {"o_proj|c_attn|dense": 8}, "alpha_pattern": {"down_proj|c_fc|query_key_value": 5}}
    model = adapted(kind, use_rslora=True, **patterns)
    ours.write_adapter_gguf(tmp_path / "a.gguf", model, precision=precision)
    require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)


@pytest.mark.parametrize("change", ["half", "flipped", "one value", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_wrong_matrix_is_named(kind, change, tmp_path):
    model = adapted(kind)
    ours.write_adapter_gguf(tmp_path / "a.gguf", model)
    for name, weight in list_matrices(model).items():
        right = weight.detach().clone()
        if change == "one value":
            weight.data.view(-1)[3] *= 1.001
        else:
            weight.data = weight.data.roll(1, -2) if change == "rows" else weight * (0.5 if change == "half" else -1)
        with pytest.raises(AdapterError, match=name.split(".adapters.")[0].replace(".", r"\.")):
            require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)
        weight.data = right
    require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)


def change_file(source, target, alpha=None, leave_out=""):
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), "llama")
    value = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, value if alpha is None else alpha)
    for tensor in reader.tensors:
        name = tensor.name.replace("blk.0.", "blk.7.") if leave_out == "renamed" else tensor.name
        if not leave_out or not name.endswith(leave_out):
            writer.add_tensor(name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 8}, "B of model.layers.0.self_attn.q_proj is off by 0.5 of its norm"),
        ({"alpha": 0}, "is off by"),  # llama.cpp multiplies by 1 then, and not by 0
        ({"leave_out": "attn_k.weight.lora_a"}, "A of model.layers.0.self_attn.k_proj is missing"),
        ({"leave_out": "renamed"}, "is missing"),
    ],
)
def test_a_file_with_another_alpha_or_other_tensors_is_refused(change, words, tmp_path):
    model = adapted("llama")
    ours.write_adapter_gguf(tmp_path / "a.gguf", model)
    change_file(tmp_path / "a.gguf", tmp_path / "b.gguf", **change)
    with pytest.raises(AdapterError) as error:
        require_trained_adapter_in_gguf(tmp_path / "b.gguf", model)
    assert words in str(error.value)


def test_an_adapter_whose_values_are_zero_passes(tmp_path):
    model = get_peft_model(model_of("llama", 64), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours.write_adapter_gguf(tmp_path / "a.gguf", model, precision="f16")
    require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)


@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_each_wrong_matrix_of_a_folder_that_is_read_back_is_named(factor):
    model, read_back = adapted("llama"), adapted("llama")
    require_trained_adapter_in_model(read_back, model)
    for name, weight in list_matrices(read_back).items():
        weight.data.mul_(factor)
        with pytest.raises(AdapterError, match=name.split(".adapters.")[0].replace(".", r"\.")):
            require_trained_adapter_in_model(read_back, model)
        weight.data.div_(factor)
