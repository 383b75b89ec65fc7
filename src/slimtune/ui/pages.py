"""The pages: what each shows, and what its forms do.

What a page shows lives in the server (`LatestCommandJobs`, `ChatSession`), in the working folder and in run folders, so
every tab and every reload shows the same.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.responses import HTMLResponse, Response

from ..core.config.objective_registry import list_objectives, load_objective_class
from ..core.foundation.version import __version__
from ..core.training.held_out_rows import MIN_EVAL_ROWS
from ..core.training.run_dir import RunDir
from ..errors import SlimtuneError, UsageError
from ..evaluation.charts import is_finite_number, make_jinja_environment
from ..evaluation.run_report import make_report_template_functions, render_memory_charts, render_run_report_html
from ..evaluation.run_results import RunResults, find_held_out_evaluation, load_run_results, parse_evaluations_of_run
from ..extras.column_preview import ColumnPreview
from .base_choices import list_base_choices
from .chat_session import CHAT_WORKER, MAX_TEXT, ChatSession
from .column_choices import COLUMN, FORMAT, FORMAT_LABELS, TASK, ColumnFormBuilder, run_preview_process
from .command_arguments import make_args_except_base_and_rows
from .command_jobs import SLIMTUNE, LatestCommandJobs, StartedCommand
from .field_help import AUTOMATIC, OBJECTIVE_HELP, describe_field
from .field_names import list_page_fields, name_page_fields
from .form_fields import (
    BASE,
    MORE,
    ROWS,
    ROWS_FIELDS,
    RUN_FIELDS,
    SETTINGS,
    find_value_error,
    make_form_fields,
)
from .markdown import render_markdown
from .run_pages import (
    ChosenRun,
    JobPageData,
    RunPageData,
    find_training_process,
    interrupt_training,
    is_classifier_or_reward_model,
    list_set_aside_splits,
    make_loss_and_gain_comparison_charts,
    make_run_page_data,
    make_run_table_rows,
)
from .workspace import WorkspaceFolder

PAGES = {
    "rows": ("/", "Base and rows"),
    "plan": ("/plan", "Plan"),
    "train": ("/train", "Train"),
    "evaluate": ("/evaluate", "Evaluate"),
    "chat": ("/chat", "Chat"),
    "runs": ("/runs", "Runs"),
    "export": ("/export", "Export"),
    "machines": ("/machines", "Machines"),
    "help": ("/help", "Help"),
}
"""Path and title of each page, in the order in which a person needs them; the last two are beside that order."""
PAGE_OF_JOB = {
    "data": "rows",
    "plan": "plan",
    "eval": "evaluate",
    "predict": "chat",
    "export": "export",
    "verify": "export",
    "bench": "machines",
    "choose": "machines",
    "gpus": "machines",
    "explain": "help",
}
MACHINE_KINDS = ("desktop", "laptop", "workstation", "mac", "mini", "rent")
TARGETS = {
    "ollama": ("Ollama", "merged"),
    "gguf --merged": ("LM Studio, Jan, llama.cpp: one GGUF file", "merged"),
    "gguf": ("llama.cpp, adapter beside the base", "gguf"),
    "vllm": ("vLLM, adapter beside the base", "vllm"),
    "merge": ("one plain checkpoint, for transformers and vLLM", "merged"),
}
"""What the page exports to: the target and flags of `slimtune export`, or `slimtune merge`; its title, and which of the
export formats in a run's result it needs."""
PLAN_FIELDS = {path: label for path, label in RUN_FIELDS.items() if path != TASK}
CARD, RUN, OUT = "card", "run", "out"
FIELDS_WITH_ERRORS = {
    "rows": ("file", BASE, ROWS),
    "train": (RUN,),
    "evaluate": ("held_out", "generate"),
    "chat": ("text",),
    "export": (OUT, "export"),
    "machines": ("base", "budget", "hours"),
}
"""Names of the fields of each page that show themselves why their form was refused."""
Form = Mapping[str, str]


class HeldOutRows(NamedTuple):
    """The rows that a run keeps for its evaluation, as the settings say."""

    field: str  # whose share they are
    share: float
    kept: int
    all_rows: int


REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; sandbox"
"""For report.html, which has its style inside and no script."""


