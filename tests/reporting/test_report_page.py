"""The page is whole, stands alone, says every figure and every gap, and nothing of a run's breaks out of it."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from full_run import evaluation_of, full_run, plan_of, result_of, write
from hand_run import make_run
from reading import Page

from slimtune.cli import app
from slimtune.config import Recipe
from slimtune.evaluation.evaluate import evaluate
from slimtune.reporting import render_page, write_report
from slimtune.run_dir import RunDir

SECTIONS = ["asked", "planned", "rows", "course", "compared", "samples", "forgetting", "shipping", "made"]
HOSTILE = """<script>alert("x")</script><img src=x onerror='y'>&amp;"' onload=z {{ 7 * 7 }} </style></section>"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    text = render_page(full_run(tmp_path_factory.mktemp("runs") / "mine"))
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    return Page(text)


@pytest.fixture
def bare(tmp_path):
    recipe = Recipe.from_dict({"model": "m", "data": "/d.jsonl", "output_dir": str(tmp_path / "mine")})
    return RunDir.create(tmp_path / "mine", recipe)


def test_it_is_whole_and_stands_alone(whole):
    assert whole.faults == []
    assert [a["id"] for a in whole.all("section")] == SECTIONS
    assert [a["href"] for a in whole.all("a")] == [f"#{key}" for key in SECTIONS]
    assert not {t for t, _ in whole.tags} & {"script", "link", "img", "iframe", "object", "form", "base"}
    attributes = {name for _, found in whole.tags for name in found}
    assert not {a for a in attributes if a in ("src", "srcset", "action") or a.startswith("on")}
    assert all(a.get("role") == "img" and a.get("aria-label") for a in whole.all("svg"))


def test_every_figure_is_said(whole):
    said = {key: " ".join(text.split()) for key, text in whole.of.items()}
    for key, texts in {
        "asked": ["smollm2-135m", "40 steps", "max_steps: 40"],
        "planned": ["it fits", "1.6 GiB to 2.4 GiB", "2.0 GiB as planned", "504 as planned", "45 s to 1 min 7 s"],
        "rows": ["faulty", "781, 2 refused; 3 longer than 200 tokens", "36,400 (56.3 %)", "28.7 % saved", "line 17",
                 "lines 4, 8", "near", "(44)", "24 tokens alike"],
        "course": ["training", "validation", "Learning rate", "cosine", "Speed", "Gradient norm"],
        "compared": ["passed", "4.524 (4.380 to 4.660)", "+0.796 (0.720 to 0.890)", "41.60 (37.00 to 47.00)", "31.8",
                     "+0.024 (−0.010 to 0.060)",
                     "+7.5 (6.1 to 9.0)", "93 rows, 3,868 learned tokens"],
        "samples": ["Define: word 5", "2 more", "ended : yes", "ended : no", "length: 44"],
        "forgetting": ["3.100 before, 3.143 after, over 20,111 tokens", "within the budget", "+0.043", "budget 0.10"],
        "shipping": ["slimtune verify"],
        "made": ["adapted 210 modules", "after step 12 memory ran out", "2.13.0", "19,593,096 bytes"],
    }.items():  # fmt: skip
        for text in texts:
            assert text in said[key], (key, text, said[key])
    assert "not measured" not in " ".join(said.values())


