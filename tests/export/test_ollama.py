"""The folder that Ollama builds from: its Modelfile, the template and the first token in it, and what is refused."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from chatml import CHATML
from go_engine import rendered
from hypothesis import given
from hypothesis import strategies as st
from modelfile_reader import read_modelfile
from owist_modelfile_lint import lint
from real_templates import TOKENIZERS, make_tokenizer
from tiny_gguf import finish_gguf, write_gguf

from slimtune.errors import ModelError, UsageError
from slimtune.export.ollama import format_modelfile, ollama_adds_bos, write_modelfile
from slimtune.generation.inference_engines import InProcessLlamaCppEngine, is_xllamacpp_installed


def config(**settings):
    text = SimpleNamespace(**{"max_position_embeddings": 8192, "eos_token_id": 2, **settings})
    return SimpleNamespace(get_text_config=lambda: text)


def gguf_file(path: Path, add_bos: bool | None = None) -> Path:
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    finish_gguf(writer)
    return path


def hf_folder(path: Path, **tokenizer_config) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.fixture
def base(tmp_path):
    return gguf_file(tmp_path / "base.gguf", add_bos=False)


@pytest.fixture
def export(tmp_path):
    """Write into a folder with an adapter; `export(base)` returns what was written and the Modelfile's lines."""
    folder = tmp_path / "an export"
    adapter = gguf_file(folder / "adapter.gguf")

    def make(base, name="smollm2", *, linted=True, **options):
        given = {"adapter_gguf": adapter, "tokenizer": TOKENIZERS[name], "config": config(), "name": "devil", **options}
        facts = write_modelfile(folder, base_name_or_path=str(base), **given)
        if linted:
            found = lint(folder / "Modelfile", estimate_resources=False)
            # It looks for {{ .Prompt }}, the older way; this TEMPLATE goes over .Messages.
            assert found.ok
            assert [str(i) for i in found.issues if i.code != "TPL004"] == []
        return facts, read_modelfile((folder / "Modelfile").read_bytes().decode())

    make.folder = folder
    return make


def go_text(template, messages):
    return rendered([{"Template": template, "Messages": messages}])[0]["Text"]


def jinja_text(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- the Modelfile ---------------------------------------------------------------------------------------------------


def test_gguf_and_adapter(export, base):
    facts, lines = export(base, system='Be "brief".\nAlways.', max_seq_len=512)
    assert lines == [
        ("FROM", str(base)),
        ("ADAPTER", "./adapter.gguf"),
        ("TEMPLATE", facts.template),
        ("SYSTEM", 'Be "brief".\nAlways.'),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", TOKENIZERS["smollm2"].convert_ids_to_tokens(2)),
        ("PARAMETER num_ctx", "4096"),
    ]
    assert len(facts.notes) == 1
    assert shlex.split(facts.commands[0]) == ["ollama", "create", "devil", "-f", str(export.folder / "Modelfile")]
    assert facts.commands[1] == "ollama run devil"
    messages = [{"role": "user", "content": "Hi."}]
    assert go_text(facts.template, messages) == jinja_text(TOKENIZERS["smollm2"], messages)


@pytest.mark.parametrize("name", ["smollm2:135m", "llama3.1", "hf.co/someone/Some-Model-GGUF:Q4_K_M"])
def test_library_name_keeps_its_own_template(export, name):
    facts, lines = export(name, system="Be brief.")
    assert lines[0] == ("FROM", name)
    assert [name for name, _ in lines] == ["FROM", "ADAPTER", "SYSTEM", "PARAMETER num_ctx"]
    assert (facts.template, facts.stops) == (None, [])
    assert name in facts.notes[0]


def test_merged_base(export, tmp_path):
    folder = hf_folder(tmp_path / "merged")
    assert export(folder, adapter_gguf=None)[1][0] == ("FROM", str(folder))
    gguf_file(export.folder / "model.gguf")
    _, lines = export(export.folder / "model.gguf", adapter_gguf=None)
    assert lines[0] == ("FROM", "./model.gguf"), "files in the export have relative paths"
    assert "ADAPTER" not in dict(lines)


def test_window(export):
    def window(**options):
        return export("smollm2", **options)[0].num_ctx

    assert window() == 4096
    assert window(max_seq_len=6000) == 6000
    assert window(max_seq_len=9000) == 8192
    assert window(config=config(max_position_embeddings=1024)) == 1024
    assert window(num_ctx=256) == 256
    assert window(config=SimpleNamespace(get_text_config=SimpleNamespace)) == 4096
    for wrong in (0, 8193):
        with pytest.raises(UsageError, match=rf"\b{wrong} tokens"):
            window(num_ctx=wrong)


def test_stop_tokens(export, base):
    ids = TOKENIZERS["llama3"].convert_tokens_to_ids(["<|eot_id|>", "<|end_header_id|>"])
    for eos, expected in ((ids, ["<|eot_id|>", "<|end_header_id|>"]), (None, ["<|eot_id|>"])):
        assert export(base, "llama3", config=config(eos_token_id=eos))[0].stops == expected


def test_unsupported_template(export, base):
    odd = make_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ["<s>", "</s>"])
    facts, lines = export(base, tokenizer=odd, system="Be brief.", linted=False)
    assert [name for name, _ in lines][:3] == ["FROM", "ADAPTER", "SYSTEM"]
    assert "TEMPLATE" in facts.notes[0]
    assert [i.code for i in lint(export.folder / "Modelfile").issues if "TEMPLATE" in i.message]


