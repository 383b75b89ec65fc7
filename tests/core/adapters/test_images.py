"""Image classification as in PEFT's examples: a vision transformer, and a ResNet with its batch norms."""

import peft
import pytest
import torch
import transformers as tf
from adapter_checks import assert_loads, assert_merges
from safetensors.torch import load_file

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.export.merged_weights import LazyMergedStateDict

LABELS = {"num_labels": 3}


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, **LABELS, image_size=16, patch_size=8)).eval()


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, **LABELS)).eval()


def images(size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, size, size, generator=generator), torch.tensor([0, 1, 2, 0])


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=images()[0]).logits


@pytest.mark.slow
def test_vit_with_the_trainer(tmp_path):
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    model = get_peft_model(vit(), config)
    before = logits(model)
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 5e-3, "report_to": []}
    args = tf.TrainingArguments(str(tmp_path / "run"), remove_unused_columns=False, label_names=["labels"], **settings)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(*images(), strict=True)]
    tf.Trainer(model, args, train_dataset=rows, eval_dataset=rows).train()
    after = logits(model)
    assert (after - before).abs().max() > 1e-4
    assert_loads(model, vit, tmp_path / "adapter", logits, 1e-6)
    assert (logits(model.merge_and_unload()) - after).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "settings"),
    [("LoraConfig", {}), ("LoHaConfig", {}), ("LoKrConfig", {}), ("OFTConfig", {"r": 1, "oft_block_size": 0})],
)
def test_resnet_with_batch_norms(config, settings, tmp_path):
    """The adapter has its own statistics of each batch norm; the base's stay as they were."""
    modules = {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]}
    model = get_peft_model(resnet(), getattr(slimtune, config)(**modules, **settings)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = images()
    for _ in range(3):
        model(pixel_values=x, labels=y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after, base = logits(model), logits(resnet())
    assert (after - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(resnet(), tmp_path)), after)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {"running_mean", "running_var", "num_batches_tracked"} < {k.rpartition(".")[2] for k in file}
    if config != "OFTConfig":  # peft's forward pass adds up overlapping patches
        theirs = peft.PeftModel.from_pretrained(resnet(), tmp_path)
        assert (logits(theirs) - after).abs().max() < 1e-5
    merged = resnet()
    merged.load_state_dict(dict(LazyMergedStateDict(model)))
    assert (logits(merged) - after).abs().max() < 1e-5
    assert_merges(model, logits, 1e-5)
    assert torch.equal(logits(model.unload()), base)
