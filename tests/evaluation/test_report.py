"""The page is valid and self-contained, shows every figure and every gap, and escapes every text of the run."""

import json
import math
import re
import shlex
from dataclasses import replace

import pytest
import typer
from full_run import estimate_resources, make_data_report, make_evaluation, make_full_run, make_result
from hand_run import make_run
from html_page import Page

from slimtune.cli import app
from slimtune.core.config import Recipe
from slimtune.core.foundation.files import read_json_object, write_json
from slimtune.core.training.run_dir import RunDir
from slimtune.evaluation.evaluate import evaluate
from slimtune.evaluation.run_report import (
    render_data_report_page,
    render_run_report_html,
    write_run_report_and_list_damage,
)

SECTIONS = ["samples", "evaluation", "training", "forgetting", "export", "data", "plan", "recipe", "details"]
HOSTILE = """<script>alert("x")</script><img src=x onerror='y'>&amp;"' onload=z {{ 7 * 7 }} </style></section>"""


def read_page(run: RunDir) -> Page:
    page = Page(render_run_report_html(run))
    assert page.errors == []
    return page


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return make_full_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def full_page(full_run):
    return read_page(full_run)


def test_page_is_valid_and_loads_nothing(full_run, full_page):
    text = render_run_report_html(full_run)
    assert not [mark for mark in ("://", "url(", "@import") if mark in text]
    assert [a["id"] for a in full_page.all("section")] == SECTIONS
    assert [a["href"] for a in full_page.all("a")] == [f"#{key}" for key in SECTIONS]
    assert not {t for t, _ in full_page.tags} & {"script", "link", "img", "iframe", "object", "form", "base"}
    attributes = {name for _, found in full_page.tags for name in found}
    assert not {a for a in attributes if a in ("src", "srcset", "action") or a.startswith("on")}
    assert all(a.get("role") == "img" and a.get("aria-label") for a in full_page.all("svg"))


def test_no_absolute_path(full_run, monkeypatch):
    text = render_run_report_html(full_run)
    assert str(full_run.path.parent) not in text
    assert "/data/" not in text
    full_run.result_file.write_text("{")
    assert str(full_run.path.parent) not in render_run_report_html(full_run), "nor does an error message"
    write_json(full_run.result_file, make_result(full_run.path))
    monkeypatch.chdir(full_run.path.parent.parent)
    assert f"slimtune verify {full_run.path.parent.name}/mine" in render_run_report_html(full_run), (
        "a path that works here"
    )


@pytest.mark.parametrize(
    ("section", "texts"),
    [
        ("recipe", ["smollm2-135m", "40 steps", "max_steps: 40", "rows.jsonl"]),
        ("plan", ["it fits", "1.6 GiB to 2.4 GiB", "2.0 GiB as planned", "504 as planned", "45 s to 1 min 7 s"]),
        ("data", ["errors", "781, 2 invalid; 3 longer than 200 tokens", "36,400", "56.3 %", "28.7 % fewer",
                  "line 17", "lines 4, 8", "near", "(44)", "prefix24 tokens"]),
        ("training", ["training", "validation", "Learning rate", "cosine", "Speed", "Gradient norm"]),
        ("evaluation", ["passed", "4.524 (4.380 to 4.660)", "−0.796 (−0.890 to −0.720)", "41.60 (37.00 to 47.00)",
                        "31.8", "+7.5 (6.1 to 9.0)", "+0.024 (−0.010 to 0.060)", "93 rows, 3,868 supervised tokens"]),
        ("samples", ["Define: word 5", "2 more", "ended : yes", "ended : no", "length: 44"]),
        ("forgetting", ["3.100 before, 3.143 after, over 20,111 tokens", "within the budget", "+0.043", "budget 0.10"]),
        ("details", ["adapted 210 modules", "after step 12 memory ran out", "2.13.0", "19,593,096 bytes"]),
    ],
)  # fmt: skip
def test_every_figure_is_shown(full_page, section, texts):
    shown = full_page.section(section)
    assert [t for t in texts if t not in shown] == []
    assert "slimtune eval" not in shown


def test_texts_and_names_are_escaped(tmp_path):
    harmless = read_page(make_full_run(tmp_path / "a", "x"))
    page = read_page(make_full_run(tmp_path / "b", HOSTILE))
    assert [(tag, list(a)) for tag, a in page.tags] == [(tag, list(a)) for tag, a in harmless.tags]
    assert sum(HOSTILE in text for text in page.texts) > 40
    name = "<b>\"x' onclick=y"
    run = make_full_run(tmp_path / name, "x")
    write_json(run.evaluation_file(f"data-{name}"), make_evaluation(run.path, "x"))
    page = read_page(run)
    assert not [a for _, found in page.tags for a in found if a.startswith("on")]
    assert f"Rows of the file {name}" in page.text


