"""A real llama.cpp server, asked over HTTP as `llama-server` is."""

import importlib.util

import pytest
import transformers
from faulty_adapters import edit_config, edit_tensors, save_adapter
from tiny_gguf import write_tiny_base

from slimtune.export.exporter import export
from slimtune.export.verify import ServedPlace, check_adapter
from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base as a GGUF file, an adapter of PEFT, and the adapter as a GGUF file."""
    folder = tmp_path_factory.mktemp("llama-server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMTUNE_CACHE", str(folder / "cache"))
        gguf = write_tiny_base(folder / "base.gguf", tiny_llama, tiny_tokenizer, initializer_range=0.2)
        base = transformers.AutoModelForCausalLM.from_pretrained(get_or_make_hf_folder_and_seconds(gguf)[0])
        base.name_or_path = str(gguf)
        adapter = save_adapter(base, folder / "adapter", lora_alpha=16)
        edit_tensors(adapter, lambda t: {k: v * 0.5 if "lora_B" in k else v for k, v in t.items()})
        edit_config(adapter, base_model_name_or_path=str(gguf))
        export(adapter, "gguf", folder / "gguf", {}, verify=False)
        yield gguf, adapter, folder / "gguf" / "adapter.gguf"


def start_server(base, adapter, scale):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(base), 1024, 1
    params.verbosity, params.warmup, params.fit_params = -1, False, False
    params.n_ctx_checkpoints = params.cache_ram_mib = 0
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), scale
        params.lora_adapters = [lora]
    return xllamacpp.Server(params)


@pytest.mark.parametrize(
    ("adapter", "scale", "cause"),
    [(True, 1.0, "applied"), (True, 0.5, "another-scale"), (True, 0.0, "not-applied"), (False, 1.0, "not-applied")],
)
def test_verdict(files, adapter, scale, cause):
    base, folder, adapter_gguf = files
    server = start_server(base, adapter_gguf if adapter else None, scale)
    place = ServedPlace(server.listening_address, precision="f32")
    result = check_adapter(folder, str(base), place)
    assert (result.checks[0].cause, result.checks[0].evidence) == (cause, "log-probabilities"), result.checks[0]
    if cause == "another-scale":
        assert result.checks[0].scale == pytest.approx(scale, rel=0.05)


def test_base_as_one_gguf(files):
    base, folder, _ = files
    assert check_adapter(folder, str(base), ServedPlace(gguf=base)).checks[0].cause == "not-applied"