def test_template_without_system_prompt(export, base):
    with pytest.raises(UsageError, match=r"(?s)--system"):
        export(base, "gemma", system="Be brief.")
    assert "system" in export(base, "gemma")[0].notes[0]


# --- the beginning-of-sequence token ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_one_beginning_of_sequence_token(export, tmp_path, kind, add):
    base = gguf_file(tmp_path / "b.gguf", add) if kind == "gguf" else hf_folder(tmp_path / "m", add_bos_token=add)
    facts, _ = export(base, "llama3")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    expected = jinja_text(TOKENIZERS["llama3"], messages)
    assert ("<|begin_of_text|>" if add else "") + go_text(facts.template, messages) == expected
    assert expected.count("<|begin_of_text|>") == 1


@pytest.mark.slow
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.skipif(not is_xllamacpp_installed(), reason="xllamacpp is not installed")
def test_llama_cpp_makes_the_training_tokens(export, tmp_path, monkeypatch, tiny_llama, tiny_tokenizer, add):
    """Ollama's engine itself: the ids of the prompt, its first token included, are those of training."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_add_bos_token(self, value):
            super().add_add_bos_token(add)

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    tokenizer = tiny_tokenizer(bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    base = write_gguf(tmp_path / "base.gguf", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    chat = [{"role": r, "content": f"{r} says\n“ä”."} for r in ("system", "user", "assistant", "user")]
    engine = InProcessLlamaCppEngine(base, max_tokens=64, threads=1)
    try:
        ids = engine.tokenize(go_text(export(base, tokenizer=tokenizer)[0].template, chat))
    finally:
        engine.close()
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_tokenizer_decides_if_a_gguf_does_not_say(tmp_path, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    base, tokenizer = gguf_file(tmp_path / "base.gguf"), tiny_tokenizer()
    assert not ollama_adds_bos(base, tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert ollama_adds_bos(base, tokenizer)


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "Ollama does not accept the name 'my model'": {"name": "my model"},
    "does not accept the name '-rf'": {"name": "-rf"},
    "does not accept the name 'x\\nFROM y'": {"name": "x\nFROM y"},
    "the base './none.gguf' does not exist": {"base_name_or_path": "./none.gguf"},
    "the base '' does not exist": {"base_name_or_path": ""},
    "the base 'x\\nADAPTER y' does not exist": {"base_name_or_path": "x\nADAPTER y"},
    "the system prompt is empty": {"system": " "},
    "SYSTEM contains characters that Ollama drops": {"system": "a\u00a0b"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(tmp_path, message):
    usual = {"base_name_or_path": "smollm2", "adapter_gguf": None, "tokenizer": None, "config": config(), "name": "x"}
    with pytest.raises(UsageError) as error:
        write_modelfile(tmp_path, **{**usual, **REFUSED[message]})
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "refused"), [("0.34.0", False), ("0.34.1", True), ("1.0.0", True)])
def test_adapter_line_and_the_installed_ollama(export, base, tmp_path, monkeypatch, version, refused):
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'ollama version is {version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    if refused:
        with pytest.raises(UsageError, match=f"Ollama {version} .*ADAPTER"):
            export(base)
    else:
        assert "0.34.1" in export(base)[0].notes[-1]


def test_unreadable_bases(export, base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no")
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[:30])
    (tmp_path / "linked").mkdir()
    for file in hf_folder(tmp_path / "merged").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    for name, message in {
        "empty": "Ollama cannot read the folder",
        "text.gguf": "is not a GGUF file",
        "cut.gguf": r"cut\.gguf",
        "linked": "links to files elsewhere",
    }.items():
        with pytest.raises((UsageError, ModelError), match=message):
            export(tmp_path / name)


# --- values are read back as they were, and none becomes an instruction ----------------------------------------------


@pytest.mark.parametrize("part", ["a b", 'a"b', "a'b", "a\nFROM evil", "~", "-f", "#x", 'ends in quote"'])
def test_hostile_paths(tmp_path, part):
    base, folder = gguf_file(tmp_path / part / "base.gguf"), tmp_path / "out" / part
    folder.mkdir(parents=True)
    given = {"adapter_gguf": None, "tokenizer": TOKENIZERS["smollm2"], "config": config(), "name": "x"}
    facts = write_modelfile(folder, base_name_or_path=str(base), **given)
    lines = read_modelfile((folder / "Modelfile").read_bytes().decode())
    assert lines[0] == ("FROM", str(base))
    assert sum(name == "FROM" for name, _ in lines) == 1
    assert shlex.split(facts.commands[0])[-1] == str(folder / "Modelfile")


def test_out_that_looks_like_a_flag(export):
    facts, _ = export("smollm2", final_path=Path("-rf/it"))
    assert facts.commands[0] == "ollama create devil -f ./-rf/it/Modelfile"


def written(name: str, value: str) -> str:
    lines = [("FROM", "base"), (name, value), ("PARAMETER num_ctx", "4096")]
    text = format_modelfile(lines)
    assert read_modelfile(text) == lines
    return text.split("\n", 1)[1].removesuffix("PARAMETER num_ctx 4096\n")


VALUES = ["plain", "two words", " blanks at the ends ", 'a "quoted" word', '"', '""', '"""', 'ends in "', '"begins', ""]
VALUES += ["@x", "#x", "it's", "a\nFROM evil\nb", 'a"\nFROM evil', 'say """x""" y\nz', "\n", "\\n", "C:\\x", "a\r\nb"]


