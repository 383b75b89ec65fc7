"""The pages and forms of `slimtune ui`, as an ASGI application.

A form is answered by a redirect to its page, so a reload sends nothing twice. What a page shows lives in the server
(`Jobs`), in the working folder and in run folders: every tab, and every reload, shows the same. A part that changes
asks for itself again (htmx) as long as its command runs.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from .. import __version__
from ..errors import SlimtuneError, UsageError
from ..models.registry import load_known_configs
from ..planning.gpus import all_gpus
from ..reporting.charts import html_templates
from ..reporting.report import memory_charts, template_functions
from ..run_dir import RunResults
from ..utils.files import os_error
from .jobs import SLIMTUNE, Job, Jobs
from .settings import BASE, MORE, ROWS, ROWS_FIELDS, RUN_FIELDS, list_fields, make_args
from .workspace import Workspace

PAGES = {"rows": ("/", "Base and rows"), "plan": ("/plan", "Plan")}
"""Path and title of each page, in the order in which a person needs them."""
PAGE_OF_JOB = {"data": "rows", "plan": "plan"}
STATIC = {
    "report.css": ("slimtune.reporting", "text/css"),
    "ui.css": ("slimtune.ui.static", "text/css"),
    "ui.js": ("slimtune.ui.static", "text/javascript"),
    "htmx.min.js": ("slimtune.ui.static", "text/javascript"),
}
Form = Mapping[str, str]
CARD = "card"


class Pages:
    """The pages over one working folder."""

    def __init__(self, workspace: Workspace, program: Sequence[str] = SLIMTUNE) -> None:
        self.workspace, self.jobs = workspace, Jobs(workspace.root, program)
        self.choices = workspace.load_choices()
        self.notice = ""  # what could not be kept, shown until it can
        self.templates = html_templates("ui/templates")
        self.templates.globals.update(template_functions(), version=__version__, pages=PAGES)

    def render(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page; `values` are what its template shows."""
        shown = {"choices": self.choices, "notice": self.notice, "folder": self.workspace.root.name, **values}
        return HTMLResponse(self.templates.get_template(template).render(shown), status)

    def choose(self, form: Form, names: tuple[str, ...]) -> None:
        """Keep the fields of a form, for every tab and the next start."""
        self.choices = {**self.choices, **{name: form.get(name, "").strip() for name in names}}
        try:
            self.workspace.save_choices(self.choices)
            self.notice = ""
        except SlimtuneError as e:
            self.notice = f"What you chose is not kept for the next start: {e.message}"

    # --- 1 base and rows ---

    def rows(self, **values: Any) -> Response:
        """Show which base and rows there are, and the report on the rows."""
        return self.render(
            "rows.html.j2",
            page="rows",
            bases=load_known_configs(),
            files=self.workspace.list_rows(),
            fields=list_fields(ROWS_FIELDS),
            job=self.job_view("data"),
            **values,
        )

    def check_rows(self, form: Form) -> str:
        """Start the report on rows."""
        self.choose(form, (BASE, ROWS, *ROWS_FIELDS))
        base, rows = self.base_and_rows()
        self.jobs.start("data", ["data", rows, f"--model={base}", *make_args(self.workspace, self.choices, "data")])
        return "/#job"

    def upload(self, form: Mapping[str, Any]) -> str:
        """Keep an uploaded file, and choose it."""
        file = form.get("file")
        if not isinstance(file, UploadFile) or not file.filename:
            raise UsageError("no file was chosen", "a file of rows")
        self.choose({ROWS: self.workspace.save_upload(file.filename, file.file)}, (ROWS,))
        return "/"

    def base_and_rows(self) -> tuple[str, str]:
        """Return the chosen base and rows; raise UsageError if one is missing or outside the working folder."""
        base = self.workspace.resolve_base(self.choices.get(BASE, ""))
        return base, self.workspace.resolve_rows(self.choices.get(ROWS, ""))

    # --- 2 plan ---

    def plan(self, **values: Any) -> Response:
        """Show the settings of the run, and its plan."""
        return self.render(
            "plan.html.j2",
            page="plan",
            fields=list_fields(RUN_FIELDS),
            cards=[c for c in all_gpus() if c.trains],
            job=self.job_view("plan"),
            **values,
        )

    def make_plan(self, form: Form) -> str:
        """Start the plan."""
        self.choose(form, (*RUN_FIELDS, MORE, CARD))
        base, rows = self.base_and_rows()
        card = [f"--gpu={card}"] if (card := self.choices[CARD]) else []
        self.jobs.start(
            "plan", ["plan", base, f"--data={rows}", *card, *make_args(self.workspace, self.choices, "plan")]
        )
        return "/plan#job"

    # --- what runs ---

    def close(self) -> list[Job]:
        """Stop what runs but trainings, and return those."""
        return self.jobs.stop_all()

    def job_view(self, kind: str) -> dict[str, Any] | None:
        """Return what the templates show of the last job of a kind."""
        job = self.jobs.get(kind)
        if job is None:
            return None
        view = {"kind": kind, "state": job.state, "job": job, "error": job.error, "result": job.result}
        if kind == "plan" and job.state == "done":
            view["charts"] = memory_charts(RunResults(plan=job.result))
        return view

    def live(self, kind: str) -> Response:
        """Return the part of a page that shows a job."""
        if kind not in PAGE_OF_JOB:
            raise HTTPException(404, f"there is no command {kind[:40]!r} here")
        return self.render("job.html.j2", page=PAGE_OF_JOB[kind], job=self.job_view(kind))

    def stop(self, kind: str) -> str:
        """Stop a job."""
        if kind not in PAGE_OF_JOB:
            raise HTTPException(404, f"there is no command {kind[:40]!r} here")
        job: Job | None = self.jobs.get(kind)
        if job is not None:
            job.stop()
        return f"{PAGES[PAGE_OF_JOB[kind]][0]}#job"


