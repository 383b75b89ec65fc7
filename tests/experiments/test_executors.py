"""Several runs at the same time: what `--on` means, how runs end, and that numbers are those of one after another."""

import dataclasses
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from row_files import write_jsonl

from slimtune.core.config import load_recipe
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import RunError, UsageError
from slimtune.experiments import comparison as comparison
from slimtune.experiments import executor_specs, executors, search
from slimtune.experiments.clusters import RayTask, SlurmExecutor
from slimtune.experiments.comparison import run_comparison
from slimtune.experiments.executor_specs import make_executor, parse_executor_spec
from slimtune.experiments.executors import ExecutorSpec, LocalParallelExecutor, ParallelExecutorBase
from slimtune.experiments.experiment_output_dir import lock_output_dir_and_write_settings
from slimtune.experiments.run_worker import WorkerResult
from slimtune.experiments.search_space import parse_setting_ranges
from slimtune.experiments.tuning import run_tuning

pytestmark = pytest.mark.usefixtures("kept_traces")
DONE = WorkerResult("", False, 0.0)


def files(*names: str) -> list[Path]:
    return [Path(name) for name in names]


@pytest.mark.parametrize(
    ("text", "kind", "runs", "address", "parameters"),
    [
        ("local:4", "local", 4, None, {}),
        ("ray", "ray", None, None, {}),
        ("ray://head:10001,8,num_gpus=0.5", "ray", 8, "ray://head:10001", {"num_gpus": "0.5"}),
        ("slurm:partition=gpu,time=60", "slurm", None, None, {"partition": "gpu", "time": "60"}),
    ],
)
def test_places(monkeypatch, text, kind, runs, address, parameters):
    monkeypatch.setattr(executor_specs, "find_spec", lambda _: True)
    assert parse_executor_spec(text) == ExecutorSpec(text, kind, runs, address, parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lokal:4", "no such place; did you mean 'local'"),
        ("local", "does not say how many runs"),
        ("local:0", "0 is not understood"),
        ("local:2,partition=gpu", "partition=gpu is not understood"),
        ("ray:num_gpu=1", "no such parameter: num_gpu; did you mean 'num_gpus'"),
        ("ray:num_gpus=all", "num_gpus is all"),
        ("slurm:partition=gpu", "lacks time"),
    ],
)
def test_place_that_is_not_understood(monkeypatch, text, message):
    monkeypatch.setattr(executor_specs, "find_spec", lambda _: True)
    with pytest.raises(UsageError, match=message):
        parse_executor_spec(text)


@pytest.mark.parametrize(("text", "package"), [("ray", "ray"), ("slurm:time=5", "submitit")])
def test_missing_package_is_named(monkeypatch, text, package):
    monkeypatch.setattr(executor_specs, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=package) as e:
        parse_executor_spec(text)
    assert e.value.hint == f"pip install 'slimtune[{text.partition(':')[0]}]'"


def test_runs_train_at_the_same_time_on_their_share_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(executors, "count_usable_cpus", lambda: 8)
    together, environments = threading.Barrier(3), []

    def launch(*, environment, should_stop):
        together.wait(60)  # raises unless three threads wait
        environments.append(environment)
        return DONE

    with make_executor(parse_executor_spec("local:3"), Path()) as executor:
        results = dict(executor.run((file, launch) for file in files("a", "b", "c", "d", "e", "f")))
    assert set(map(str, results)) == set("abcdef")
    assert not any(result.error for result in results.values())
    assert [e["OMP_NUM_THREADS"] for e in environments] == ["2"] * 6
    assert sorted(e["CUDA_VISIBLE_DEVICES"] for e in environments[:3]) == ["2", "2", "5"]
    assert executor.runs_per_device == 2


def test_killed_run_is_started_again_twice():
    deaths = {"a": 1, "b": 9}

    def start(name):
        def launch(**_):
            deaths[name] -= 1
            killed = deaths[name] >= 0
            return DONE._replace(error="was killed" if killed else "", killed=killed)

        return Path(name), launch

    with make_executor(parse_executor_spec("local:1"), Path()) as executor:
        results = dict(executor.run([start("a"), start("b")]))
    assert results[Path("a")][:2] == ("", False)
    assert results[Path("a")].restarts == 1
    assert results[Path("b")].error
    assert results[Path("b")].restarts == 2


def test_interrupt_reaches_every_run():
    up, interrupted = threading.Barrier(3), []

    def launch(*, should_stop, **_):
        up.wait(60)
        try:
            while not should_stop():
                time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted.append(1)
            raise

    def interrupt(file):
        if not up.broken and file.name == "b":
            up.wait(60)
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt), make_executor(parse_executor_spec("local:2"), Path()) as executor:
        list(executor.run(((file, launch) for file in files("a", "b", "c")), interrupt))
    assert interrupted == [1, 1]


def test_run_that_is_no_longer_wanted_ends_alone():
    def launch(*, should_stop, **_):
        while not should_stop():
            time.sleep(0.01)

    with make_executor(parse_executor_spec("local:2"), Path()) as executor:
        launches = [(Path("a"), launch), (Path("b"), lambda **_: DONE)]
        results = dict(executor.run(launches, lambda file: file.name == "a"))
    assert {file.name: result.stopped_by_should_stop for file, result in results.items()} == {"a": True, "b": False}


