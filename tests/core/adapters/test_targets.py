"""Which modules are adapted, name for name as PEFT chooses them; what matches nothing is an error."""

import dataclasses
import json
from functools import partial

import models_zoo as zoo
import peft
import pytest
import torch
import transformers as tf
from models_zoo import DECODER, VOCAB, gpt2, llama, run, shake, tokens
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny_families import build_family
from torch import nn

from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.core.adapters.architectures import DEFAULT_TARGETS
from slimtune.core.adapters.targets import match_targets
from slimtune.errors import ConfigError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

MAMBA = {"hidden_size": 16, "expand": 2, "num_hidden_layers": 2, "vocab_size": VOCAB}
JAMBA = {**DECODER, "num_experts": 1, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
FAMILIES = "llama qwen2 qwen3 mistral gemma2 gemma3_text phi gpt2 gpt_neox bloom opt falcon"
ARCHITECTURES = {name: partial(build_family, name) for name in FAMILIES.split()}
ARCHITECTURES |= {"t5": zoo.t5, "bart": zoo.bart, "bert": zoo.bert_encoder, "roberta": zoo.roberta_classifier}


def assert_equals_peft(make, **settings):
    ours = set(match_targets(make(), LoraConfig(**settings)).adapted)
    assert ours
    assert ours == set(peft.get_peft_model(make(), peft.LoraConfig(**settings)).base_model.targeted_module_names)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_targets_equal_peft(kind, targets):
    assert_equals_peft(ARCHITECTURES[kind], target_modules=targets)


def test_default_table_equals_peft():
    shared = set(DEFAULT_TARGETS) & set(PEFT_TARGETS)
    assert {k: sorted(DEFAULT_TARGETS[k]) for k in shared} == {k: sorted(PEFT_TARGETS[k]) for k in shared}
    assert len(shared) > 25


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": {"q_proj"}},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": r".*\.(up|down)_proj"},
        {"target_modules": "All-Linear"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    ],
    ids=str,
)
def test_selection_equals_peft(settings):
    assert_equals_peft(lambda: llama(layers=3), **settings)


def test_match_report(screen):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    report = model.match_report()
    assert report.trained_whole == ("lm_head",)
    assert "model.layers.0.self_attn.k_proj" in report.untargeted_layers
    screen("match-report", f"{report}\n")
    assert str(get_peft_model(gpt2(), LoraConfig(bias="all")).match_report()).count("biases") == 1