def test_nothing_of_a_run_breaks_out(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tame = Page(render_page(full_run(tmp_path / "a" / "mine", "x")))
    page = Page(render_page(full_run(tmp_path / "b" / "mine", HOSTILE)))
    assert page.faults == []
    assert page.shape == tame.shape
    assert sum(HOSTILE in text for text in page.texts) > 40
    assert [a["class"] for a in page.all("rect", "part")] == [a["class"] for a in tame.all("rect", "part")]


def test_names_of_files_and_folders_do_not_break_out(tmp_path):
    name = "<b>\"x' onclick=y"
    run = full_run(tmp_path / name, "x")
    write(run.path / f"eval-data-{name}.json", evaluation_of(run.path, "x"))
    page = Page(render_page(run))
    assert page.faults == []
    assert "b" not in {t for t, a in page.tags if a}
    assert not [a for _, found in page.tags for a in found if a.startswith("on")]
    assert any(f"rows of {name}" in text.lower() for text in page.texts)


def test_a_gap_names_the_command_that_fills_it(bare, tmp_path):
    page = Page(render_page(bare))
    assert page.faults == []
    assert [a["id"] for a in page.all("section")] == SECTIONS
    at = str(tmp_path / "mine")
    for key, line in {
        "planned": f"not planned: slimtune plan {at}/recipe.yaml",
        "rows": "not looked through: slimtune data /d.jsonl --model m",
        "course": f"no loss was logged: slimtune train {at}/recipe.yaml --resume",
        "compared": f"not measured: slimtune eval {at} --split validation",
        "samples": f"not generated: slimtune eval {at} --split validation --generate 8",
        "forgetting": f"not measured: slimtune eval {at} --split validation",
        "made": f"not finished: slimtune train {at}/recipe.yaml --resume",
    }.items():
        assert line in page.of[key], page.of[key]


def test_what_a_file_lacks_is_no_fault(tmp_path):
    """Today's files: no accuracy, no generations, no intervals of the levels; then files with nothing in them."""
    run = full_run(tmp_path / "mine")
    old = {k: v for k, v in evaluation_of(run.path, "").items()
           if k in ("rows", "tokens", "base_loss", "tuned_loss", "loss_reduction", "loss_reduction_ci95", "base_perplexity")}  # fmt: skip
    write(run.path / "eval-test.json", {**old, "forgetting": None, "generations": None})
    page = Page(render_page(run))
    assert "accuracy was not measured: slimtune eval" in page.of["compared"]
    assert "4.524" in page.of["compared"]
    assert "not measured" in page.of["forgetting"]
    write(run.path / "eval-test.json", {"base_loss": None})
    write(run.path / "data.json", {"train": {}, "validation": None})
    write(run.plan_file, {"plan": {}, "probe": {}})
    write(run.result_file, {"run": "x"})
    assert Page(render_page(run)).faults == []


def test_a_damaged_file_is_said_and_the_rest_is_shown(tmp_path):
    run = full_run(tmp_path / "mine")
    (run.path / "eval-test.json").write_text('{"base_loss": 4.')
    write(run.plan_file, [1])
    with run.metrics_file.open("a") as f:
        f.write("not json\n")
    page = Page(render_page(run))
    alerts = " ".join(page.texts)
    assert len(page.all("p", "notice bad")) == 3
    assert "eval-test.json cannot be read" in alerts
    assert "plan.json holds a list, not an object" in alerts
    assert "metrics.jsonl, line 46 is not JSON" in alerts
    assert "781" in page.of["rows"]


def test_the_bar_holds_the_parts_and_the_marks(whole):
    parts = whole.all("rect", "part")[:7]
    planned = plan_of()["plan"]
    most = planned["need_bytes"]["high"]
    for part, size in zip(parts, planned["parts"].values(), strict=True):
        assert float(part["width"]) == pytest.approx(1000 * size / most, abs=0.1)
    ends = [float(p["x"]) + float(p["width"]) for p in parts]
    assert [float(p["x"]) for p in parts[1:]] == pytest.approx(ends[:-1], abs=0.2)
    assert float(whole.all("line", "measured")[0]["x1"]) == pytest.approx(1000 * 2096062464 / most, abs=0.1)
    assert float(whole.all("rect", "need")[0]["width"]) == pytest.approx(1000 * most / 23e9, abs=0.1)


def test_columns_stand_side_by_side(whole):
    columns = [(float(c["x"]), float(c["width"]), float(c["height"])) for c in whole.all("rect", "column")]
    assert [x + wide for x, wide, _ in columns] == pytest.approx([*(x for x, _, _ in columns[1:]), 1000], abs=0.2)
    assert columns[1][2] == 1000  # 230 rows, the most
    assert columns[0][2] == pytest.approx(1000 * 96 / 230, abs=0.1)
    assert float(whole.all("line", "limit")[0]["x1"]) == pytest.approx(1000 * (200 - 31) / 220, abs=0.1)


def test_a_peak_over_the_plan_is_off(tmp_path):
    run = full_run(tmp_path / "mine", peak_bytes=3_000_000_000)
    page = Page(render_page(run))
    assert "2.8 GiB off" in " ".join(page.of["planned"].split())
    assert float(page.all("line", "measured")[0]["x1"]) == 1000


def test_on_a_gpu_tensors_are_compared_with_tensors(tmp_path):
    run = full_run(tmp_path / "mine", device="cuda:0", peak_bytes=1_300_000_000)
    said = " ".join(Page(render_page(run)).of["planned"].split())
    assert "peak memory1.1 GiB1.2 GiB longest" in said


# --- how to ship -----------------------------------------------------------------------------------------------------


def lines_of(run: RunDir) -> list[list[str]]:
    said = Page(render_page(run)).of["shipping"].splitlines()
    return [shlex.split(line) for line in said if line.startswith("slimtune ")]


def exports(run: RunDir) -> set[str]:
    return {" ".join(w for w in line if w in ("merge", "export", "push", "verify") or line[line.index(w) - 1] == "--to"
            or w in ("--merged", "--as-lora")) for line in lines_of(run)} - {""}  # fmt: skip


@pytest.mark.parametrize(
    ("ships", "ways"),
    [
        ({"base_kind": "gguf", "merged": True, "gguf": True, "vllm": True, "as_lora": True},
         {"merge", "export gguf", "export ollama", "export vllm", "push", "verify"}),
        ({"base_kind": "hub", "merged": True, "gguf": True, "vllm": True, "as_lora": True},
         {"merge", "export gguf", "export ollama --merged", "export vllm", "push", "verify"}),
        ({"base_kind": "gguf", "merged": True, "gguf": False, "vllm": False, "as_lora": True},
         {"merge", "export gguf --merged", "export ollama --merged", "export vllm --as-lora", "push", "verify"}),
        ({"base_kind": "gguf", "merged": False, "gguf": False, "vllm": False, "as_lora": False}, {"push"}),
    ],
    ids=["lora", "lora on a Hub base", "ia3", "prefix tuning"],
)  # fmt: skip
def test_only_the_ways_that_an_adapter_has(tmp_path, ships, ways):
    run = full_run(tmp_path / "mine", ships=ships)
    assert exports(run) == ways
    assert ("is no change of weights" in Page(render_page(run)).of["shipping"]) == (ways == {"push"})


@pytest.mark.parametrize("base", ["gguf", "folder"])
@pytest.mark.parametrize("merges", [True, False])
def test_every_command_is_one_that_the_command_line_takes(tmp_path, base, merges):
    odd = tmp_path / "my run; it's"
    ships = {"base_kind": base, "merged": merges, "gguf": merges, "vllm": False, "as_lora": merges}
    verbs = typer.main.get_command(app)
    lines = lines_of(full_run(odd, ships=ships))
    assert len(lines) > 2
    for _, verb, *arguments in lines:
        command = verbs.commands[verb]
        command.make_context(verb, list(arguments))  # raises at what is not known
        assert str(odd) in arguments


def test_a_run_of_before_says_where_to_look(tmp_path):
    run = full_run(tmp_path / "mine")
    write(run.result_file, {k: v for k, v in result_of(run.path).items() if k != "export_formats"})
    assert "where it ships was not noted: slimtune methods lora" in Page(render_page(run)).of["shipping"]


# --- who writes it ---------------------------------------------------------------------------------------------------


def test_eval_writes_it_anew(tiny_folder, tmp_path):
    run = RunDir(make_run(tmp_path / "mine", tiny_folder))
    write_report(run)
    assert "not measured: slimtune eval" in Page(run.report_file.read_text()).of["compared"]
    found = evaluate(run.path)
    assert f"{found['base_loss']:.3f}" in Page(run.report_file.read_text()).of["compared"]


def test_the_verb(tmp_path, capsys):
    run = full_run(tmp_path / "mine")
    other = tmp_path / "other.html"
    for given, file in (([], run.report_file), (["--out", str(other)], other)):
        with pytest.raises(SystemExit) as left:
            app(args=["report", str(run.path), *given, "--json"])
        assert left.value.code == 0
        assert json.loads(capsys.readouterr().out) == {"run": str(run.path), "report": str(file)}
        assert file.read_text() == render_page(run)
    for bad in ([str(tmp_path)], [str(run.path), "--out", str(tmp_path / "no" / "x.html")],
                [str(run.path), "--out", str(tmp_path)]):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            app(args=["report", *bad])
        assert left.value.code == 2
        assert "error: " in capsys.readouterr().err
