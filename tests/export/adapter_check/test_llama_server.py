"""A real llama.cpp server, asked over HTTP as `llama-server` is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import transformers
from fault_walk import describe_verdict
from faulty_adapters import edit_config, edit_tensors, save_adapter
from tiny_gguf import write_gguf, write_tiny_base

from slimtune.export.exporter import export
from slimtune.export.verify import ServedPlace, check_adapter
from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]
CONVERTER = Path(os.environ.get("LLAMA_CPP", "")) / "convert_lora_to_gguf.py"
needs_converter = pytest.mark.skipif(not CONVERTER.is_file(), reason="$LLAMA_CPP has no convert_lora_to_gguf.py")


class Files:
    """A base as a GGUF file and as a folder, an adapter of PEFT, and the adapter as a GGUF file."""

    def __init__(self, folder, tiny_llama, tiny_tokenizer):
        self.folder, self.tokenizer = folder, tiny_tokenizer()
        self.base = write_tiny_base(folder / "base.gguf", tiny_llama, tiny_tokenizer, initializer_range=0.2)
        self.hf = get_or_make_hf_folder_and_seconds(self.base)[0]
        self.adapter = self.save("adapter", lora_alpha=16)
        self.gguf = self.export(self.adapter)

    def load_base(self):
        base = transformers.AutoModelForCausalLM.from_pretrained(self.hf)
        base.name_or_path = str(self.base)
        return base

    def save(self, name, **settings):
        """Save another adapter of the base."""
        adapter = save_adapter(self.load_base(), self.folder / name, **settings)
        edit_tensors(adapter, lambda t: {k: v * 0.5 if "lora_B" in k else v for k, v in t.items()})
        edit_config(adapter, base_model_name_or_path=str(self.base))
        return adapter

    def export(self, adapter):
        """Write an adapter as slimtune writes it for llama.cpp."""
        out = self.folder / f"{adapter.name}-gguf"
        if not out.is_dir():
            export(adapter, "gguf", out, {}, verify=False)
        return out / "adapter.gguf"

    def convert(self, adapter):
        """Write an adapter as llama.cpp's own converter does."""
        out = self.folder / f"{adapter.name}.gguf"
        command = [sys.executable, str(CONVERTER), str(adapter), "--base", str(self.hf), "--outfile", str(out)]
        subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
        return out

    def write_base(self, change):
        """Write the base as a GGUF after a change of its model."""
        model = self.load_base()
        change(model)
        self.tokenizer.add_tokens(["Ġa", "Ġ1"])
        return write_gguf(self.folder / "changed.gguf", model, self.tokenizer)

    def edit_gguf(self, change, name="edited.gguf"):
        """Write the adapter's GGUF again, its tensors changed by `change(name, values)`, None: left out."""
        import gguf

        reader, out = gguf.GGUFReader(self.gguf), self.folder / name
        writer = gguf.GGUFWriter(str(out), "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        alpha = reader.fields["adapter.lora.alpha"].contents()
        writer.add_float32("adapter.lora.alpha", float(change("alpha", alpha)))
        for tensor in reader.tensors:
            values = change(tensor.name, tensor.data.copy())
            if values is not None:
                writer.add_tensor(tensor.name, values)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llama, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("llama-server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMTUNE_CACHE", str(folder / "cache"))
        yield Files(folder, tiny_llama, tiny_tokenizer)


def start_server(base, *adapters, scale=1.0, template=None):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(base), 1024, 1
    params.verbosity, params.warmup, params.fit_params = -1, False, False
    params.n_ctx_checkpoints = params.cache_ram_mib = 0
    if template is not None:
        params.chat_template = template
    loras = [xllamacpp.CommonAdapterLoraInfo() for _ in adapters]
    for lora, adapter in zip(loras, adapters, strict=True):
        lora.path, lora.scale = str(adapter), scale
    params.lora_adapters = loras
    return xllamacpp.Server(params)


def undo_row_order(name, values):
    """Rows of q and k as Hugging Face has them: tiny_llama has 4 heads of 8, 2 of them for keys."""
    heads = {"attn_q.weight.lora_b": 4, "attn_k.weight.lora_b": 2}
    for part, count in heads.items():
        if name.endswith(part):
            return values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return values


def without(*parts):
    return lambda name, values: None if any(part in name for part in parts) else values


def change_up_projection(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


LLAMA_CPP_FAULTS = {
    # verdict, where it was reported, which adapter is checked, how it is served
    "no-lora": ("not-applied", "ikawrakow/ik_llama.cpp#1986", lambda f: (f.adapter, start_server(f.base))),
    "scale-0": ("not-applied", "ggml-org/llama.cpp#8857", lambda f: (f.adapter, start_server(f.base, f.gguf, scale=0))),
    "scale-half": ("another-scale 0.5", "ggml-org/llama.cpp#10994",
        lambda f: (f.adapter, start_server(f.base, f.gguf, scale=0.5))),
    "alpha-unread": ("another-scale 0.25", "NVIDIA/TensorRT-LLM#1477",
        lambda f: (f.adapter, start_server(f.base, f.edit_gguf(lambda n, v: 0 if n == "alpha" else v)))),
    "two-adapters-at-once": ("another-adapter", "ggml-org/llama.cpp#28674",
        lambda f: (f.adapter, start_server(f.base, f.gguf, f.export(f.save("second", lora_alpha=8))))),
    "adapter-of-before": ("another-adapter", "vllm-project/vllm#42125",
        lambda f: (f.adapter, start_server(f.base, f.export(f.save("other", lora_alpha=16, r=3))))),
    "rows-not-permuted": ("another-adapter", "jzhang38/TinyLlama#24",
        lambda f: (f.adapter, start_server(f.base, f.edit_gguf(undo_row_order)))),
    "gate-and-up-fused": ("partly (gate_proj, up_proj)", "ikawrakow/ik_llama.cpp#1986",
        lambda f: (f.adapter, start_server(f.base, f.edit_gguf(without("ffn_gate", "ffn_up"))))),
    "last-layer-lost": ("partly (layer 1)", "huggingface/peft#453",
        lambda f: (f.adapter, start_server(f.base, f.edit_gguf(without("blk.1."))))),
    "another-base": ("another-base", "huggingface/peft#1932",
        lambda f: (f.adapter, start_server(f.write_base(change_up_projection), f.gguf))),
    "another-template": ("another-template", "ollama/ollama#6823",
        lambda f: (f.adapter, start_server(f.base, f.gguf, template="{{ messages[0]['content'] }}"))),
    "rslora-in-the-converter": ("another-scale 0.5", "NVIDIA/TensorRT-LLM#1668",
        lambda f: ((a := f.save("rslora", use_rslora=True)), start_server(f.base, f.convert(a)))),
    "pattern-in-the-converter": ("another-adapter", "huggingface/peft#1930",
        lambda f: ((a := f.save("pattern", alpha_pattern={"q_proj": 1, "down_proj": 64})),
                   start_server(f.base, f.convert(a)))),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_converter] * ("converter" in n)) for n in LLAMA_CPP_FAULTS]
)
def test_fault_is_named(files, name):
    cause, _, serve = LLAMA_CPP_FAULTS[name]
    adapter, server = serve(files)
    result = check_adapter(adapter, str(files.base), ServedPlace(server.listening_address, precision="f32"))
    assert (describe_verdict(result.checks[0]), result.passed) == (cause, False), result.checks[0]
    assert result.checks[0].evidence == "log-probabilities"


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}, "rank_pattern": {"up_proj": 2}},
     {"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"init_lora_weights": "pissa"}],
    ids=lambda s: "-".join(s),
)  # fmt: skip
def test_right_adapter_is_applied(files, settings):
    adapter = files.save("-".join(settings), **settings)
    server = start_server(files.base, files.export(adapter))
    result = check_adapter(adapter, str(files.base), ServedPlace(server.listening_address, precision="f32"))
    assert (result.checks[0].cause, result.passed) == ("applied", True), result.checks[0]


@needs_converter
def test_file_of_llama_cpps_own_converter_is_applied(files):
    server = start_server(files.base, files.convert(files.adapter))
    place = ServedPlace(server.listening_address, precision="f32")
    assert check_adapter(files.adapter, str(files.base), place).checks[0].cause == "applied"


def test_base_as_one_gguf(files):
    verdict = check_adapter(files.adapter, str(files.base), ServedPlace(gguf=files.base)).checks[0]
    assert verdict.cause == "not-applied"


def test_model_that_peft_merged_as_one_gguf(files):
    model = peft.PeftModel.from_pretrained(files.load_base(), files.adapter).merge_and_unload()
    merged = write_gguf(files.folder / "merged.gguf", model, files.tokenizer)
    verdict = check_adapter(files.adapter, str(files.base), ServedPlace(gguf=merged)).checks[0]
    assert verdict.cause == "applied", verdict