def test_gaps_name_a_command(tmp_path):
    recipe = Recipe.from_dict({"model": "m", "data": "/rows/d.jsonl", "output_dir": str(tmp_path / "mine")})
    page = read_page(RunDir.create(tmp_path / "mine", recipe))
    for section, line in {
        "plan": "not planned: slimtune plan mine/recipe.yaml",
        "data": "not validated: slimtune data d.jsonl --model m",
        "training": "no loss was logged: slimtune train mine/recipe.yaml --resume",
        "evaluation": "not measured: slimtune eval mine --split validation",
        "samples": "not generated: slimtune eval mine --split validation --generate 8",
        "forgetting": "not measured: slimtune eval mine --split validation",
        "details": "not finished: slimtune train mine/recipe.yaml --resume",
    }.items():
        assert line in page.section(section)


def test_missing_keys(tmp_path):
    run = make_full_run(tmp_path / "mine")
    optional = ("forgetting", "generations", "generation_summary", "win_rate", "tasks", "preference")
    old = {k: v for k, v in make_evaluation(run.path, "").items() if k not in optional}
    write_json(run.evaluation_file("test"), old)
    page = read_page(run)
    assert "4.524" in page.section("evaluation")
    assert "slimtune eval" in page.section("forgetting")
    assert "slimtune eval" in page.section("samples")
    write_json(run.evaluation_file("test"), {k: v for k, v in old.items() if k != "tuned_accuracy"})
    page = read_page(run)
    assert "eval-test.json" in page.text
    assert "slimtune eval" in page.section("evaluation")
    write_json(run.evaluation_file("test"), {"base_loss": None})
    write_json(run.data_file, {"train": {}, "validation": None})
    write_json(run.plan_file, {"plan": {}, "probe": {}})
    write_json(run.result_file, {"run": "x"})
    read_page(run)


def test_damaged_files(tmp_path):
    run = make_full_run(tmp_path / "mine")
    run.evaluation_file("test").write_text('{"base_loss": 4.')
    write_json(run.plan_file, [1])
    with run.metrics_file.open("a") as f:
        f.write("not json\n")
    page = read_page(run)
    assert len(page.all("p", "notice bad")) == 3
    for text in ("eval-test.json is damaged", "plan.json is damaged: it contains a list", "line 46: it is not JSON"):
        assert text in page.text
    assert "781" in page.section("data"), "the rest is shown"
    assert page.section("training")