@contextlib.contextmanager
def blame_field(name: str) -> Iterator[None]:
    """Make the field of this name the one that an error is about."""
    try:
        yield
    except SlimtuneError as e:
        e.field = name
        raise


def require_number(form: Form, name: str, example: str) -> None:
    """Raise UsageError, about its field, unless a field is empty or has a number that is not negative."""
    text = form.get(name, "").strip()
    if text and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        raise UsageError(f"{text[:40]!r} is no number", f"a number such as {example}", field=name)


def make_ollama_name(folder: str) -> str:
    """Return the name of the model in Ollama for an export's folder, whose name may have what Ollama's may not."""
    return re.sub(r"[^a-z0-9_.-]+", "-", Path(folder).name.lower()).strip(".-")[:80] or "tuned"


class UiPages:
    """The pages over one working folder.

    Args:
        workspace: the working folder.
        program: `slimtune`.
        chat_program: the process of a chat.
        gpus: name and bytes of memory of each GPU that a plan can be made for.
        read_preview: looks into a file of rows.
    """

    def __init__(
        self,
        workspace: WorkspaceFolder,
        program: Sequence[str] = SLIMTUNE,
        chat_program: Sequence[str] = CHAT_WORKER,
        gpus: Sequence[tuple[str, int]] = (),
        read_preview: Callable[[Path], ColumnPreview] = run_preview_process,
    ) -> None:
        self.workspace, self.jobs = workspace, LatestCommandJobs(workspace.root, program)
        self.chat_program, self.gpus = chat_program, gpus
        self.column_forms = ColumnFormBuilder(workspace, read_preview)
        self.conversation: ChatSession | None = None
        self.rating_lock = threading.Lock()
        self.choices = workspace.load_choices()
        self.interrupted_processes: set[int] = set()  # trainings of an earlier page, or of a terminal
        self.notice = ""  # what could not be kept, shown until it can
        self.templates = make_jinja_environment("ui/templates")
        self.templates.filters |= {
            "fields": name_page_fields,
            "help": describe_field,
            "page_fields": list_page_fields,
            "markdown": render_markdown,
        }
        self.templates.globals.update(make_report_template_functions(), version=__version__, pages=PAGES)
        self.templates.globals |= {"fields_with_errors": FIELDS_WITH_ERRORS, "format_labels": FORMAT_LABELS}

    def render(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page; `values` are what its template shows."""
        shown = {"choices": self.choices, "notice": self.notice, "folder": self.workspace.root.name, **values}
        return HTMLResponse(self.templates.get_template(template).render(shown), status)

    def choose(self, form: Form, names: Sequence[str]) -> None:
        """Keep the fields of a form, for every tab and the next start."""
        typed = {name: str(form.get(name, "")).strip() for name in names}
        empty = {name: "" for name, value in typed.items() if name in SETTINGS and value.lower() == AUTOMATIC}
        self.choices = {**self.choices, **typed, **empty}
        try:
            self.workspace.save_choices(self.choices)
            self.notice = ""
        except SlimtuneError as e:
            self.notice = f"What you chose is not kept for the next start: {e.message}"

    def close(self) -> list[StartedCommand]:
        """Stop what runs but trainings, and return those."""
        if self.conversation is not None:
            self.conversation.close()
        return self.jobs.stop_all()

    # --- 1 base and rows ---

    def rows(self, **values: Any) -> Response:
        """Show which base and rows there are, and the report on the rows."""
        return self.render(
            "rows.html.j2",
            page="rows",
            bases=list_base_choices(),
            files=self.workspace.list_rows(),
            tasks={name: OBJECTIVE_HELP.get(name) or load_objective_class(name).summary for name in list_objectives()},
            columns=self.column_forms.build(self.choices.get(ROWS, ""), self.choices),
            fields=make_form_fields({p: label for p, label in ROWS_FIELDS.items() if p != FORMAT}, self.choices),
            job=self.job_view("data"),
            **values,
        )

    def check_rows(self, form: Form) -> str:
        """Start the report on rows."""
        self.choose_columns(form)
        self.choose(form, (BASE, ROWS, TASK, *ROWS_FIELDS))
        self.base_and_rows()
        if (chosen := self.choices[FORMAT]) and not load_objective_class(self.choices[TASK] or "sft").takes_format(
            chosen
        ):
            raise UsageError(
                f"rows of the format {chosen} are not for this objective", hint="look at the columns again"
            )
        self.jobs.start("data", self.make_rows_args(), in_place=True)
        return "/#job"

    def make_rows_args(self) -> list[str]:
        """Return the arguments that check the rows that are chosen; raise UsageError for a wrong choice."""
        base, rows = self.base_and_rows()
        return ["data", rows, f"--model={base}", *make_args_except_base_and_rows(self.workspace, self.choices, "data")]

    def upload(self, form: Mapping[str, Any]) -> str:
        """Keep an uploaded file, and choose it; what was typed beside it is kept, too."""
        self.choose(form, [name for name in (BASE, TASK) if name in form])
        file = form.get("file")
        if not isinstance(file, UploadFile) or not file.filename:
            raise UsageError("no file was chosen", "a file of rows", field="file")
        with blame_field("file"):
            rows = self.workspace.save_upload(file.filename, file.file)
        self.choose_columns({})
        self.choose({ROWS: rows, "uploaded": rows}, (ROWS, "uploaded", FORMAT))
        return "/#columns"

    def choose_columns(self, form: Form) -> None:
        """Keep the columns of a form, in place of those that were chosen before."""
        others = {name: value for name, value in self.choices.items() if not name.startswith(COLUMN)}
        columns = {n: str(v) for n, v in form.items() if re.fullmatch(rf"{re.escape(COLUMN)}[a-z]+", n)}
        self.choices = {**others, **columns}

    def show_columns(self, form: Form) -> Response:
        """Return the part of the page that asks for the columns, for a form that is not sent yet."""
        columns = self.column_forms.build(form.get(ROWS, ""), form)
        return self.render("columns.html.j2", page="rows", columns=columns)

    def base_and_rows(self) -> tuple[str, str]:
        """Return the chosen base and rows; raise UsageError if one is missing or outside the working folder."""
        with blame_field(BASE):
            base = self.workspace.resolve_base(self.choices.get(BASE, ""))
        with blame_field(ROWS):
            return base, self.workspace.resolve_rows(self.choices.get(ROWS, ""))

    # --- 2 plan ---

    def plan(self, **values: Any) -> Response:
        """Show the settings of the run, and its plan."""
        return self.render(
            "plan.html.j2",
            page="plan",
            fields=make_form_fields(PLAN_FIELDS, self.choices, self.find_automatic_learning_rate()),
            gpus=self.gpus,
            held_out=self.count_held_out_rows(),
            least_held_out=MIN_EVAL_ROWS,
            job=self.job_view("plan"),
            **values,
        )

    def make_plan(self, form: Form) -> str:
        """Start the plan."""
        self.choose(form, (*PLAN_FIELDS, MORE, CARD))
        self.jobs.start("plan", self.make_plan_args(), in_place=True)
        return "/plan#job"

    def make_plan_args(self) -> list[str]:
        """Return the arguments that plan what is chosen; raise UsageError for a wrong choice."""
        base, rows = self.base_and_rows()
        card = [f"--gpu={card}"] if (card := self.choices.get(CARD)) else []
        settings = make_args_except_base_and_rows(self.workspace, self.choices, "plan")
        return ["plan", base, f"--data={rows}", *card, *settings]

    def find_automatic_learning_rate(self) -> float | None:
        """Return the learning rate that training takes by itself; None unless what is chosen was planned so."""
        job = self.jobs.get("plan")
        rate = job.printed.get("learning_rate") if job is not None and self.is_about_choices(job) else None
        return rate if is_finite_number(rate) and not self.choices.get("train.learning_rate") else None

    def is_about_choices(self, job: StartedCommand) -> bool:
        """Return whether a report on rows, or a plan, is about what is chosen now."""
        try:
            return job.args == (self.make_rows_args() if job.kind == "data" else self.make_plan_args())
        except UsageError:
            return False

    def count_held_out_rows(self) -> HeldOutRows | None:
        """Return how many rows the settings keep for the evaluation; None: not known before the rows are split."""
        preview = self.column_forms.build(self.choices.get(ROWS, ""), self.choices).preview
        if not preview.rows or preview.has_more_rows or "data." in self.choices.get(MORE, ""):
            return None
        for path in ("data.test_fraction", "data.validation_fraction"):
            value = self.choices.get(path, "")
            if find_value_error(path, value):
                return None
            if share := float(value or SETTINGS[path].default):
                return HeldOutRows(RUN_FIELDS[path], share, round(preview.rows * share), preview.rows)
        return None

    def check_field(self, path: str, text: str) -> Response:
        """Return what is wrong with the value of a field, to be shown below it."""
        return self.render("field_error.html.j2", page="", error=find_value_error(path, text))

    # --- 3 train ---

    def train(self, run: str = "", **values: Any) -> Response:
        """Show a training, and how to start one."""
        return self.render(
            "train.html.j2",
            page="train",
            runs=self.workspace.list_runs(),
            new_run=self.workspace.suggest_new(self.choices.get("new_run") or "runs/first"),
            settings={label: self.choices[p] for p, label in PLAN_FIELDS.items() if self.choices.get(p)},
            view=self.run_view(run),
            **values,
        )

    def live_run(self, run: str = "") -> Response:
        """Return the part of the page that shows a training."""
        return self.render("run.html.j2", page="train", view=self.run_view(run))

    def run_view(self, run: str = "") -> RunPageData | None:
        """Return what is shown of a run, by default of the one that was chosen last."""
        name = run or self.choices.get(RUN, "")
        if not name:
            return None
        return make_run_page_data(self.workspace, name, self.jobs.get("train"), self.interrupted_processes)

    def start_training(self, form: Form) -> str:
        """Start a training."""
        self.choose({"new_run": form.get(RUN, "")}, ("new_run",))
        base, rows = self.base_and_rows()
        with blame_field("run"):
            out = self.workspace.relative(self.workspace.resolve_new(form.get(RUN, "")))
        self._require_not_training(out)
        force = ["--force"] if form.get("force") else []
        args = [
            "train",
            f"--model={base}",
            f"--data={rows}",
            f"--out={out}",
            *make_args_except_base_and_rows(self.workspace, self.choices, "train"),
        ]
        self.jobs.start("train", [*args, *force], subject=out)
        self.choose({RUN: out}, (RUN,))
        return "/train#run"

    def resume_training(self, form: Form) -> str:
        """Continue a training from its last checkpoint."""
        run = self.open_run(form)
        self._require_not_training(str(run.path))
        self.jobs.start("train", ["train", f"--out={run.path}", "--resume"], subject=str(run.path))
        self.choose({RUN: str(run.path)}, (RUN,))
        return "/train#run"

    def stop_run(self, form: Form) -> str:
        """Stop a training, whoever started it; it writes a checkpoint."""
        job, name = self.jobs.get("train"), form.get(RUN, "")
        is_own = job is not None and job.subject == name and job.state == "running"
        process = find_training_process(self.workspace.root, name) if name in self.workspace.list_runs() else None
        if job is not None and is_own and (process is None or job.has_process(process)):
            job.stop()
        elif process is not None:
            interrupt_training(process)
            self.interrupted_processes.add(process)
        else:
            raise UsageError(f"{self.open_run(form).path} is not being trained on this machine")
        return "/train#run"

    def _require_not_training(self, name: str) -> None:
        """Raise UsageError if a process trains a run already, which a page before this one may have started."""
        if (process := find_training_process(self.workspace.root, name)) is not None:
            raise UsageError(f"process {process} trains {name} already", "one training of a run", "wait, or stop it")

    def open_run(self, form: Form) -> RunDir:
        """Return the run that a form names."""
        return self.workspace.open_run(form.get(RUN, ""))

    # --- 4 evaluate ---

    def evaluate(self, run: str = "", **values: Any) -> Response:
        """Show what was measured of a run."""
        chosen = self.chosen(run)
        return self.render(
            "evaluate.html.j2",
            page="evaluate",
            job=self.job_view("eval"),
            splits=list_set_aside_splits(chosen.results),
            least_held_out=MIN_EVAL_ROWS,
            **vars(chosen),
            **values,
        )

    def start_evaluation(self, form: Form) -> str:
        """Start an evaluation."""
        run = self.open_run(form)
        require_number(form, "generate", "2")
        self.choose(form, (RUN, "split", "held_out", "generate"))
        splits = list_set_aside_splits(load_run_results(run, raise_if_damaged=False))
        where = [f"--split={self.choices['split'] or next(iter(splits), 'test')}"]
        if self.choices["held_out"]:
            with blame_field("held_out"):
                where = [f"--data={self.workspace.resolve_rows(self.choices['held_out'])}"]
        asks = self.choices["generate"] and not is_classifier_or_reward_model(
            load_run_results(run, raise_if_damaged=False)
        )
        answers = [f"--generate={self.choices['generate']}"] if asks else []
        self.jobs.start("eval", ["eval", str(run.path), *where, *answers], subject=str(run.path))
        return "/evaluate#job"

    def chosen(self, run: str) -> ChosenRun:
        """Return the runs to choose from, and what is known of the chosen one."""
        runs = self.workspace.list_runs()
        name = run or self.choices.get(RUN, "") or next(iter(runs), "")
        try:
            results = load_run_results(self.workspace.open_run(name), raise_if_damaged=False) if name else RunResults()
        except SlimtuneError as e:
            return ChosenRun(runs, name, problem=e)
        evaluations = parse_evaluations_of_run(results)
        return ChosenRun(runs, name, results, evaluations, find_held_out_evaluation(results, evaluations))

    def report(self, run: str = "") -> Response:
        """Return report.html of a run, written anew from its files: one that lies there may be anybody's."""
        page = render_run_report_html(self.workspace.open_run(run))
        return HTMLResponse(page, headers={"content-security-policy": REPORT_POLICY})

    # --- 5 chat ---

    def chat(self, run: str = "", **values: Any) -> Response:
        """Show the conversation, or what a classifier or a reward model predicts."""
        chosen = self.chosen(run)
        predicts = is_classifier_or_reward_model(chosen.results) and (bool(run) or self.conversation is None)
        job = self.job_view("predict")
        return self.render(
            "chat.html.j2",
            page="chat",
            chat=self.conversation,
            predicts=predicts,
            job=job,
            ratings=self.find_ratings(),
            **vars(chosen),
            **values,
        )

    def live_chat(self) -> Response:
        """Return the part of the page that shows the conversation."""
        return self.render("turns.html.j2", page="chat", chat=self.conversation, ratings=self.find_ratings())

    def load_chat(self, form: Form) -> str:
        """Load a run to talk to, in place of the one before."""
        run = self.open_run(form)
        self.unload_chat(form)
        self.choose({RUN: str(run.path)}, (RUN,))
        if not is_classifier_or_reward_model(load_run_results(run, raise_if_damaged=False)):
            self.conversation = ChatSession(str(run.path), self.workspace.root, self.chat_program)
        return "/chat"

    def predict(self, form: Form) -> str:
        """Start the prediction of a classifier or a reward model for a text."""
        run, text = self.open_run(form), form.get("text", "")
        if not text.strip() or len(text) > MAX_TEXT or "\0" in text:
            raise UsageError(f"the text has {len(text)} characters", f"1 to {MAX_TEXT}, none of them NUL", field="text")
        self.choose({RUN: str(run.path)}, (RUN,))
        self.jobs.start("predict", ["predict", str(run.path), "--", text], subject=str(run.path))
        return "/chat#job"

    def unload_chat(self, form: Form) -> str:
        """Give the memory of the loaded run back."""
        if self.conversation is not None:
            self.conversation.close()
        self.conversation = None
        return "/chat"

    def say(self, form: Form) -> str:
        """Send a message."""
        self.choose(form, ("max_new_tokens", "temperature", "seed", "alone"))
        try:
            settings = {
                "max_new_tokens": int(self.choices["max_new_tokens"] or 128),
                "temperature": float(self.choices["temperature"] or 0),
                "seed": int(self.choices["seed"] or 0),
            }
        except ValueError as e:
            raise UsageError(f"a setting of the answer is no number: {e}", "numbers") from None
        if not 1 <= settings["max_new_tokens"] <= 4096:
            raise UsageError("the longest answer is out of range", "1 to 4096 tokens")
        self.require_chat().ask(
            form.get("text", ""), ["tuned"] if self.choices["alone"] else ["base", "tuned"], settings
        )
        return "/chat"

    def rate(self, form: Form) -> str:
        """Write an answer that got a thumb into the working folder, as a row that KTO learns from."""
        chat, number, model = self.require_chat(), form.get("number", ""), form.get("model", "")
        if (thumb := form.get("thumb", "")) not in ("up", "down"):
            raise UsageError(f"{thumb[:40]!r} is no rating", "up or down")
        with self.rating_lock:
            is_good, row = thumb == "up", chat.make_rated_row(number, model, thumb == "up")
            turn = next(turn for turn in chat.turns if turn["number"] == number)
            before = turn.get(f"{model}_thumb")
            if before != thumb:
                replaced = None if before is None else {**row, "label": not is_good}
                self.workspace.write_rating(chat.run, row, replaced)
                turn[f"{model}_thumb"] = thumb
        return "/chat"

    def learn_ratings(self, form: Form) -> str:
        """Choose the rated answers of the loaded run as rows to learn by KTO."""
        chat = self.require_chat()
        rows = self.workspace.relative(self.workspace.find_ratings_file(chat.run))
        self.choose_columns({})
        self.choose({ROWS: rows, TASK: "kto"}, (ROWS, TASK, FORMAT))
        return "/#columns"

    def find_ratings(self) -> str:
        """Return the file with the rated answers of the loaded run; empty: there is none."""
        if self.conversation is None:
            return ""
        try:
            path = self.workspace.find_ratings_file(self.conversation.run)
        except UsageError:  # a link to the outside
            return ""
        return self.workspace.relative(path) if path.is_file() else ""

    def new_chat(self, form: Form) -> str:
        """Begin a new conversation."""
        self.choose(form, ("system",))
        self.require_chat().begin(self.choices["system"])
        return "/chat"

    def stop_chat(self, form: Form) -> str:
        """Stop an answer."""
        self.require_chat().stop()
        return "/chat"

    def require_chat(self) -> ChatSession:
        """Return the conversation; raise UsageError if no run is loaded."""
        if self.conversation is None:
            raise UsageError("no run is loaded", "a run to talk to", "choose one and load it")
        return self.conversation

    # --- 6 runs ---

    def runs(self, pick: Sequence[str] = (), **values: Any) -> Response:
        """Show the runs, and those that were picked side by side."""
        rows = make_run_table_rows(self.workspace, self.workspace.list_runs())
        picked = [row for row in rows if row.name in pick]
        compared = make_loss_and_gain_comparison_charts(picked) if picked else None
        return self.render("runs.html.j2", page="runs", rows=rows, picked=list(pick), compared=compared, **values)

    # --- 7 export ---

    def export(self, run: str = "", **values: Any) -> Response:
        """Show what a run can be exported to, and the last export with its check."""
        chosen = self.chosen(run)
        targets = {"merge": TARGETS["merge"]} if is_classifier_or_reward_model(chosen.results) else TARGETS
        exports = self.workspace.list_exports()
        return self.render(
            "export.html.j2",
            page="export",
            job=self.latest_job_view("export"),
            targets=targets,
            exports=exports,
            new_folder=self.suggest_export(),
            **vars(chosen),
            **values,
        )

    def suggest_export(self) -> str:
        """Return a name that no export has."""
        return self.workspace.suggest_new(self.choices.get(OUT) or "exports/first")

    def verify_export(self, form: Form) -> str:
        """Start the comparison of an export with its run."""
        with blame_field("export"):
            export = self.workspace.relative(self.workspace.resolve(form.get("export", "")))
        self.jobs.start("verify", ["verify", export], subject=export)
        return "/export#job"

    # --- machines ---

    def machines(self, **values: Any) -> Response:
        """Show how fast machines are: this one as it was measured, others by their figures."""
        job = self.latest_job_view("machines")
        return self.render("machines.html.j2", page="machines", job=job, kinds=MACHINE_KINDS, gpus=self.gpus, **values)

    def measure_machine(self, form: Form) -> str:
        """Start the benchmark of this machine."""
        self.jobs.start("bench", ["bench"])
        return "/machines#job"

    def choose_machine(self, form: Form) -> str:
        """Start the ranking of machines for the chosen run, or compare those that are named."""
        require_number(form, "budget", "500")
        require_number(form, "hours", "1.5")
        names = ("compared", "budget", "hours", *MACHINE_KINDS)
        self.choose(form, names)
        with blame_field("base"):
            base = self.workspace.resolve_base(self.choices.get(BASE, ""))
        if self.choices["compared"]:
            compared = [name.strip() for name in self.choices["compared"].split(",") if name.strip(" -")]
            self.jobs.start("gpus", ["gpus", f"--for={base}", "--", *compared[:8]])
            return "/machines#job"
        limits = [f"--{name}={value}" for name in ("budget", "hours") if (value := self.choices[name])]
        kinds = ",".join(kind for kind in MACHINE_KINDS if self.choices[kind])
        rows = [f"--data={self.workspace.resolve_rows(rows)}"] if (rows := self.choices.get(ROWS, "")) else []
        settings = make_args_except_base_and_rows(self.workspace, self.choices, "plan")
        limits += [f"--kind={kinds}"] if kinds else []
        self.jobs.start("choose", ["choose", base, *rows, *limits, *settings])
        return "/machines#job"

    # --- help ---

    def help(self, **values: Any) -> Response:
        """Show what an error or a question is about."""
        return self.render("help.html.j2", page="help", job=self.job_view("explain"), **values)

    def explain(self, form: Form) -> str:
        """Look a text up in the help."""
        text = form.get("q", "").strip()[:MAX_TEXT].replace("\0", "")
        self.jobs.start("explain", ["explain", *(["--", text] if text else [])], subject=text).wait(3)
        return "/help#job"

    def start_export(self, form: Form) -> str:
        """Start an export."""
        run, target = self.open_run(form), form.get("target", "")
        if target not in TARGETS:
            raise UsageError(f"{target[:40]!r} is no target", f"one of {', '.join(TARGETS)}")
        self.choose(form, (RUN, "target", OUT, "require_proof"))
        with blame_field("out"):
            out = self.workspace.relative(self.workspace.resolve_new(form.get(OUT, "")))
        if target == "merge":
            args = ["merge", str(run.path), f"--out={out}"]
        else:
            to, *merged = target.split()
            proof = ["--require-proof"] if form.get("require_proof") else []
            name = [f"--name={make_ollama_name(out)}"] if to == "ollama" else []
            args = ["export", str(run.path), f"--to={to}", f"--out={out}", *merged, *name, *proof]
        self.jobs.start("export", args, subject=str(run.path))
        return "/export#job"

    # --- what runs ---

    def job_view(self, kind: str) -> JobPageData | None:
        """Return what the templates show of the last job of a kind."""
        job = self.jobs.get(kind)
        if job is None:
            return None
        is_plan = kind == "plan" and job.state == "done"
        charts = render_memory_charts(RunResults(plan=job.printed)) if is_plan else ()
        result = job.printed
        if isinstance(issues := result.get("issues"), list):
            named = [{**i, "hint": name_page_fields(str(i.get("hint") or ""))} for i in issues if isinstance(i, dict)]
            result = {**result, "issues": named}
        is_outdated = kind in ("data", "plan") and job.state != "running" and not self.is_about_choices(job)
        return JobPageData(kind, job.state, job, job.error, result, charts, is_outdated)

    def latest_job_view(self, page: str) -> JobPageData | None:
        """Return what the templates show of the command of a page that was started last."""
        jobs = [job for kind in PAGE_OF_JOB if PAGE_OF_JOB[kind] == page and (job := self.jobs.get(kind)) is not None]
        return self.job_view(max(jobs, key=lambda job: job.started).kind) if jobs else None

    def live(self, kind: str) -> Response:
        """Return the part of a page that shows a job."""
        self.require_kind(kind)
        return self.render(
            "job.html.j2",
            page=PAGE_OF_JOB[kind],
            job=self.job_view(kind),
            is_live=True,
            new_folder=self.suggest_export(),
            **vars(self.chosen("")),
        )

    def stop(self, form: Form, kind: str) -> str:
        """Stop a job."""
        self.require_kind(kind)
        if (job := self.jobs.get(kind)) is not None:
            job.stop()
        return f"{PAGES[PAGE_OF_JOB[kind]][0]}#job"

    def require_kind(self, kind: str) -> None:
        """Raise UsageError unless the page starts commands of a kind."""
        if kind not in PAGE_OF_JOB:
            raise UsageError(f"there is no command {kind[:40]!r} here", f"one of {', '.join(PAGE_OF_JOB)}")