@pytest.mark.parametrize("name", ["SYSTEM", "TEMPLATE", "FROM", "ADAPTER", "PARAMETER stop"])
def test_values_are_read_back(name):
    for value in VALUES:
        written(name, value)


@pytest.mark.parametrize("value", ['a"""\nFROM evil', '"""\nFROM evil\n', 'x"\ny"""\nADAPTER ./evil\n'])
def test_values_that_would_end_early(value):
    with pytest.raises(UsageError, match="SYSTEM"):
        written("SYSTEM", value)


@pytest.mark.parametrize(("char", "name"), [("\u00a0", "U\\+00A0"), ("\u200d", "U\\+200D"), ("\x00", "U\\+0000")])
def test_characters_that_ollama_drops(char, name):
    with pytest.raises(UsageError, match=f"FROM .*'{name}'"):
        written("FROM", f"a{char}b")


EVIL = ['"', '"""', "\n", "\r", " ", "#", "FROM evil", "ADAPTER ./x", "é", "@", "\\", "'", "\u00a0"]
EVIL += ['PARAMETER stop "a"']


@given(values=st.lists(st.lists(st.sampled_from(EVIL), max_size=9).map("".join), min_size=3, max_size=3))
def test_nothing_is_injected(values):
    lines = list(zip(["FROM", "SYSTEM", "PARAMETER stop"], values, strict=True))
    try:
        text = format_modelfile(lines)
    except UsageError:
        return
    assert read_modelfile(text) == lines
