"""A merge into 16 bits, each number rounded to its nearest (as PEFT does) and as `slimtune merge` rounds.

    python benchmarks/merge_rounding.py RUN [--dtype bfloat16]

|log p(next token | merged) - log p(next token | base with adapter)| on the texts of the merge's check, which the run
was not trained on; both computed in float32. `outputs` is what rounding changes in the layers' outputs on rows the run
was trained on: the sum of squares, relative to rounding to the nearest.
"""

import argparse
from pathlib import Path

import torch

from slimtune.export.expected_logps import AdapterReference, make_fixed_and_held_out_reference_texts
from slimtune.export.gptq_rounding import record_linear_layer_inputs, round_with_inputs
from slimtune.export.merge import load_run_for_export
from slimtune.export.merged_weights import LazyMergedStateDict
from slimtune.generation.inference_engines import TransformersInferenceEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    loaded = load_run_for_export(args.run)
    model, tokenizer = loaded.model.to(torch.float32), loaded.base.tokenizer
    reference = AdapterReference(
        model,
        tokenizer,
        make_fixed_and_held_out_reference_texts(tokenizer, loaded.recipe, model.config.get_text_config()),
    )
    effect, positions = reference.effect, sum(map(len, reference.log_probs))
    inputs = record_linear_layer_inputs(model, loaded.recipe, tokenizer)
    exact = {n: t.clone() for n, t in LazyMergedStateDict(model).items() if t.dim() == 2}
    plain = model.merge_and_unload()
    nearest_outputs = 0.0
    print(f"{args.run}: {positions} positions, on which the adapter changes log-probabilities by {effect:.2f} nats")
    print(f"{'rounding':9} {'mean |d|':>9} {'largest':>9} {'outputs':>9}")
    for way in ("nearest", "slimtune"):
        outputs = 0.0
        for name, weight in exact.items():
            x = inputs.get(name.removesuffix(".weight"))
            rounded = round_with_inputs(weight, x, dtype) if way == "slimtune" and x is not None else weight.to(dtype)
            plain.get_parameter(name).data.copy_(rounded)
            if x is not None:
                outputs += ((rounded.float() - weight) @ x.float().t()).square().sum().item()
        nearest_outputs = nearest_outputs or outputs
        engine = TransformersInferenceEngine(way, plain, tokenizer)
        differences = reference.differences(engine.score(text.ids).token_log_probs for text in reference.texts).abs()
        ratio = outputs / nearest_outputs
        print(f"{way:9} {differences.mean():9.4f} {differences.max():9.4f} {ratio:9.3f}", flush=True)


if __name__ == "__main__":
    main()
