"""AutoPeftModel: base and adapter in one call."""

import json

import peft
import pytest
import torch
import transformers as tf
from models_zoo import ENCODER, bert_classifier, bert_encoder, bert_tagger, llama, run, shake, t5

import slimtune
from slimtune import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from slimtune.errors import AdapterError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def bert_reader():
    return tf.BertForQuestionAnswering(tf.BertConfig(**ENCODER)).double().eval()


def save_base_and_adapter(make, folder, **settings):
    """Save a base and an adapter for it; return the base's class and the tensors of the adapter."""
    base = make()
    base.save_pretrained(folder / "base")
    model = get_peft_model(type(base).from_pretrained(folder / "base", dtype=torch.float64), LoraConfig(**settings))
    shake(model)
    model.save_pretrained(folder / "adapter")
    return type(base), slimtune.get_peft_model_state_dict(model)


BASES = {
    "CAUSAL_LM": (llama, "CausalLM"),
    "SEQ_2_SEQ_LM": (t5, "Seq2SeqLM"),
    "SEQ_CLS": (bert_classifier, "SequenceClassification"),
    "TOKEN_CLS": (bert_tagger, "TokenClassification"),
    "FEATURE_EXTRACTION": (bert_encoder, "FeatureExtraction"),
    "QUESTION_ANS": (bert_reader, "QuestionAnswering"),
}


@pytest.mark.parametrize("task", BASES)
@pytest.mark.parametrize("by_task", [True, False], ids=["task", "class"])
def test_base_class_comes_from_the_adapter(task, by_task, tmp_path):
    make, name = BASES[task]
    base_class, tensors = save_base_and_adapter(
        make, tmp_path, **({"task_type": task} if by_task else {"target_modules": "all-linear"})
    )
    for auto in (AutoPeftModel, getattr(slimtune, f"AutoPeftModelFor{name}")):
        loaded = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert isinstance(loaded, base_class)
        assert isinstance(loaded, PeftModel)
        found = slimtune.get_peft_model_state_dict(loaded)
        assert all(torch.equal(found[k], t) for k, t in tensors.items())
    auto = getattr(peft, f"AutoPeftModelFor{name}" if by_task else "AutoPeftModel")
    theirs = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert isinstance(theirs.get_base_model(), base_class)
    if task != "QUESTION_ANS":
        assert (run(loaded) - run(theirs.eval())).abs().max() < 1e-9


@pytest.mark.parametrize(("task", "other"), [("CAUSAL_LM", "Seq2SeqLM"), ("SEQ_CLS", "CausalLM")])
def test_class_for_another_task_is_refused(task, other, tmp_path):
    save_base_and_adapter(BASES[task][0], tmp_path, task_type=task)
    with pytest.raises(UsageError, match=task) as e:
        getattr(slimtune, f"AutoPeftModelFor{other}").from_pretrained(tmp_path / "adapter")
    assert f"AutoPeftModelFor{BASES[task][1]}" in str(e.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_mapping": None}, "gives neither a task nor a class of transformers"),
        ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "not in the import allowlist"),
        *(({"auto_mapping": {"base_model_class": name, "parent_library": "transformers"}}, "neither a task nor a class")
          for name in ("pipeline", "Trainer", "AutoTokenizer")),
        ({"base_model_name_or_path": "smollm2-135m"}, r"names the base 'smollm2-135m'.*\n.*slimtune.load_run\("),
        ({"base_model_name_or_path": None}, "does not name its base"),
    ],
    ids=str,
)  # fmt: skip
def test_adapter_without_a_base(values, message, tmp_path):
    save_base_and_adapter(llama, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(AdapterError, match=message):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
