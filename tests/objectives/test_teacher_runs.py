"""Runs with a teacher: its answers are sampled once, killed runs resume bit for bit, bad input is refused early."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from row_files import write_jsonl
from tiny_run import distance, metrics, recipe_of, train_in_two_parts, write_rows

from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.example_lengths import DatasetRowComposition
from slimtune.core.data.rows import Row
from slimtune.core.models.loader import load_base
from slimtune.core.training.train import train
from slimtune.errors import DataError, RecipeError, RunError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.result_lines import list_context_lines
from slimtune.objectives import teacher_run
from slimtune.objectives.teacher_logps import TopLogps
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import build_plan_request

CONTEXT = "You are a shop. Answer every customer in capital letters, and thank them. " * 2


@pytest.fixture
def make(tmp_path, tiny_llama, tiny_tokenizer):
    """Make a recipe in a run folder: `make("run", answers=False, task={"lmbda": 0.5}, max_steps=3)`."""
    for part in (tiny_llama(initializer_range=0.2, max_position_embeddings=512), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 20)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(40)])
    (tmp_path / "context.txt").write_text(CONTEXT)

    def recipe(name, *, answers=True, task=None, method=None, data=None, **train_settings):
        file = {"train": str(tmp_path / ("rows.jsonl" if answers else "prompts.jsonl"))}
        settings = {
            "model": {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu"},
            "data": file | {"validation_fraction": 0.2} | ({} if answers else {"format": "prompt"}) | (data or {}),
            "task": {
                "name": "context", "context": str(tmp_path / "context.txt"), "max_completion_length": 8, **(task or {}),
            },
            "method": {"name": "lora", "r": 4, **(method or {})},
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "forgetting_budget": None},
            "output_dir": str(tmp_path / name),
        }  # fmt: skip
        settings["task"] = {k: v for k, v in settings["task"].items() if v is not None}
        return recipe_of(settings, **train_settings)

    return recipe


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "prompts"])
def test_student_comes_nearer_to_its_teacher(make, answers, tmp_path):
    result = train(make("run", answers=answers, max_steps=12, eval_steps=1))
    found = metrics(result.run, "validation_loss")
    assert found[-1] < 0.7 * found[0]
    file = write_rows(tmp_path / "held_out.jsonl", 8, start=100) if answers else None
    settings = EvalSettings(split="validation", data=file, skip_prompt_test=True)
    context = evaluate(result.run, settings).measures.context
    assert context.sampled_answers is not answers
    assert context.tokens_saved == pytest.approx(len(CONTEXT), rel=0.5)  # the tokens of the tiny base are short
    assert min(context.prefill_seconds, context.prefill_seconds_with_context) > 0
    page = (Path(result.run) / "report.html").read_text()
    assert all(escape(line) in page for line in list_context_lines(context))


def test_sdft_learns_from_its_own_answers_and_resumes_to_the_same_bits(make, monkeypatch):
    task = {"name": "sdft", "context": None, "lmbda": 0.5}
    whole, again = (make(name, task=task) for name in ("whole", "again"))
    assert distance(train(whole).run, train_in_two_parts(again, monkeypatch, 2).run) == 0
    assert len((Path(whole.output_dir) / teacher_run.ANSWERS_FILE).read_text().splitlines()) == 21


@pytest.fixture
def teacher(tmp_path, tiny_llama, tiny_tokenizer):
    """Write another base: wider, with the same tokenizer and more padded logits."""
    tokenizer, model = tiny_tokenizer(), tiny_llama(hidden_size=48, initializer_range=0.2, max_position_embeddings=512)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_distillation_comes_nearer_to_another_base_and_resumes_to_the_same_bits(make, teacher, monkeypatch):
    task = {"name": "distill", "context": None, "teacher_model_name_or_path": str(teacher)}
    whole, again = (make(name, task=task, max_steps=8, eval_steps=1) for name in ("whole", "again"))
    assert distance(train(whole).run, train_in_two_parts(again, monkeypatch, 3).run) == 0
    found = metrics(whole.output_dir, "validation_loss")
    assert found[-1] < 0.9 * found[0]


def test_teacher_on_a_server_teaches_what_it_teaches_here(make, teacher, monkeypatch):
    model = load_base(str(teacher), dtype="float32", device="cpu").model

    class Served:
        requests_at_once = 1

        @torch.no_grad()
        def score(self, ids, start):
            top = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1).topk(model.config.vocab_size)
            return TopLogps(top.indices.int().numpy(), top.values.numpy())

    monkeypatch.setattr("slimtune.generation.teacher_server.open_teacher_server", lambda *_: Served())
    plain = {"name": "distill", "context": None}
    here = {"teacher_model_name_or_path": str(teacher), "lmbda": 0, "beta": 0, "temperature": 1}
    there = {"teacher_model_server_url": "http://127.0.0.1:9"}
    losses = [metrics(train(make(f"{i}", task=plain | task)).run, "train_loss") for i, task in enumerate((here, there))]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_teacher_with_another_tokenizer_is_refused_before_the_base_is_loaded(make, teacher, monkeypatch):
    monkeypatch.setattr("slimtune.core.training.prepare_run.load_base_and_adapted_model", None)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {t: i for i, t in enumerate(reversed(tokenizer["model"]["vocab"]))}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    task = {"name": "distill", "context": None, "teacher_model_name_or_path": str(teacher)}
    with pytest.raises(UsageError, match="tokenizer"):
        train(make("run", task=task))


def test_teacher_of_sdft_has_the_answer_in_its_prompt():
    objective = load_objective_class("sdft")(teacher_prompt_template="{prompt} ({privileged_context})")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "{prompt}")]
    row = objective.make_teacher_row(Row([{"role": r, "content": c} for r, c in turns], 1))
    assert [m["content"] for m in row.messages] == ["a", "b", "c ({prompt})", "{prompt}"]
    assert objective.make_teacher_row(Row([], 1, prompt="c", completion="d")).prompt == "c (d)"


@pytest.mark.parametrize("task", [{}, {"lmbda": 0.5, "beta": 0.7, "temperature": 0.9}], ids=["off-policy", "mixed"])
@pytest.mark.parametrize("answers", [True, False], ids=["answers", "prompts"])
def test_killed_run_resumes_to_the_same_bits(make, answers, task, monkeypatch):
    whole, again = (make(name, answers=answers, task=task) for name in ("whole", "again"))
    assert distance(train(whole).run, train_in_two_parts(again, monkeypatch, 2).run) == 0
    assert metrics(whole.output_dir, "train_loss") == metrics(again.output_dir, "train_loss")


def test_killed_sampling_goes_on_with_the_prompts_that_are_missing(make, monkeypatch):
    whole, again = make("whole", answers=False), make("again", answers=False)
    train(whole)
    sample, asked = teacher_run.TeacherRun.sample, []

    def stop_at_the_second(run, prompts, adapter_or_base, what):
        asked.append(what)
        if what == "validation 0" and asked.count(what) == 1:
            raise KeyboardInterrupt
        return sample(run, prompts, adapter_or_base, what)

    monkeypatch.setattr(teacher_run.TeacherRun, "sample", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    file = Path(again.output_dir) / teacher_run.ANSWERS_FILE
    file.write_text(file.read_text() + '{"part": "train", "num')  # cut by the kill
    assert distance(whole.output_dir, train(again, resume=True).run) == 0
    assert asked == ["train 0", "validation 0", "validation 0"]
    assert len(file.read_text().splitlines()) == 41


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "prompts"])
def test_changed_context_is_refused_on_resume(make, tmp_path, answers):
    recipe = make("run", answers=answers)
    train(recipe)
    (tmp_path / "context.txt").write_text("Answer in Latin.")
    with pytest.raises(RunError, match="context"):
        train(recipe, resume=True)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"context": ""}, RecipeError, "task.context"),
        ({"context": "contxt.txt"}, UsageError, "there is no file contxt.txt"),
        ({"context": "too long " * 200}, DataError, "512 positions"),
        ({"beta": 1.5}, RecipeError, "task.beta"),
    ],
    ids=["none", "missing", "long", "beta"],
)
def test_wrong_input_is_refused_before_the_base_is_loaded(make, task, error, message, monkeypatch):
    monkeypatch.setattr("slimtune.core.training.prepare_run.load_base_and_adapted_model", None)
    with pytest.raises(error, match=message):
        train(make("run", task=task))
    assert not Path("run").exists()


def test_head_that_trains_is_refused(make):
    with pytest.raises(UsageError, match="head"):
        train(make("run", method={"modules_to_save": ["lm_head"]}))


def test_plan_runs_the_pass_of_the_teacher(make):
    content = DatasetRowComposition(supervised_share=0.5, teacher_prefix_tokens=100, teacher_row_tokens=100)
    job = build_plan_request(make("run"), require_gpu_by_name("rtx-3090"), [60] * 4, 1, content).job()

    def count_flops(job):
        counts = trace_training_step(job).counts_by_operator_cost
        return sum(flops * times for (flops, *_), times in counts.items())

    # The teacher's forward pass has 340 tokens, the student's forward and backward passes 240 each.
    assert 1.3 < count_flops(job) / count_flops(replace(job, teacher=None)) < 2
