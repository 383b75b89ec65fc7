"""Make bottleneck_golden.safetensors: what the `adapters` library computes with bottleneck adapters on a tiny Llama.

Run in an environment of its own (`pip install adapters torch`; it brings its own transformers):

    python tests/golden/make_bottleneck_golden.py

Made with adapters 1.3.0, transformers 4.57.6, torch 2.13.0. Float64; the weights are float32 numbers.

The file: `base.<name>` the base; `<case>/<our key>` an adapter's tensors; `<case>/logits`; `ids`; the metadata hold the
base's config and each case's settings. "parallel": the library lets a parallel adapter of a pre-norm layer read the
stream before the norm. Here it is handed what the feed-forward reads, as in the paper, and computes as it does.
"""

import json
import re
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": False,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# name: (the library's config, our settings)
CASES = {
    "houlsby": (adapters.DoubleSeqBnConfig(reduction_factor=4), {"style": "houlsby", "reduction_factor": 4}),
    "pfeiffer": (adapters.SeqBnConfig(reduction_factor=4), {"style": "pfeiffer", "reduction_factor": 4}),
    # Without `original_ln_after`: the patch below adds the residual, which is not what the adapter reads here.
    "parallel": (adapters.ParBnConfig(original_ln_after=False), {"style": "parallel"}),
    "mixed": (
        adapters.DoubleSeqBnConfig(
            reduction_factor={"0": 2, "default": 5}, non_linearity="gelu", scaling="channel", mh_adapter=False
        ),
        {"style": "houlsby", "reduction_factor": {"0": 2, "default": 5}, "non_linearity": "gelu", "scaling": "channel",
         "mh_adapter": False},
    ),
}  # fmt: skip


def read_the_feed_forwards_input(layer) -> None:
    seen = []
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain = layer.output_adapters.forward
    layer.output_adapters.forward = lambda y, residual, norm: plain(y, seen.pop(), norm) + residual


def our_key(name: str, case: str) -> str:
    layer, place, rest = re.fullmatch(r"(model\.layers\.\d+)\.(\w+)\.adapters\.\w+\.(.+)", name).groups()
    inside = {"attention_adapters": ".self_attn", "output_adapters": "" if case == "pfeiffer" else ".mlp"}[place]
    return f"base_model.model.{layer}{inside}.{rest.replace('adapter_down.0.', 'adapter_down.')}"


def main() -> None:
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    ids = torch.randint(3, 32, (2, 7))
    kept = {"ids": ids} | {f"base.{n}": t.clone() for n, t in plain.state_dict().items()}
    for case, (config, _) in CASES.items():
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        model.load_state_dict(plain.state_dict())
        adapters.init(model)
        model.add_adapter(case, config=config)
        model.set_active_adapters(case)
        own = {n: p for n, p in model.named_parameters() if f".adapters.{case}." in n}
        for p in own.values():
            p.data = torch.randn_like(p) * 0.3
        kept |= {f"{case}/{our_key(n, case)}": p.detach().clone() for n, p in own.items()}
        if case == "parallel":
            for layer in model.model.layers:
                read_the_feed_forwards_input(layer)
        with torch.no_grad():
            kept[f"{case}/logits"] = model.double().eval()(input_ids=ids).logits
    about = {"sizes": json.dumps(SIZES), "cases": json.dumps({c: ours for c, (_, ours) in CASES.items()})}
    save_file(kept, Path(__file__).with_name("bottleneck_golden.safetensors"), about)


if __name__ == "__main__":
    main()