def test_comparison_at_the_same_time_has_the_numbers_of_one_after_another(grid, without_training):
    alone = run_comparison(grid("lora", seeds=6, out="alone"))
    log: list[str] = []
    result = run_comparison(grid("lora", seeds=6), log.append, executor_spec=parse_executor_spec("local:4"))
    same = {"output_dir": "", "seconds": 0.0, "on": None}
    assert replace(result, **same) == replace(alone, **same)
    assert (result.on, alone.on) == ("local:4", None)
    assert "(local:4)" in (grid("lora").output_dir / "table.md").read_text()
    assert sum("loss reduction" in line for line in log) == 6


def test_method_too_large_for_this_machine_is_tried_on_others(grid, without_training, monkeypatch):
    estimate_resources = comparison.estimate_resources

    def refuse(request, **options):
        return dataclasses.replace(estimate_resources(request, **options), verdict="does not fit")

    monkeypatch.setattr(comparison, "estimate_resources", refuse)
    monkeypatch.setattr(LocalParallelExecutor, "is_remote", True)
    log: list[str] = []
    assert (
        run_comparison(grid("lora", seeds=1), log.append, executor_spec=parse_executor_spec("local:2")).left_out == []
    )
    assert log[0].startswith("plan: lora ")


@pytest.fixture
def flat_losses(monkeypatch):
    """Replace trials: the loss depends on the rate, and the first trials end last."""
    tried: list[float] = []

    def launch(files, **_):
        (recipe_file,) = files
        run, rate = RunDir(recipe_file.with_suffix("")), load_recipe(recipe_file).train.learning_rate
        if launch.interrupt_at is not None and len(tried) >= launch.interrupt_at:
            raise KeyboardInterrupt
        tried.append(rate)
        time.sleep(0.05 * (4 - len(tried) % 4))
        run.path.mkdir(exist_ok=True)
        loss = abs(rate - 1e-3)
        run.result_file.write_text(json.dumps({"validation_loss": loss}))
        lines = [{"step": step, "validation_loss": loss + 1 - step / 4} for step in (1, 2, 3, 4)]
        write_jsonl(run.metrics_file, lines)
        return DONE

    launch.interrupt_at = None
    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", launch)
    monkeypatch.setattr("slimtune.experiments.tuning.write_tune_trials_chart", lambda *_: None)
    return launch


@pytest.mark.slow
def test_search_at_the_same_time_resumes_with_the_same_values(tree, tmp_path, flat_losses):
    def run(out, trials=9):
        ranges = parse_setting_ranges(["train.learning_rate=log:1e-5..1e-2"])
        found = run_tuning(
            tree, ranges, tmp_path / out, trials=trials, executor_spec=parse_executor_spec("local:4")
        ).trials
        return [(t.values, t.outcome, t.loss) for t in found]

    whole = run("whole")
    assert len(whole) == len({str(t) for t in whole}) == 9
    assert "pruned" in [t[1] for t in whole]
    flat_losses.interrupt_at = 9 + 6
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    flat_losses.interrupt_at = None
    assert run("parts") == whole


def test_search_needs_the_number_of_trials_at_a_time(tree, tmp_path):
    with pytest.raises(UsageError, match="trials") as e:
        run_tuning(
            tree,
            parse_setting_ranges(["method.r=2,4"]),
            tmp_path / "t",
            trials=2,
            executor_spec=ExecutorSpec("ray", "ray", None),
        )
    assert "ray:4" in e.value.expected
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_cells_are_jobs_of_submitit(grid, monkeypatch):
    """Its executor of this machine stands in for Slurm."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(SlurmExecutor, "cluster", "local")
    settings = grid("lora", "ia3", seeds=1)
    settings.output_dir.mkdir()
    with lock_output_dir_and_write_settings(settings.output_dir, settings.settings(), "comparison"):
        pass  # before its executor makes a folder there
    result = run_comparison(settings, executor_spec=parse_executor_spec("slurm:time=30"))
    assert result.failed == []
    assert {m.method: m.seeds for m in result.methods} == {"lora": [7], "ia3": [7]}
    assert len(list((settings.output_dir / "slurm").glob("*_submitted.pkl"))) == 2
    assert list(settings.output_dir.glob("cells/*.job")) == []


def test_lost_cluster_is_named():
    ray = pytest.importorskip("ray")

    class Lost:
        exceptions = ray.exceptions

        def wait(self, *_, **__):
            raise ConnectionError("Client is shutting down.")

        cancel = wait

    class LostExecutor(ParallelExecutorBase):
        def submit(self, recipe_file, launch):
            return RayTask(Lost(), None)

    executor = LostExecutor(ExecutorSpec("ray", "ray", None), Path())
    with pytest.raises(RunError, match="Ray") as e, executor:
        list(executor.run([(Path("a"), None)]))
    assert e.value.hint


def test_job_that_still_runs_is_found_again(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setattr(SlurmExecutor, "cluster", "local")

    class Job:
        def __init__(self, folder, job_id):
            self.folder, self.job_id = folder, job_id

        def done(self, force_check=False):
            return self.job_id == "over"

    executor = SlurmExecutor(ExecutorSpec("slurm:time=5", "slurm", None, None, {"time": "5"}), tmp_path)
    executor.job_class = Job
    executor.executor.submit = lambda *_: Job(None, "new")
    (tmp_path / "runs.job").write_text('{"job": "runs"}')
    (tmp_path / "over.job").write_text('{"job": "over"}')
    found = [executor.submit(tmp_path / f"{name}.yaml", None).job.job_id for name in ("runs", "over", "none")]
    assert found == ["runs", "new", "new"]
    assert json.loads((tmp_path / "none.job").read_text()) == {"job": "new"}
