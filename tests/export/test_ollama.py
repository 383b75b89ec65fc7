"""The folder that Ollama builds from: its Modelfile, the template and the BOS in it, and what is refused."""

import json
import shlex
import sys
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

from slimtune.errors import ModelError, UsageError
from slimtune.export.engines import LlamaCppEngine, is_llama_cpp_installed
from slimtune.export.ollama import engine_adds_bos, format_modelfile, write_ollama

sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_gguf import write_gguf


def config(**settings):
    text = SimpleNamespace(**{"max_position_embeddings": 8192, "eos_token_id": 2, **settings})
    return SimpleNamespace(get_text_config=lambda: text)


def gguf_file(path: Path, add_bos: bool | None = None) -> Path:
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_folder(path: Path, **tokenizer_config) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.fixture
def export(tmp_path):
    """Write into a folder with an adapter; `export(base)` returns what was written and the Modelfile's lines."""
    folder = tmp_path / "an export"
    adapter = gguf_file(folder / "adapter.gguf")

    def make(base, name="smollm2", linted=True, **more):
        given = {"adapter": adapter, "tokenizer": TOKENIZERS[name], "config": config(), "name": "devil", **more}
        made = write_ollama(folder, base=str(base), **given)
        file = folder / "Modelfile"
        if linted:
            found = lint(file, estimate_resources=False)
            # It looks for {{ .Prompt }}, the older way; this TEMPLATE goes over .Messages.
            assert found.ok
            assert [str(i) for i in found.issues if i.code != "TPL004"] == []
        return made, read_modelfile(file.read_bytes().decode())

    make.folder = folder
    return make


def test_a_gguf_and_an_adapter(export, tmp_path):
    base = gguf_file(tmp_path / "base.gguf", add_bos=False)
    made, lines = export(base, system='Be "brief".\nAlways.', max_seq_len=512)
    assert lines == [
        ("FROM", str(base)),
        ("ADAPTER", "./adapter.gguf"),
        ("TEMPLATE", made["template"]),
        ("SYSTEM", 'Be "brief".\nAlways.'),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", TOKENIZERS["smollm2"].convert_ids_to_tokens(2)),
        ("PARAMETER num_ctx", "4096"),
    ]
    assert made["notes"] == []
    assert shlex.split(made["commands"][0]) == ["ollama", "create", "devil", "-f", str(export.folder / "Modelfile")]
    assert made["commands"][1] == "ollama run devil"
    messages = [{"role": "user", "content": "Hi."}]
    wanted = TOKENIZERS["smollm2"].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered([{"Template": dict(lines)["TEMPLATE"], "Messages": messages}])[0]["Text"] == wanted


def test_a_library_name_keeps_its_own_template(export):
    for base in ("smollm2:135m", "llama3.1", "hf.co/someone/Some-Model-GGUF:Q4_K_M"):
        made, lines = export(base, system="Be brief.")
        assert lines[0] == ("FROM", base)
        assert [name for name, _ in lines] == ["FROM", "ADAPTER", "SYSTEM", "PARAMETER num_ctx"]
        assert (made["template"], made["stops"]) == (None, [])
        assert f"{base} keeps its own TEMPLATE" in made["notes"][0]


def test_a_merged_folder(export, tmp_path):
    base = hf_folder(tmp_path / "merged")
    _, lines = export(base, adapter=None)
    assert lines[0] == ("FROM", str(base))
    assert "ADAPTER" not in dict(lines)


def test_files_in_the_export_have_relative_paths(export):
    gguf_file(export.folder / "model.gguf")
    _, lines = export(export.folder / "model.gguf", adapter=None)
    assert lines[0] == ("FROM", "./model.gguf")


