"""Models with several adapters and saved adapters, for the tests of this folder."""

from models_zoo import llama, run, shake

from slimtune import LoraConfig, PeftConfig, get_peft_model


def make_config(settings):
    return settings if isinstance(settings, PeftConfig) else LoraConfig(**settings)


def add_adapters(model, named):
    """Add an adapter with random values for each entry, a config or a LoRA's settings; the last one is active."""
    for seed, (name, settings) in enumerate(named.items()):
        if hasattr(model, "peft_config"):
            model.add_adapter(name, make_config(settings), strict=False)  # as if loaded: each may have biases
        else:
            model = get_peft_model(model, make_config(settings), name)
        model.set_adapter(name)
        shake(model, seed=seed)
    return model.eval()


def save_adapter(folder, settings, base=llama, seed=1):
    """Save an adapter with random values; return its folder and the model's logits with it."""
    model = shake(get_peft_model(base(), make_config(settings)), seed=seed)
    model.save_pretrained(folder)
    return folder, run(model.eval())
