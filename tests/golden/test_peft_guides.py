"""The scripts of PEFT's guides, on tiny models: with the import changed they give PEFT's losses and outputs."""

import importlib

import peft
import pytest
import torch
import transformers as tf
from models_zoo import ENCODER, VOCAB, t5, tokens

import slimtune

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
WHISPER = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
           "pad_token_id": 0, "max_source_positions": 20, "max_target_positions": 32, "bos_token_id": 1,
           "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


def train(model, batch, lr):
    """The loop of the guides: AdamW and a linear schedule; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = tf.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=4)
    losses = []
    model.eval()  # without dropout, so that the libraries draw the same numbers
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def ia3_for_t5(library, base, out):
    """task_guides/ia3"""
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(base)
    model = library.get_peft_model(model, library.IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.print_trainable_parameters()
    batch = {"input_ids": tokens(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long), "labels": tokens(4, 3)}
    losses = train(model, batch, lr=8e-3)
    model.save_pretrained(out)
    model = library.AutoPeftModelForSeq2SeqLM.from_pretrained(out)
    return losses, model.generate(input_ids=tokens(), max_new_tokens=4)


def prompt_methods(config):
    """task_guides/prompt_based_methods"""

    def guide(library, base, out):
        model = tf.AutoModelForCausalLM.from_pretrained(base)
        tokenizer = tf.AutoTokenizer.from_pretrained(base)
        torch.manual_seed(3)
        model = library.get_peft_model(model, config(library, base))
        model.print_trainable_parameters()
        texts = ["@HMRC No this is my first job : complaint", "Nice day : no complaint"]
        batch = dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
        batch.pop("token_type_ids", None)
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-9] = -100  # only the answer
        losses = train(model, batch, lr=3e-2)
        model.save_pretrained(out)
        model = library.AutoPeftModelForCausalLM.from_pretrained(out)
        inputs = tokenizer(texts[0], return_tensors="pt")
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=3)
        # With this transformers, the second new token of PEFT 0.21.2 is not the one of its own forward pass.
        return losses, said[:, : inputs["input_ids"].shape[1] + 1]

    return guide


def p_tuning(library, base):
    return library.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=128)


def prefix_tuning(library, base):
    return library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)


def prompt_tuning(library, base):
    text = "Classify if the tweet is a complaint or not.\n"
    settings = {"num_virtual_tokens": 8, "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(base)}
    return library.PromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init=library.PromptTuningInit.TEXT, **settings
    )


def token_classification(library, base, out):
    """task_guides/token_classification"""
    model = tf.AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    torch.manual_seed(3)
    settings = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "all"}
    peft_config = library.LoraConfig(task_type=library.TaskType.TOKEN_CLS, inference_mode=False, **settings)
    model = library.get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    losses = train(model, {"input_ids": tokens(4, 8), "labels": tokens(4, 8, seed=1) % 3}, lr=1e-3)
    model.save_pretrained(out)
    config = library.PeftConfig.from_pretrained(out)
    inference_model = tf.AutoModelForTokenClassification.from_pretrained(config.base_model_name_or_path, num_labels=3)
    model = library.PeftModel.from_pretrained(inference_model, out)
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits
    return losses, torch.argmax(logits, dim=2)


def whisper_int8(library, base, out):
    """task_guides/int8-asr"""
    settings = tf.BitsAndBytesConfig(load_in_8bit=True)
    model = tf.AutoModelForSpeechSeq2Seq.from_pretrained(base, quantization_config=settings, device_map="cpu")
    model = library.prepare_model_for_kbit_training(model)
    model.model.encoder.conv1.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    torch.manual_seed(3)
    config = library.LoraConfig(
        r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none"
    )
    model = library.get_peft_model(model, config)
    model.print_trainable_parameters()
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    data = [{"input_features": f, "labels": row} for f, row in zip(features, tokens(2, 6), strict=True)]
    arguments = tf.Seq2SeqTrainingArguments(
        str(out), per_device_train_batch_size=2, learning_rate=1e-3, max_steps=3, logging_steps=1, save_strategy="no",
        remove_unused_columns=False, label_names=["labels"], report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = tf.Seq2SeqTrainer(args=arguments, model=model, train_dataset=data)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    model.save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    config = library.PeftConfig.from_pretrained(out)
    model = tf.WhisperForConditionalGeneration.from_pretrained(
        config.base_model_name_or_path, quantization_config=settings, device_map="cpu"
    )
    model = library.PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        said = model.generate(input_features=features, decoder_input_ids=tokens(2, 4), max_new_tokens=4)
    return losses, said


def whisper_folder(folder):
    model = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER))
    model.generation_config = tf.GenerationConfig(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    model.save_pretrained(folder)


FOLDERS = {
    ia3_for_t5: lambda folder: t5(torch.float32).save_pretrained(folder),
    token_classification: lambda folder: tf.RobertaForTokenClassification(tf.RobertaConfig(**ENCODER)).save_pretrained(
        folder
    ),
    whisper_int8: whisper_folder,
}


def outcome(guide, library, base, out, capsys):
    losses, said = guide(library, base, out)
    # The rest of the line counts our copies of trained biases too.
    printed = [line.split(" ||")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("trainable")]
    return losses, said.tolist(), printed


@pytest.mark.parametrize("guide", FOLDERS, ids=lambda guide: guide.__name__)
def test_guides_give_pefts_losses_and_outputs(guide, tmp_path, capsys):
    if guide is whisper_int8 and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    FOLDERS[guide](tmp_path / "base")
    ours, theirs = (outcome(guide, m, tmp_path / "base", tmp_path / m.__name__, capsys) for m in (slimtune, peft))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[0][-1] < ours[0][0]
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("config", [p_tuning, prefix_tuning, prompt_tuning], ids=lambda config: config.__name__)
def test_the_guide_of_prompt_methods(config, tiny_tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    bloom = tf.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    tf.BloomForCausalLM(bloom).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    guide = prompt_methods(config)
    ours, theirs = (outcome(guide, m, tmp_path / "base", tmp_path / m.__name__, capsys) for m in (slimtune, peft))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[0][-1] < ours[0][0]
    assert ours[1:] == theirs[1:]