def test_the_linter_finds_faults(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM ./none.gguf\nPARAMETER temprature 1\n")
    assert len(lint(tmp_path / "Modelfile").errors) == 2


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_one_beginning_of_sequence_token(export, tmp_path, kind, add):
    if kind == "gguf":
        base = gguf_file(tmp_path / "base.gguf", add_bos=add)
    else:
        base = hf_folder(tmp_path / "merged", **({"add_bos_token": True} if add else {}))
    made, _ = export(base, "llama3")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    text = rendered([{"Template": made["template"], "Messages": messages}])[0]["Text"]
    wanted = TOKENIZERS["llama3"].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ("<|begin_of_text|>" if add else "") + text == wanted
    assert wanted.count("<|begin_of_text|>") == 1


@pytest.mark.parametrize("add", [True, False])
def test_llama_cpp_makes_the_training_tokens(export, tmp_path, monkeypatch, tiny_llama, tiny_tokenizer, add):
    """Ollama's engine itself: the ids of the prompt, its first token included, are those of training."""
    import gguf

    if not is_llama_cpp_installed():
        pytest.skip("no llama.cpp here: pip install xllamacpp")

    class Writer(gguf.GGUFWriter):
        def add_add_bos_token(self, value):
            super().add_add_bos_token(add)

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    tokenizer = tiny_tokenizer(bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    base = write_gguf(tmp_path / "base.gguf", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    made, _ = export(base, tokenizer=tokenizer)
    chat = [{"role": r, "content": f"{r} says\n“ä”."} for r in ("system", "user", "assistant", "user")]
    text = rendered([{"Template": made["template"], "Messages": chat}])[0]["Text"]
    engine = LlamaCppEngine(base, max_tokens=64, threads=1)
    try:
        ids = engine.tokenize(text)
    finally:
        engine.close()
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_tokenizer_decides_if_a_gguf_does_not_say(tmp_path, tiny_tokenizer):
    base = gguf_file(tmp_path / "base.gguf")
    tokenizer = tiny_tokenizer()
    assert not engine_adds_bos(base, tokenizer)
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert engine_adds_bos(base, tokenizer)


HOSTILE = ["a b", 'a"b', "a'b", "$(touch x)", "a\nFROM evil", "@sha256", "~", "-f", "#x", "`x`", 'ends in quote"']


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_paths_are_quoted(tmp_path, part):
    base = gguf_file(tmp_path / part / "base.gguf")
    folder = tmp_path / "out" / part
    folder.mkdir(parents=True)
    given = {"adapter": None, "tokenizer": TOKENIZERS["smollm2"], "config": config(), "name": "x"}
    made = write_ollama(folder, base=str(base), **given)
    lines = read_modelfile((folder / "Modelfile").read_bytes().decode())
    assert lines[0] == ("FROM", str(base))
    assert sum(name == "FROM" for name, _ in lines) == 1
    assert shlex.split(made["commands"][0])[-1] == str(folder / "Modelfile")


def test_a_path_that_cannot_be_quoted_is_refused(tmp_path):
    base = gguf_file(tmp_path / 'a"\nFROM evil' / 'b"""\n' / "base.gguf")
    given = {"adapter": None, "tokenizer": TOKENIZERS["smollm2"], "config": config(), "name": "x"}
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="FROM cannot be quoted in a Modelfile"):
        write_ollama(tmp_path / "out", base=str(base), **given)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_out_that_looks_like_a_flag(export):
    made, _ = export("smollm2", out=Path("-rf/it"))
    assert made["commands"][0] == "ollama create devil -f ./-rf/it/Modelfile"


def test_the_window(export):
    assert export("smollm2")[0]["num_ctx"] == 4096
    assert export("smollm2", max_seq_len=6000)[0]["num_ctx"] == 6000
    assert export("smollm2", max_seq_len=9000)[0]["num_ctx"] == 8192
    assert export("smollm2", config=config(max_position_embeddings=1024))[0]["num_ctx"] == 1024
    assert export("smollm2", num_ctx=256)[1][-1] == ("PARAMETER num_ctx", "256")
    assert export("smollm2", config=SimpleNamespace(get_text_config=SimpleNamespace))[0]["num_ctx"] == 4096
    for wrong in (0, 8193):
        with pytest.raises(UsageError, match=f"a window of {wrong} tokens"):
            export("smollm2", num_ctx=wrong)


def test_stop_tokens_are_the_templates_and_the_models(export, tmp_path):
    base = gguf_file(tmp_path / "base.gguf", add_bos=True)
    tokenizer = TOKENIZERS["llama3"]
    ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_header_id|>"])
    assert export(base, "llama3", config=config(eos_token_id=ids))[0]["stops"] == ["<|eot_id|>", "<|end_header_id|>"]
    assert export(base, "llama3", config=config(eos_token_id=None))[0]["stops"] == ["<|eot_id|>"]


def test_an_unsupported_template_is_left_out_with_a_note(export, tmp_path):
    base = gguf_file(tmp_path / "base.gguf")
    odd = make_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ["<s>", "</s>"])
    made, lines = export(base, tokenizer=odd, system="Be brief.", linted=False)
    assert [name for name, _ in lines][:3] == ["FROM", "ADAPTER", "SYSTEM"]
    assert "no TEMPLATE is written" in made["notes"][0]
    assert [i.code for i in lint(export.folder / "Modelfile").issues if "TEMPLATE" in i.message]


REFUSED = {
    "invalid name": ({"name": "my model"}, "Ollama does not accept the name 'my model'"),
    "a flag for a name": ({"name": "-rf"}, "does not accept the name"),
    "a name with a line end": ({"name": "x\nFROM y"}, "does not accept the name"),
    "no such file": ({"base": "./none.gguf"}, "the base './none.gguf' does not exist"),
    "nothing": ({"base": ""}, "the base '' does not exist"),
    "an instruction": ({"base": "x\nADAPTER y"}, "does not exist"),
    "no system prompt": ({"system": " "}, "the system prompt is empty"),
    "a no-break space": ({"system": "a\u00a0b"}, "SYSTEM contains characters that Ollama drops"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, given, message):
    usual = {"base": "smollm2", "adapter": None, "tokenizer": None, "config": config(), "name": "x"}
    with pytest.raises(UsageError) as error:
        write_ollama(tmp_path, **{**usual, **given})
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_bases(export, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(UsageError, match="Ollama cannot read the folder"):
        export(tmp_path / "empty")
    with pytest.raises(UsageError, match="is not a GGUF file"):
        export(tmp_path / "text.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file(tmp_path / "whole.gguf", add_bos=True).read_bytes()[:30])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        export(cut)
    (tmp_path / "linked").mkdir()
    for file in hf_folder(tmp_path / "merged").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with pytest.raises(UsageError, match="links to files elsewhere"):
        export(tmp_path / "linked")


@pytest.mark.real
def test_smollm2s_own_file(export):
    """The file says that no token is put before a prompt; the text is the chat template's to the last character."""
    from slimtune.models.loader import load_tokenizer
    from slimtune.models.registry import load_config, resolve_model

    base = resolve_model("smollm2-135m")
    tokenizer, model = load_tokenizer(base.spec), load_config(base.spec)
    made, lines = export(base.path, tokenizer=tokenizer, config=model)
    assert not engine_adds_bos(Path(base.path), tokenizer)
    assert made["stops"] == ["<|im_end|>"]
    chat = [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(["system", "user", "assistant", "user"])]
    for messages in (chat, chat[1:], chat[:2], chat[3:]):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered([{"Template": dict(lines)["TEMPLATE"], "Messages": messages}])[0]["Text"] == wanted


def test_a_system_prompt_for_a_template_without_one(export, tmp_path):
    base = gguf_file(tmp_path / "base.gguf", add_bos=True)
    with pytest.raises(UsageError, match="takes no system prompt"):
        export(base, "gemma", system="Be brief.")
    made, _ = export(base, "gemma")
    assert "refuses system messages" in made["notes"][0]


# --- Modelfile: values are read back as they were, and none becomes an instruction -----------------------------------


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


def test_values_look_as_a_person_would_write_them():
    assert written("SYSTEM", "Be brief.") == 'SYSTEM """Be brief."""\n'
    assert written("PARAMETER stop", "<|im_end|>") == 'PARAMETER stop "<|im_end|>"\n'
    assert written("ADAPTER", "./my adapter.gguf") == "ADAPTER ./my adapter.gguf\n"
    assert written("FROM", "/a\n/b") == 'FROM "/a\n/b"\n'


@pytest.mark.parametrize("value", ['a"""\nFROM evil', '"""\nFROM evil\n', 'x"\ny"""\nADAPTER ./evil\n'])
def test_a_value_that_would_end_early_is_refused(value):
    with pytest.raises(UsageError, match="SYSTEM cannot be quoted in a Modelfile"):
        written("SYSTEM", value)


@pytest.mark.parametrize(("char", "name"), [("\u00a0", "U\\+00A0"), ("\u200d", "U\\+200D"), ("\x00", "U\\+0000")])
def test_characters_that_ollama_drops_are_refused(char, name):
    with pytest.raises(UsageError, match=f"FROM contains characters that Ollama drops from a Modelfile: '{name}'"):
        written("FROM", f"a{char}b")


EVIL = [
    '"',
    '"""',
    "\n",
    "\r",
    " ",
    "#",
    "FROM evil",
    'PARAMETER stop "a"',
    "ADAPTER ./x",
    "é",
    "@",
    "\\",
    "'",
    "\u00a0",
]


@given(values=st.lists(st.lists(st.sampled_from(EVIL), max_size=9).map("".join), min_size=3, max_size=3))
def test_nothing_is_injected(values):
    lines = list(zip(["FROM", "SYSTEM", "PARAMETER stop"], values, strict=True))
    try:
        text = format_modelfile(lines)
    except UsageError:
        return
    assert read_modelfile(text) == lines
