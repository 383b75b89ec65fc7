"""PEFT's sentences, which its tests look for, by slimtune's own.

Where a pattern is found in the text of an error or a warning of slimtune, PEFT's words are put in front of it.
"""
# ruff: noqa: E501

import re
import warnings

EMBEDDINGS_SAVED = r"the file gets the base's embeddings, which "
WORDS = [
    # batches
    (
        r"adapter_names has (.+) for .+ rows",
        "Length of `adapter_names` should be the same as the number of inputs, but got ",
    ),
    (r"adapter_names has (.+), which the model does not have", "Trying to infer with non-existing adapter(s): {names}"),
    (
        r"adapter_names is given while .* is merged",
        "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.",
    ),
    (
        r"so its rows cannot use different trained copies",
        "Mixed batching is only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d.",
    ),
    (
        r"an nn.MultiheadAttention cannot run a mixed batch",
        "lora.MultiheadAttention does not support mixed adapter batches",
    ),
    (r"a LoRA on their parameters cannot run", "lora.ParamWrapper does not support mixed adapter batches yet."),
    (
        r"is no transformers model: none is found",
        "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",
    ),
    # adapters of a model
    (
        r"the adapter's name '(.+)' is a part of '(.+)', the start",
        r"Adapter name '\1' should not be contained in the prefix '\2'.",
    ),
    (
        r"adapters would train the base's biases",
        "supports only 1 adapter with bias. When using multiple adapters, set bias to 'none'",
    ),
    (r"set_adapter unmerges it first", "Adapter cannot be set when the model is merged. Unmerging the model first."),
    (
        r"were enabled or disabled apart",
        "The model contains some adapter layers that are enabled and others that are disabled",
    ),
    (
        r"(?s)there is no adapter '(.+?)'.*one of (.*)",
        r"Adapter \1 does not exist. Adapter(s) ['\1'] not found, available adapters: [\2]",
    ),
    (
        r"^('.+') is merged into the base",
        r"Cannot delete adapter(s) [\1] while they are merged. Please unmerge them first.",
    ),
    (r"is merged already: there is nothing", "All adapters are already merged, nothing to do"),
    (
        r"is merged already: now (.+) is merged, too",
        r"Already following adapters were merged. You are now additionally merging \1.",
    ),
    (r"the model already has an adapter '(.+)'", r"Adapter with name '\1' already exists"),
    (
        r"'(.+)' and '(.+)' both train rows",
        r"Token indices of adapter \2 are already defined and would result in undefined merging behavior. "
        "Only one adapter can be set at a time for TrainableTokensWrapper",
    ),
    (r"both have their own copy of", "Only one adapter can be set at a time for ModulesToSaveWrapper"),
    (
        r"base_model_name_or_path of the config is (.+), and the model is (.+), which",
        r"The PEFT config's `base_model_name_or_path` was renamed from \1 to \2",
    ),
    (r"the model already has adapters \(", "You are trying to modify a model with PEFT for a second time."),
    # merging and conversion
    (r"has no bias, into which", "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"),
    (
        r"contains NaN or Inf after merging: the adapter (.+) seems",
        r"NaNs detected in the merged weights. The adapter \1 seems to be broken",
    ),
    (
        r"^rank is (\S+)",
        r"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got \1. "
        r"Passing a rank of \1 doesn't make sense",
    ),
    (r"that a LoRA could approximate", "Could not detect any layer that supports LoRA conversion"),
    (r"is a LoRA already: the conversion", "Converting a PEFT adapter to LoRA that is already a LoRA adapter"),
    (
        r"several of the adapters train (.+) in full",
        "Cannot add weighted adapters if they target the same module with modules_to_save, but found {count} such instance(s).",
    ),
    (r"has target_parameters, which a weighted sum", "add_weighted_adapter does not support targeting nn.Parameter"),
    # hot-swapping
    (
        r"check_compiled is (.+)",
        r"check_compiles should be one of 'error', 'warn', or 'ignore', got \1 instead.",
    ),
    (r"call it before torch.compile", "Call prepare_model_for_compiled_hotswap *before* compiling the model"),
    (
        r"target_rank is (\d+), and adapter .+ has rank (\d+)",
        r"Trying to pad the adapter to the target rank \1, but the original rank is larger (\2)",
    ),
    (
        r"target_rank is (\d+), and .+ convolution with groups=(\d+)",
        r"Trying to pad a Conv2d LoRA adapter with groups=\2 to target rank \1, but the target rank is not divisible by \2. "
        r"Please choose a target rank that is divisible by \2.",
    ),
    (r"is an adapter of (\S+), and .+ of (\S+)", r"Incompatible PEFT types found: \2 and \1"),
    (r"a (\S+) has no adapters", "No adapter layers found on the model"),
    # files
    (
        r"has no known embeddings",
        "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",
    ),
    (
        EMBEDDINGS_SAVED + "the adapter changes",
        "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.",
    ),
    (
        EMBEDDINGS_SAVED + "were resized",
        "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
    ),
    (r"were not loaded, since their shapes differ", "Some weights of"),
    (r"are shards of DeepSpeed or FSDP", "DeepSpeed ZeRO-3 / FSDP shards"),
    (
        r"the commit of .+ could not be found",
        "A dev version of PEFT is used but there was an error while trying to determine the commit hash",
    ),
    # targets
    (
        r"target_modules only matches",
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules and "
        "modules to save",
    ),
    (
        r"target_modules: (.+?) matches no module",
        r"No modules were targeted for adaptation. Target modules [\1] not found in the base model.",
    ),
    (r"target_modules='(.+?)' matches no module", r"Target modules \1 not found in the base model."),
    (r"target_modules=([\[{].+?) matches no module", r"Target modules \1 not found in the base model."),
    (r"matches no module that these settings leave: exclude_modules", "All modules were excluded"),
    (r"trainable_token_indices: ('.+?') matches no", r"Target modules {{\1}} not found in the base model."),
    (
        r"is in modules_to_save and also has trainable tokens",
        "The embedding layer is already marked to be trained fully",
    ),
    (
        r"ensure_weight_tying is True, but no module that is tied to the embedding is in",
        "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
        "`target_modules`",
    ),
    (
        r"ensure_weight_tying is True, but no module that is tied to the embedding exists",
        "You have requested `ensure_weight_tying`, but no tied modules were found in the model",
    ),
    (r"the method cannot tie its adapters", "no implementation exists to tie the adapters"),
    (r"ensure_weight_tying is not True", "`ensure_weight_tying` is not set to True"),
    (
        r"with separate weights for query, key and value",
        "Only same embed for query/key/value is supported as of now for MultiheadAttention",
    ),
    (
        r"target_parameters: '(.+)' belongs to the model itself",
        r"Targeting an nn.Parameter on the top-level module is not supported (parameter '\1')",
    ),
    (
        r"target_parameters: .+ matches no parameter",
        "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments.",
    ),
    (
        r"another field of the config: a parameter of ('.+'), a (\w+)",
        r"Trying to wrap an `nn.Parameter` of layer \1 of type \2, which is not a valid target.",
    ),
    (r"target_modules is not given, and there is no default", "Please specify `target_modules`"),
    (r"cannot be adapted: a \w*(Mamba|Mixer)\w* reads", "is incompatible with Mamba-based models"),
    # settings of methods
    (
        r"use_dora is True, which an nn.MultiheadAttention",
        "MultiheadAttention does not support DoRA (yet), please set use_dora to False",
    ),
    (
        r"lora_bias is True, which an nn.MultiheadAttention",
        "MultiheadAttention does not support lora_bias=True (yet), please set lora_bias to False",
    ),
    (
        r"init_lora_weights is (.+), which an nn.MultiheadAttention",
        r"MultiheadAttention does not support init_lora_weights=\1 (yet), please set init_lora_weights to True",
    ),
    (
        r"lora_bias is True, and .+, a (\w+), has no bias",
        r"`lora_bias=True` was passed but the targeted layer of type \1 has no bias",
    ),
    (
        r"the rank is (\d+), and .+ is a (\w+) with groups=(\d+)",
        r"Targeting a \2 with groups=\3 and rank \1. Currently, support is limited to conv layers where the rank is "
        "divisible by groups. Either choose a different rank or do not target this specific layer.",
    ),
    (
        r"has groups=.+ a LoRA on it cannot be merged",
        "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.",
    ),
    (
        r"encoder_num_layers is \d+, and the prompt encoder",
        "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used.",
    ),
    (
        r"^(\w+) is (\S+), and adapter '.+' has another one",
        r"`\1=\2` was passed to create_lorafa_optimizer",
    ),
]


def add_peft_words(text):
    """Return a text of slimtune with PEFT's words in front of it, where PEFT has some."""
    found = []
    for pattern, words in WORDS:
        if match := re.search(pattern, text):
            names = re.findall(r"'([^']+)'", match[1]) if match.groups() else []
            words = words.replace("{names}", ", ".join(names)).replace("{count}", str(len(names)))
            found.append(match.expand(words.replace("{{", "{").replace("}}", "}")))
    return " ".join([*found, text])


def install():
    """Let slimtune's errors and warnings say PEFT's words, too."""
    from slimtune.core.adapters.adapter_module import MergeUnsupported
    from slimtune.errors import SlimtuneError

    def init_error(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.args = (add_peft_words(self.args[0]),)

    def init_merge_error(self, *args):
        self.args = (add_peft_words(str(args[0])),)

    init, SlimtuneError.__init__, MergeUnsupported.__init__ = SlimtuneError.__init__, init_error, init_merge_error
    warn = warnings.warn

    def warn_in_peft_words(message, category=None, stacklevel=1, **more):
        text = message if isinstance(message, Warning) else add_peft_words(str(message))
        warn(text, category, stacklevel + 1, **more)

    warnings.warn = warn_in_peft_words