def odd_values(values, odd):
    """Yield a copy of the values for each key at any depth, in which that key has an odd value."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values[:1]):
        copy = values.copy()
        copy[key] = odd
        yield copy
        if isinstance(value, dict | list):
            for inner in odd_values(value, odd):
                copy = values.copy()
                copy[key] = inner
                yield copy


ODD = [None, 3, -1.5, "x", [], [1], {}, {"a": 1}, True, 10**400, math.inf]


@pytest.mark.parametrize("name", ["plan.json", "result.json", "data.json", "eval-test.json"])
@pytest.mark.slow
def test_values_of_other_types(tmp_path, name):
    run = make_full_run(tmp_path / "mine")
    file, metrics = run.path / name, run.metrics_file.read_text()
    run.metrics_file.write_text("".join(metrics.splitlines(True)[-3:]))  # a short page is made sooner
    sound, damaged = read_json_object(file), 0
    for number, cases in enumerate(zip(*(odd_values(sound, odd) for odd in ODD), strict=True)):
        file.write_text(json.dumps(cases[number % len(ODD)]))
        page = read_page(run)
        damaged += len(page.all("p", "notice bad")) > 0
        assert [a["id"] for a in page.all("section")] == SECTIONS
    assert damaged, "something was said"


def test_damaged_values_are_named_and_the_rest_is_shown(tmp_path):
    run = make_full_run(tmp_path / "mine")
    write_json(run.evaluation_file("test"), make_evaluation(run.path, "") | {"generations": 5})
    page = read_page(run)
    assert re.search(r"eval-test\.json .*generations: .*\b5\b", page.text)
    assert "slimtune eval" in page.section("samples")
    assert "4.524" in page.section("evaluation")
    assert "adapted 210 modules" in page.section("details")


def test_the_page_begins_with_the_verdict(full_run, full_page):
    head = full_page.text[full_page.text.index("slimtune run") : full_page.text.index("Samples")]
    assert re.search(r"4\.52 → 3\.73 .*\b93\b", head)
    verdict = make_evaluation(full_run.path, "")["verdict"]
    assert all(text.strip() in head for text in (*verdict["reasons"], verdict["warning"]))
    assert next(a["id"] for a in full_page.all("section")) == "samples"


@pytest.mark.parametrize(
    ("evaluation", "text"),
    [
        ({"verdict": {"passed": False, "reasons": ["it forgets"]}}, "not passed loss 4.52"),
        ({"verdict": None}, "not proven no complete evaluation"),
        (
            {"data": "/data/rows.jsonl", "split": None},
            "not proven no complete evaluation on rows that were not trained",
        ),
        (None, "not proven no evaluation on held-out rows slimtune eval mine"),
    ],
)
def test_what_is_not_proven_is_not_passed(tmp_path, evaluation, text):
    run = make_full_run(tmp_path / "mine")
    run.evaluation_file("test").unlink()
    if evaluation is not None:
        write_json(run.evaluation_file("data-rows"), make_evaluation(run.path, "") | evaluation)
    assert text in read_page(run).text


def test_a_run_that_diverged_says_so(tmp_path):
    run = make_full_run(tmp_path / "mine")
    run.append_metrics({"event": "non-finite", "step": 12, "text": "step 12: NaN", "skipped": True})
    assert re.search("step 12: NaN; .*skipped", read_page(run).text)


def test_the_untrained_loss_is_marked(tmp_path):
    run = make_full_run(tmp_path / "mine")
    assert "4.719" in read_page(run).section("training")
    write_json(run.evaluation_file("validation"), make_evaluation(run.path, "") | {"base_loss": 4.4})
    page = read_page(run)
    assert "4.400" in page.section("training")
    assert "validation, step 0: 4.4" in page.section("training")


@pytest.mark.parametrize(
    ("setting", "shown"), [({}, True), ({"share_prefix": False}, False), ({"packing": False}, False)]
)
def test_tokens_that_packing_saves_are_shown_where_it_saves_them(tmp_path, setting, shown):
    run = make_full_run(tmp_path / "mine")
    recipe = run.load_recipe()
    run.recipe_file.write_text(replace(recipe, train=replace(recipe.train, **setting)).to_yaml())
    assert ("28.7 % fewer" in read_page(run).section("data")) == shown


def test_memory_bar(full_page):
    parts, plan = full_page.all("rect", "part")[:7], estimate_resources()["plan"]
    most = plan["need_bytes"]["high"]
    for part, size in zip(parts, plan["parts"].values(), strict=True):
        assert float(part["width"]) == pytest.approx(1000 * size / most, abs=0.1)
    ends = [float(p["x"]) + float(p["width"]) for p in parts]
    assert [float(p["x"]) for p in parts[1:]] == pytest.approx(ends[:-1], abs=0.2)
    assert float(full_page.all("line", "measured")[0]["x1"]) == pytest.approx(1000 * 2096062464 / most, abs=0.1)
    assert float(full_page.all("rect", "need")[0]["width"]) == pytest.approx(1000 * most / 23e9, abs=0.1)


def test_peak_against_the_plan(tmp_path):
    page = read_page(make_full_run(tmp_path / "cpu", peak_bytes=3_000_000_000))
    assert "2.8 GiB off" in page.section("plan")
    assert float(page.all("line", "measured")[0]["x1"]) == 1000
    page = read_page(make_full_run(tmp_path / "gpu", device="cuda:0", peak_bytes=1_300_000_000))
    assert "peak memory1.1 GiB1.2 GiB longest" in page.section("plan"), "on a GPU: of its tensors"


def test_data_report_page():
    text = render_data_report_page(make_data_report("/home/ada/train.jsonl", HOSTILE))
    page = Page(text)
    assert page.errors == []
    assert "/home" not in text
    for shown in ("train.jsonl", "errors", "781, 2 invalid", "line 17", "near duplicates", "supervised"):
        assert shown in page.text
    assert len(page.all("rect", "column")) == 10
    assert page.all("mark")


# --- exports ---------------------------------------------------------------------------------------------------------


LORA = {"base_kind": "gguf", "merged": True, "gguf": True, "vllm": True, "as_lora": True}
NEVER = {"base_kind": "gguf", "merged": False, "gguf": False, "vllm": False, "as_lora": False}


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (LORA, ["merge", "gguf", "ollama", "vllm", "push", "verify"]),
        (LORA | {"base_kind": "hub"}, ["merge", "gguf", "ollama", "vllm", "push", "verify"]),
        (LORA | {"base_kind": "folder", "gguf": False, "vllm": False},
         ["merge", "gguf --merged", "ollama", "vllm --convert-to-lora 64", "push", "verify"]),
        (NEVER, ["push"]),
    ],
    ids=["lora", "lora on a Hub base", "ia3", "prefix tuning"],
)  # fmt: skip
def test_supported_exports_parse(tmp_path, formats, expected):
    name = "my run; it's"
    page = read_page(make_full_run(tmp_path / name, export_formats=formats))
    commands = typer.main.get_command(app).commands
    lines = [shlex.split(x) for x in page.sections["export"].splitlines() if x.startswith("slimtune ")]
    found = []
    for _, command, *arguments in lines:
        parsed = commands[command]
        if build_command := getattr(parsed.callback, "build_command", None):  # `export`, whose formats add flags
            parsed = build_command(command, None)
        parsed.make_context(command, list(arguments))  # raises at an unknown option
        assert name in arguments
        to = arguments[arguments.index("--to") + 1] if command == "export" else command
        found.append(" ".join([to, *arguments[5:]]) if command == "export" else to)
    assert found[2:] == expected
    assert ("does not change weights" in page.section("export")) == (formats is NEVER)


def test_formats_not_recorded(tmp_path):
    page = read_page(make_full_run(tmp_path / "mine", export_formats=None))
    assert "slimtune methods lora" in page.section("export")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_eval_updates_the_page(tiny_folder, tmp_path):
    run = RunDir(make_run(tmp_path / "mine", tiny_folder))
    write_run_report_and_list_damage(run)
    assert "slimtune eval" in Page(run.report_file.read_text()).section("evaluation")
    result = evaluate(run.path)
    assert f"{result.measures.base_loss.value:.3f}" in Page(run.report_file.read_text()).section("evaluation")


def test_report_command(tmp_path, capsys):
    run = make_full_run(tmp_path / "mine")
    other = tmp_path / "other.html"
    for options, file in (([], run.report_file), (["--out", str(other)], other)):
        with pytest.raises(SystemExit) as e:
            app(args=["report", str(run.path), *options, "--json"])
        assert e.value.code == 0
        assert json.loads(capsys.readouterr().out) == {"run": str(run.path), "report": str(file), "damage": []}
        assert file.read_text() == render_run_report_html(run)
    for wrong in ([tmp_path], [run.path, "--out", tmp_path / "no/x.html"], [run.path, "--out", tmp_path]):
        with pytest.raises(SystemExit) as e:
            app(args=["report", *map(str, wrong)])
        assert e.value.code == 2


def test_reward_model_is_offered_what_it_can_do(tmp_path):
    run = make_full_run(tmp_path / "mine")
    for file in run.path.glob("eval-*.json"):
        file.unlink()
    recipe = {k: v for k, v in run.load_recipe().to_dict().items() if k != "task"}
    run.recipe_file.write_text(Recipe.from_dict({**recipe, "task": "reward"}).to_yaml())
    text = render_run_report_html(run)
    words = ("predict", "merge", "push", "chat", "generate", "export", "verify", "vllm serve")
    assert [word for word in words if f"slimtune {word} " in text or f"\n{word} " in text] == list(words[:3])
    assert "reward, center_rewards_coefficient" not in text  # it is not set


def test_run_with_rewards_shows_its_evaluation(tmp_path):
    run = make_full_run(tmp_path / "mine")
    for file in run.path.glob("eval-*.json"):
        file.unlink()
    recipe = {k: v for k, v in run.load_recipe().to_dict().items() if k != "task"}
    task = {"name": "grpo", "rewards": [f"{tmp_path}/rewards.py:short"]}
    (tmp_path / "rewards.py").write_text("def short(completions, **_): ...")
    run.recipe_file.write_text(Recipe.from_dict({**recipe, "task": task}).to_yaml())
    assert "--generate" not in read_page(run).section("samples"), "eval samples by itself"
    estimates = {"base_reward": 0.25, "tuned_reward": 0.75, "reward_gain": 0.5}
    estimates |= {"base_best_reward": 0.5, "tuned_best_reward": 1.0, "best_reward_gain": 0.5}
    values = estimates | {f"{name}_ci95": [value - 0.1, value + 0.1] for name, value in estimates.items()}
    values |= {"answers": 4, "rewards": ["short"], "base_length": 18.0, "tuned_length": 7.0, "probes": []}
    kept = ("run", "split", "data", "training_rows", "rows", "improved", "verdict", "dropped", "truncated", "seconds")
    former = make_evaluation(run.path, "")
    values |= {name: former[name] for name in (*kept, "dtype", "quantization", "forgetting", "different_rows")}
    write_json(run.evaluation_file("test"), {"task": "grpo", **values})
    page = read_page(run)
    assert "reward 0.25 → 0.75 mean of 4 answers" in page.text
    assert "not proven" not in page.text
    assert "18 tokens on average from the base, 7 from the tuned model" in page.section("evaluation")
    assert str(tmp_path) not in page.text
