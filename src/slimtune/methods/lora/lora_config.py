"""LoRA's settings."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.config_fields import FieldError, map_settings_by_name, read_section_and_errors
from ...core.adapters.peft_config import (
    BIAS_HELP,
    FAN_IN_FAN_OUT_HELP,
    DataInitialization,
    PeftConfig,
    RankPatternConfig,
    config_field,
)
from ...errors import ConfigError, PeftWarning, UsageError, format_names, suggest
from ...extras.rank_limits import require_rank_fitting_layer_size
from ..trainable_tokens.trainable_tokens_config import are_valid_unique_token_ids
from .init_configs import NAMED_INITS, CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, is_valid_lora_init

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SiteKind, UndoableLayerReplication
    from ..trainable_tokens.trainable_tokens_modules import TrainableRowsSpec


QAT_PRECISIONS = (
    "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip
"""llama.cpp's precisions whose types all are in `export/gguf_blocks.py`."""
_UNSUPPORTED_WITH_QAT = (
    "lora_dropout", "use_dora", "lora_bias", "alora_invocation_tokens", "target_parameters", "layer_replication",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip


@dataclass
class LoraRuntimeConfig:
    """What concerns one run and is not saved. PEFT's `ephemeral_gpu_offload` only speeds up its own initialization."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(RankPatternConfig):
    """LoRA: low-rank matrices beside frozen layers; PEFT's field names and defaults."""

    name: ClassVar = "lora"
    prefix: ClassVar = "lora_"
    alpha_name: ClassVar = "lora_alpha"
    fields_not_in_peft: ClassVar = frozenset(["freeze_a", "lr_ratio", "qat", "qat_start"])
    unsupported_peft_fields: ClassVar = {
        **dict.fromkeys((
            "megatron_config", "velora_config",
            "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
        )),
        "use_qalora": False, "megatron_core": "megatron.core", "qalora_group_size": 16,
    }  # fmt: skip
    kinds: ClassVar = ("linear", "embedding", "conv", "weight")
    uses_lora_file_format: ClassVar = True
    short_names: ClassVar = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 16, "lora_alpha": lambda given: 2 * given["r"], "target_modules": "all-linear"}

    r: int = config_field(8, "rank of the update; typically 4 to 64", ge=1)
    lora_alpha: float = config_field(8, "scale numerator: the update is scaled by lora_alpha / r", gt=0)
    lora_dropout: float = config_field(0.0, "probability of dropping an input of A while training", ge=0, lt=1)
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "lora_only"] = config_field("none", BIAS_HELP)
    target_parameters: list[str] | None = config_field(
        None,
        "names or dotted suffixes of parameters to adapt, such as those of experts: mlp.experts.gate_up_proj; with "
        'target_modules=[] nothing else. None: with "all-linear" the experts',
    )
    use_rslora: bool = config_field(False, "scale the update by lora_alpha / √r instead")
    init_lora_weights: bool | str = config_field(
        True,
        'how A and B start. True: Kaiming-uniform A, zero B; "gaussian": normal A with std 1/r, zero B; "pissa", '
        '"pissa_niter_N" or "olora": the largest parts of the base weight; "orthogonal": random with B A = 0; "mica": '
        'fixed B from the smallest parts, zero A; "eva": zero B, A from data; "corda", "lora_ga": parts chosen by data '
        'or by gradients, see preprocess_corda and preprocess_loraga; "loftq": the error of quantization; '
        "False: both random, for tests. An embedding starts with zero A and normal B, except with mica and False",
    )
    use_dora: bool = config_field(False, "also train the length of each row of the adapted weight (DoRA)")
    lora_bias: bool = config_field(False, "give B a trained bias; not with a named init_lora_weights or DoRA")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = config_field(
        None,
        "ids of tokens whose input embeddings train too, or such lists by embedding; tied output heads follow",
        ge=0,
    )
    ensure_weight_tying: bool = config_field(
        False,
        "adapt or train an output head (or another embedding) that is tied to the input embedding together with it, by "
        "the same parameters",
    )
    alora_invocation_tokens: list[int] | None = config_field(
        None,
        "token ids; the adapter changes only the tokens from their last occurrence in a row on (activated LoRA)",
        ge=0,
    )
    layer_replication: list[Any] | None = config_field(
        None,
        "ranges [start, end) of layers to stack, such as [[0, 4], [2, 5]]: replicas share the base's weights and have "
        "adapters of their own",
    )
    eva_config: EvaConfig | dict | None = config_field(None, 'settings of "eva", an EvaConfig; None: its defaults')
    corda_config: CordaConfig | dict | None = config_field(
        None, 'settings of "corda", a CordaConfig; None: its defaults'
    )
    lora_ga_config: LoraGAConfig | dict | None = config_field(None, 'settings of "lora_ga", a LoraGAConfig')
    loftq_config: LoftQConfig | dict[str, Any] = config_field({}, 'record of how a "loftq" adapter was made')
    runtime_config: LoraRuntimeConfig = dataclasses.field(default_factory=LoraRuntimeConfig)
    lr_ratio: float = config_field(
        1, "learning rate of B over that of A (LoRA+), typically 1 to 16; slimtune only", gt=0
    )
    freeze_a: bool = config_field(
        False, "train B alone, so that of a layer's input only A x is kept (LoRA-FA); not for embeddings; slimtune only"
    )
    qat: str | None = config_field(
        None,
        "precision of the GGUF that the merged model will be exported in, such as Q4_0: training sees the weights "
        "rounded to it (quantization-aware training); slimtune only",
        choices=QAT_PRECISIONS,
    )
    qat_start: float = config_field(
        0.0, "share of the steps that train the weights as they are, before those of qat; slimtune only", ge=0, lt=1
    )
    first_rounded_step = 0  # no field: a run sets it

    def normalize(self) -> None:
        super().normalize()
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()  # "OLoRA", as in PEFT
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        for name, init, cls in _INIT_CONFIGS:
            given = getattr(self, name)
            # PEFT has no default for the settings of LoRA-GA.
            if given is None and self.init_lora_weights == init != "lora_ga":
                given = {}
            if isinstance(given, dict) and not _find_init_config_errors(name, cls, given):
                setattr(self, name, cls(**given))
        if self.layer_replication is not None:
            self.layer_replication = [list(r) if isinstance(r, list | tuple) else r for r in self.layer_replication]

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        init, named = self.init_lora_weights, [*NAMED_INITS, "pissa_niter_N"]
        if not is_valid_lora_init(init):
            expected = f"True, False or one of {format_names(named)}{suggest(str(init), named)}"
            yield self.error("init_lora_weights", expected)
        if init == "orthogonal":
            for name, ranks in (("r", [self.r]), ("rank_pattern", self.rank_pattern.values())):
                if any(r % 2 for r in ranks):
                    yield self.error(name, "even with init_lora_weights='orthogonal'")
        if init == "mica" and (self.use_dora or self.freeze_a):
            yield self.error("init_lora_weights", "a value other than 'mica' with DoRA or freeze_a")
        if self.lora_bias and (self.use_dora or not isinstance(init, bool)):
            what = "use_dora=True" if self.use_dora else f"init_lora_weights={init!r}"
            yield FieldError(
                "lora_bias", f"The argument lora_bias=True is not supported with {what}", "lora_bias=False"
            )
        if self.loftq_config and init != "loftq":
            yield self.error("loftq_config", "only with init_lora_weights='loftq'")
        yield from self._find_token_conflicts()
        yield from self._find_qat_conflicts()
        for name, init_name, cls in _INIT_CONFIGS:
            given = getattr(self, name)
            if isinstance(given, dict):
                yield from _find_init_config_errors(name, cls, given)
            elif given is not None and init != init_name:
                what = f"`{name}` specified but will be ignored when `init_lora_weights` is not {init_name!r}."
                warnings.warn(what, stacklevel=5)
        ranges = self.layer_replication
        if ranges is not None and not (ranges and all(map(_is_range, ranges))):
            yield self.error("layer_replication", "pairs [start, end) with start below end")

    def _find_token_conflicts(self) -> Iterator[FieldError]:
        if self.alora_invocation_tokens is not None:
            if not self.alora_invocation_tokens:
                yield self.error("alora_invocation_tokens", "None or at least one id")
            elif self.use_dora:
                yield self.error("alora_invocation_tokens", "None with DoRA")
        tokens = self.trainable_token_indices
        if tokens is not None:
            lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
            if not lists or not all(are_valid_unique_token_ids(ids) for ids in lists):
                yield self.error("trainable_token_indices", "token ids, each once")

    def _find_qat_conflicts(self) -> Iterator[FieldError]:
        for name in _UNSUPPORTED_WITH_QAT if self.qat is not None else ():
            if getattr(self, name):
                yield self.error(name, f"its default with qat={self.qat!r}, which rounds W + s B A")
        if self.qat is not None and self.init_lora_weights == "loftq":
            yield self.error("init_lora_weights", f"a value other than 'loftq' with qat={self.qat!r}")

    def default_learning_rate(self, steps: int, epochs: float, hidden_size: int) -> float:
        """Return the learning rate of a run that has none; arguments as in the base class.

            2e-4 · √(665 / steps) / epochs^0.75 · √(32 / (s · r)) · (2048 / hidden_size)^0.78, between 2e-4 and 5e-3

        Short runs and low ranks need a higher rate, rows that come again a lower one, else the adapter learns them by
        heart (docs/methods/lora.md has the measurements), and narrow bases a higher one (Schulman and others 2025,
        "LoRA Without Regret"). Starts other than random A and zero B keep 2e-4.
        """
        if self.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
            return self.learning_rate
        scale = self.lora_alpha * (math.sqrt(self.r) if self.use_rslora else 1)  # s · r
        factor = math.sqrt(665 / steps * 32 / scale) / epochs**0.75 * (2048 / hidden_size) ** 0.78
        return min(max(self.learning_rate, self.learning_rate * factor), 5e-3)

    def check_model(self, model: nn.Module) -> None:
        from ...core.adapters.targets import find_tied_embedding_names, matches_regex_or_names

        super().check_model(model)
        if self.alora_invocation_tokens and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UsageError(f"alora_invocation_tokens is set for a {type(model).__name__}", "a causal language model")
        if self.ensure_weight_tying and self.trainable_token_indices is not None:
            tied = find_tied_embedding_names(model)
            if not tied:
                what = "ensure_weight_tying=True but the model does not have tied weights"
                warnings.warn(f"{what}: trained tokens of its embeddings are separate", stacklevel=4)
            tokens = self.trainable_token_indices
            by_key = tokens.items() if isinstance(tokens, dict) else ()
            lists = [ids for key, ids in by_key if any(matches_regex_or_names([key], n) for n in tied)]
            if any(ids != lists[0] for ids in lists):
                message = "Cannot ensure weight tying when different token indices are specified for tied layers"
                raise ConfigError(message, "the same ids for all of them, or ensure_weight_tying=False")

    def check_rows(self, rows: Sequence[Any]) -> None:
        import torch

        from .alora import calculate_alora_offsets

        if not (invocation := self.alora_invocation_tokens):
            return
        ids = (torch.tensor([row["input_ids"]]) for row in rows)
        lacking = sum(calculate_alora_offsets({"": self}, "", row) == [None] for row in ids)
        what = f"of {len(rows)} training rows do not contain alora_invocation_tokens {invocation}"
        if lacking and lacking == len(rows):
            expected = "the ids of tokens that stand before the answers, such as those that begin the assistant's turn"
            raise UsageError(f"{lacking} {what}: nothing would train", expected)
        if lacking:
            warnings.warn(f"{lacking} {what}: they train nothing", stacklevel=2)

    def fill_from_model(self, model: nn.Module) -> None:
        from ...core.adapters.targets import (
            ALL_LINEAR,
            find_expert_parameters,
            find_layers_read_without_call,
            list_all_linear_targets,
            strip_layer_prefixes_if_unambiguous,
        )
        from .lora_parameter_modules import find_field_unsupported_on_parameters, move_expert_like_targets_to_parameters

        super().fill_from_model(model)
        if self.target_modules == ALL_LINEAR and (
            find_expert_parameters(model) or find_layers_read_without_call(model)
        ):
            # In a file, "all-linear" means to PEFT the experts of transformers 4, which were linear layers, and layers
            # of Mamba mixers that it then refuses.
            self.target_modules = strip_layer_prefixes_if_unambiguous(list_all_linear_targets(model, self), model)
            experts = find_expert_parameters(model, self.exclude_modules)
            if self.target_parameters is None and experts:
                names, field = (
                    strip_layer_prefixes_if_unambiguous(experts, model),
                    find_field_unsupported_on_parameters(self),
                )
                self.target_parameters = [] if field else names
                if field:
                    value = f"{field} is {getattr(self, field)!r}, which they do not support"
                    message = f'target_modules="all-linear" leaves out the experts ({format_names(names)}): {value}'
                    warnings.warn(message, stacklevel=2)
        move_expert_like_targets_to_parameters(self, model)

    def change_base(self, model: nn.Module) -> UndoableLayerReplication | None:
        """Replicate the base's layers."""
        from .layer_replication import replicate_layers

        return replicate_layers(model, self.layer_replication) if self.layer_replication else None

    def extra_targets(self, model: nn.Module) -> dict[str, SiteKind]:
        from ...core.adapters.targets import map_modules_to_target_parameters
        from .lora_parameter_modules import find_linears_peft_mistakes_for_experts

        parameters: dict[str, SiteKind] = dict.fromkeys(map_modules_to_target_parameters(model, self), "parameters")
        parameters |= dict.fromkeys(parameters.keys() & find_linears_peft_mistakes_for_experts(model), "linear")
        rows: dict[str, SiteKind] = {name: rows.kind for name, rows in self._find_trainable_rows(model).items()}
        if both := [name for name in parameters if name in rows]:
            message = f"target_parameters and trainable_token_indices both change {format_names(both)}"
            raise ConfigError(message, "one of them, or two adapters")
        return parameters | rows

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        from ...core.adapters.targets import find_tied_embedding_names
        from ..trainable_tokens.trainable_tokens_modules import build_trainable_row_modules
        from .lora_modules import TiedLinearLora, TiedSecondInputEmbeddingLora, double_out_proj_scale_in_lora_attention

        trained = self._find_trainable_rows(sites[0].model) if sites else {}
        built = build_trainable_row_modules([s for s in sites if s.name in trained], trained)
        tied = find_tied_embedding_names(sites[0].model) if sites and self.ensure_weight_tying else []
        for site in sites:
            if site.name not in built and site.name not in tied[1:]:
                built[site.name] = self.build(site)
        for site in (s for s in sites if s.name not in built):
            shared: Any = built[tied[0]]
            built[site.name] = (TiedSecondInputEmbeddingLora if site.kind == "embedding" else TiedLinearLora)(
                site, self, shared
            )
        modules = [built[site.name] for site in sites]
        if self.qat is not None and sites:
            from .rounded_lora import set_weight_roundings

            set_weight_roundings(sites[0].model, {s.name: m for s, m in zip(sites, modules, strict=True)}, self.qat)
        double_out_proj_scale_in_lora_attention(sites, modules)
        return modules

    def _find_trainable_rows(self, model: nn.Module) -> dict[str, TrainableRowsSpec]:
        from ..trainable_tokens.trainable_tokens_modules import map_trainable_row_specs_by_module

        tokens = self.trainable_token_indices
        return {} if tokens is None else map_trainable_row_specs_by_module(model, tokens, self.modules_to_save or ())

    @property
    def compensates_quantization(self) -> bool:
        return self.init_lora_weights == "loftq"

    def defer_initialization(self) -> DataInitialization | None:
        if not self.compensates_quantization:
            return None
        from .loftq import initialize_loftq

        self.init_lora_weights = True  # as in PEFT: an adapter that is read back is not initialized again
        return initialize_loftq

    def build(self, site: AdapterSite) -> AdapterModule:
        from ...core.adapters.targets import matches_regex_or_names
        from .alora import LinearALora
        from .dora import EmbeddingDora, LinearDora
        from .lora_conv_modules import ConvDora, ConvLora
        from .lora_modules import AttentionWeightLora, EmbeddingLora, LinearLora
        from .lora_parameter_modules import ParameterLora

        if self.init_lora_weights == "loftq" and not site.skip_init:
            raise ConfigError(
                "init_lora_weights='loftq' needs the weights before quantization, which the model no longer has",
                "a base in NF4 or int8 and another initialization",
                "leave init_lora_weights out, then slimtune.replace_lora_weights_loftq(model, folder of the weights)",
            )
        if self.alora_invocation_tokens and site.kind != "linear":
            raise ConfigError(f"{site.name} is not a linear layer", "linear layers only, with alora_invocation_tokens")
        if site.kind == "parameters":
            wanted = self.target_parameters or []
            names = [p for p in site.module._parameters if matches_regex_or_names(wanted, f"{site.name}.{p}")]
            return ParameterLora(site, self, names)
        weight = f"{site.name}.weight"
        name = weight if matches_regex_or_names(self.target_parameters or [], weight) else site.name
        r, alpha = require_rank_fitting_layer_size(site, self.get_rank(name)), self.get_alpha(name)
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        if self.lora_bias and site.kind in ("linear", "conv") and site.bias() is None and not site.skip_init:
            what = f"lora_bias is True, and {site.name}, a {type(site.module).__name__}, has no bias"
            what += ": the adapter cannot be merged"
            warnings.warn(what, PeftWarning, stacklevel=2)
        if self.qat is not None:
            from .rounded_lora import build_rounded_lora

            return build_rounded_lora(site, self, r, scale)
        if self.alora_invocation_tokens:
            return LinearALora(site, self, r, scale)
        if site.kind == "weight":
            return AttentionWeightLora(site, self, r, scale)
        if site.kind == "conv":
            return (ConvDora if self.use_dora else ConvLora)(site, self, r, scale)
        if site.kind != "embedding":
            return (LinearDora if self.use_dora else LinearLora)(site, self, r, scale)
        # Other modules can share A and B of the embedding, but not the lengths of DoRA.
        for name in ("lora_bias", "freeze_a", *(["use_dora"] if self.ensure_weight_tying else [])):
            if getattr(self, name):
                message = f"{name}=True is not supported for Embedding ({site.name})"
                raise ConfigError(message, "linear layers only", "take it out of target_modules")
        return (EmbeddingDora if self.use_dora else EmbeddingLora)(site, self, r, scale)

    def max_added_bytes(self, adapter_modules: Mapping[str, AdapterModule]) -> int | None:
        """Return what EVA can add: it redistributes the ranks, and those of a large layer take more bytes."""
        from .eva import estimate_max_adapter_bytes_added_by_eva

        return (
            estimate_max_adapter_bytes_added_by_eva(adapter_modules, self) if self.init_lora_weights == "eva" else None
        )

    def convert_to_zero_init(
        self, adapter_modules: Mapping[str, AdapterModule]
    ) -> tuple[PeftConfig, dict[str, dict[str, Tensor]]]:
        """Return the plain LoRA of rank 2r that equals this one, which starts as a part of the base's weight."""
        from .lora_modules import LoraModuleBase

        loras = {n: m for n, m in adapter_modules.items() if isinstance(m, LoraModuleBase)}
        if not any("start_A" in m.tensors() for m in loras.values()):
            return super().convert_to_zero_init(adapter_modules)
        # The scale is alpha / r or alpha / √r, and must stay.
        factor = math.sqrt(2) if self.use_rslora else 2
        config = dataclasses.replace(
            self,
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={k: 2 * r for k, r in self.rank_pattern.items()},
            alpha_pattern={k: factor * alpha for k, alpha in self.alpha_pattern.items()},
            corda_config=None,
            lora_ga_config=None,
        )
        tensors = {n: m.tensors() for n, m in adapter_modules.items()}
        return config, tensors | {n: m.tensors_of_rank(config.get_rank(n)) for n, m in loras.items()}

    def on_train_begin(self, total_steps: int) -> None:
        self.first_rounded_step = math.ceil(self.qat_start * total_steps)

    def on_step_end(self, adapter_modules: Mapping[str, AdapterModule], step: int) -> None:
        from .lora_parameter_modules import ParameterLora
        from .rounded_lora import RoundedLinearLora

        for module in adapter_modules.values():
            if isinstance(module, ParameterLora):
                module.note_reached_experts()
            elif isinstance(module, RoundedLinearLora):
                module.rounds_while_training = step >= self.first_rounded_step

    def find_untrained_experts(self, adapter_modules: Mapping[str, AdapterModule]) -> dict[str, list[int]]:
        from .lora_parameter_modules import ParameterLora

        found = {
            f"{site}.{part.parameter_name}": (~part.has_gradient).nonzero().flatten().tolist()
            for site, module in adapter_modules.items()
            if isinstance(module, ParameterLora)
            for part in module.each_parameter()
            if part.stacked
        }
        return {name: experts for name, experts in found.items() if experts}


_INIT_CONFIGS: tuple[tuple[str, str, Any], ...] = (
    ("eva_config", "eva", EvaConfig),
    ("corda_config", "corda", CordaConfig),
    ("lora_ga_config", "lora_ga", LoraGAConfig),
)
"""Field, the `init_lora_weights` that reads it, and the class of its value."""


def _find_init_config_errors(name: str, cls: Any, given: Mapping[str, Any]) -> list[FieldError]:
    _, errors = read_section_and_errors(map_settings_by_name(cls), given, name)
    return [e if e.sentence else e._replace(sentence=f"{e.field}: {e.problem}") for e in errors]


def _is_range(pair: Any) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
    return is_pair and 0 <= pair[0] < pair[1]