def build_app(pages: Pages) -> Starlette:
    """Return the application; `security.Guard` goes around it."""

    def get(path: str, show: Callable[..., Response]) -> Route:
        async def answer(request: Request) -> Response:
            return await run_in_threadpool(show, **request.path_params)

        return Route(path, answer, methods=["GET"])

    def post(path: str, act: Callable[..., str], show: Callable[..., Response], **limits: int) -> Route:
        async def answer(request: Request) -> Response:
            try:
                async with request.form(max_files=limits.get("files", 0), max_fields=100) as form:
                    return RedirectResponse(await run_in_threadpool(act, dict(form), **request.path_params), 303)
            except SlimtuneError as e:
                return await run_in_threadpool(show, status=400, error=e)
            except OSError as e:
                if (error := os_error(e)) is None:
                    raise
                return await run_in_threadpool(show, status=507, error=error)

        return Route(path, answer, methods=["POST"])

    async def static(request: Request) -> Response:
        found = STATIC.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "there is no such file")
        package, kind = found
        return Response(files(package).joinpath(request.path_params["name"]).read_bytes(), media_type=kind)

    async def say_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return pages.render("message.html.j2", error.status_code, page="", title=error.detail)

    async def say_bug(request: Request, error: Exception) -> Response:
        return pages.render("message.html.j2", 500, page="", title=f"a bug in slimtune: {type(error).__name__}")

    return Starlette(
        routes=[
            get("/", pages.rows),
            post("/rows", pages.check_rows, pages.rows),
            post("/upload", pages.upload, pages.rows, files=1),
            get("/plan", pages.plan),
            post("/plan", pages.make_plan, pages.plan),
            get("/live/{kind}", pages.live),
            post("/stop/{kind}", lambda form, kind: pages.stop(kind), pages.rows),
            Route("/static/{name}", static),
        ],
        exception_handlers={HTTPException: say_refused, Exception: say_bug},
    )