class Pair(nn.Module):
    """A layer that reads weights without calling their modules, and one that no method adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.LayerNorm(8)


Q = {"target_modules": ["q_proj"]}
FAULTS = [
    (llama, {"target_modules": ["q_porj"]}, ["target_modules: 'q_porj' matches no module", "'q_proj'?", "'up_proj'"]),
    (llama, {"target_modules": ["q_proj", "c_attn"]}, ["target_modules: 'c_attn' matches no module"]),
    (llama, {"target_modules": r".*\.nothing"}, ["target_modules='.*\\\\.nothing' matches no module"]),
    (llama, {"target_modules": []}, ["matches no module"]),
    (llama, {**Q, "exclude_modules": ["q_proj"]}, ["matches no module", "exclude_modules=", "leave"]),
    (llama, {**Q, "exclude_modules": ["k_porj"]}, ["exclude_modules: 'k_porj'", "'k_proj'"]),
    (llama, {**Q, "exclude_modules": "k_porj"}, ["exclude_modules: 'k_porj'"]),
    (llama, {**Q, "layers_to_transform": [0, 7]}, ["layers_to_transform: '7'", "layers 0 to 1"]),
    (llama, {"target_modules": ["lm_head"], "layers_to_transform": [0]}, ["no numbered layers"]),
    (llama, {**Q, "layers_to_transform": [0], "layers_pattern": "blocks"}, ["matches no", "layers_pattern='blocks'"]),
    (llama, {**Q, "rank_pattern": {"v_proj": 4}}, ["rank_pattern: 'v_proj'", "'q_proj'"]),
    (llama, {**Q, "alpha_pattern": {"q_porj": 4}}, ["alpha_pattern: 'q_porj'", "did you mean 'q_proj'"]),
    (llama, {**Q, "modules_to_save": ["lm_haed"]}, ["modules_to_save: 'lm_haed'", "did you mean 'lm_head'"]),
    (llama, {"target_modules": ["input_layernorm"]}, ["LlamaRMSNorm", "lora cannot adapt"]),
    (llama, {"target_modules": ["self_attn"]}, ["LlamaAttention", "name the linear modules inside it"]),
    (Pair, {"target_modules": ["norm"]}, ["LayerNorm", "lora cannot adapt"]),
    (Pair, {"target_modules": ["linear1"]}, ["TransformerEncoderLayer, which reads the weight without calling"]),
    (Pair, {}, ["there is no default for 'Pair'", 'target_modules="all-linear"']),
    (ARCHITECTURES["opt"], {"target_modules": ["embed_positions"]}, ["OPTLearnedPositionalEmbedding"]),
]


def name_parameter(value):
    return value.args[0] if isinstance(value, partial) else getattr(value, "__name__", str(value)[:60])


@pytest.mark.parametrize(("make", "settings", "message"), FAULTS, ids=name_parameter)
def test_no_match_raises(make, settings, message):
    model = make()
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(TargetError) as fault:
        get_peft_model(model, LoraConfig(**settings))
    assert all(part in str(fault.value) for part in message), str(fault.value)
    assert isinstance(fault.value, ValueError)  # PEFT's class for the same fault
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "left", [{"layers_to_transform": [7]}, {"layers_to_transform": [0], "layers_pattern": "blocks"}]
)
def test_adapter_file_whose_layers_the_base_lacks_names_the_setting(left, tmp_path):
    get_peft_model(llama(), LoraConfig(**Q, r=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **left}))
    with pytest.raises(TargetError) as fault:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert all(f"{name}={value!r}" in fault.value.message for name, value in left.items())


def test_rank_that_dwarfs_the_layers_is_refused_before_memory_is_taken():
    with pytest.raises(ConfigError, match="10,000,000") as fault:
        get_peft_model(llama(), LoraConfig(**Q, r=10**7))
    assert fault.value.field == "r"
    wider_than_the_layer = get_peft_model(llama(), LoraConfig(**Q, r=4096))
    assert wider_than_the_layer.peft_config["default"].r == 4096


def test_peft_fields_are_accepted_at_defaults():
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name != "runtime_config":
            LoraConfig(**{field.name: getattr(peft.LoraConfig(), field.name)})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Embedding(11, 8)
        self.model = tf.pytorch_utils.Conv1D(6, 8)
        self.end = nn.Linear(6, 3)

    def forward(self, x):
        return self.end(torch.relu(self.model(self.look(x))))


def test_plain_module():
    net, x = Net().double(), torch.tensor([[1, 5, 10]])
    before = net(x)
    model = get_peft_model(net, LoraConfig(target_modules=["look", "model", "end"], r=2, bias="all"))
    assert model is net
    assert isinstance(model, Net)
    assert torch.equal(model(x), before)
    shake(model)
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    assert (model.merge_and_unload()(x) - after).abs().max() < 1e-12


@pytest.mark.parametrize(("make", "targets"), [(zoo.bert_classifier, None), (zoo.roberta_classifier, "all-linear")])
def test_task_heads_train_in_full(make, targets):
    model = get_peft_model(make(), LoraConfig(task_type="SEQ_CLS", target_modules=targets))
    assert model.modules_to_save == {"classifier"}
    assert not any(n.startswith("classifier") for n in model.match_report().adapted)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_lookups_keep_working(kind):
    plain = ARCHITECTURES[kind]()
    model, names = ARCHITECTURES[kind](), {m: n for n, m in plain.named_modules()}
    inner = [n for n, m in model.named_modules() if isinstance(m, tf.PreTrainedModel)]
    get_peft_model(model, LoraConfig())
    assert model.base_model.model is model  # PEFT's idiom
    adapted_names = {m: n for n, m in model.named_modules()}
    for name in inner:
        for lookup in ("get_decoder", "get_encoder", "get_input_embeddings", "get_output_embeddings"):
            try:
                expected = getattr(plain.get_submodule(name), lookup)()
            except (AttributeError, NotImplementedError):
                continue
            found = getattr(model.get_submodule(name), lookup)()
            assert adapted_names.get(found) == names.get(expected)


def test_resize_token_embeddings():
    model = get_peft_model(llama(), LoraConfig())
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert run(model).shape[-1] == VOCAB + 8


@pytest.mark.parametrize(
    ("make", "uncalled"),
    [
        (lambda: tf.MambaForCausalLM(tf.MambaConfig(**MAMBA, state_size=4)), ["out_proj", "dt_proj", "x_proj"]),
        (
            lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**MAMBA, num_heads=4, head_dim=8, state_size=4, n_groups=1)),
            ["out_proj"],
        ),
        (lambda: tf.JambaForCausalLM(tf.JambaConfig(**JAMBA)), ["dt_proj"]),
    ],
)
def test_weights_that_a_mamba_mixer_reads_without_a_call(make, uncalled):
    for name in uncalled:
        with pytest.raises(TargetError, match=name):
            get_peft_model(make(), LoraConfig(target_modules=[name]))
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear"))
    model(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert set(uncalled) <= {n.rpartition(".")[2] for n in model.match_report().untargeted_layers}
