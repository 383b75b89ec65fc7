"""The pages of `slimtune ui` as an ASGI application: which address shows which page, and which form does what.

A form is answered by a redirect to its page, so a reload sends nothing twice. A part that changes asks for itself again
(htmx) as long as its command runs.
"""

from collections.abc import Callable
from importlib.resources import files as resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ..core.foundation.files import convert_os_error
from ..errors import SlimtuneError
from .pages import UiPages

STATIC = {
    "report.css": ("slimtune.evaluation", "text/css"),
    "ui.css": ("slimtune.ui.static", "text/css"),
    "ui.js": ("slimtune.ui.static", "text/javascript"),
    "htmx.min.js": ("slimtune.ui.static", "text/javascript"),
}


def build_web_app(pages: UiPages) -> Starlette:
    """Return the application; `request_security.RequestGuard` goes around it."""

    def get(path: str, show: Callable[..., Response], *names: str) -> Route:
        """Show a page, which may get query parameters of these names."""

        async def answer(request: Request) -> Response:
            query: dict[str, Any] = {name: request.query_params[name] for name in names if name in request.query_params}
            if "pick" in names:
                query["pick"] = request.query_params.getlist("pick")
            try:
                return await run_in_threadpool(show, **request.path_params, **query)
            except SlimtuneError as e:
                return pages.render("message.html.j2", 404, page="", title="This is not there", error=e)

        return Route(path, answer, methods=["GET"])

    def post(path: str, act: Callable[..., str], show: Callable[..., Response], files: int = 0) -> Route:
        """Do what a form asks for and go to its page, or show the page with what is wrong."""

        async def answer(request: Request) -> Response:
            status, error = 400, None
            try:
                async with request.form(max_files=files, max_fields=100) as form:
                    return RedirectResponse(await run_in_threadpool(act, dict(form), **request.path_params), 303)
            except ClientDisconnect:  # in the middle of an upload
                return Response(status_code=499)
            except SlimtuneError as e:
                error = e
            except OSError as e:
                if (error := convert_os_error(e)) is None:
                    raise
                status = 507
            page = await run_in_threadpool(show, error=error)
            page.status_code = status
            return page

        return Route(path, answer, methods=["POST"])

    async def check(request: Request) -> Response:
        """Check the value of a field, which is the query parameter of its name."""
        path = request.path_params["path"]
        return await run_in_threadpool(pages.check_field, path, request.query_params.get(path, ""))

    async def columns(request: Request) -> Response:
        """Show the columns for the fields of the form, which are the query."""
        return await run_in_threadpool(pages.show_columns, dict(request.query_params))

    async def static(request: Request) -> Response:
        found = STATIC.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "there is no such file")
        package, kind = found
        return Response(resources(package).joinpath(request.path_params["name"]).read_bytes(), media_type=kind)

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
            get("/train", pages.train, "run"),
            post("/train", pages.start_training, pages.train),
            post("/train/resume", pages.resume_training, pages.train),
            post("/train/stop", pages.stop_run, pages.train),
            get("/evaluate", pages.evaluate, "run"),
            post("/evaluate", pages.start_evaluation, pages.evaluate),
            get("/report", pages.report, "run"),
            get("/chat", pages.chat, "run"),
            post("/chat/load", pages.load_chat, pages.chat),
            post("/chat/unload", pages.unload_chat, pages.chat),
            post("/chat/say", pages.say, pages.chat),
            post("/chat/predict", pages.predict, pages.chat),
            post("/chat/new", pages.new_chat, pages.chat),
            post("/chat/rate", pages.rate, pages.chat),
            post("/chat/learn", pages.learn_ratings, pages.chat),
            post("/chat/stop", pages.stop_chat, pages.chat),
            get("/runs", pages.runs, "pick"),
            get("/export", pages.export, "run"),
            post("/export", pages.start_export, pages.export),
            post("/export/verify", pages.verify_export, pages.export),
            get("/machines", pages.machines),
            post("/machines", pages.choose_machine, pages.machines),
            post("/machines/bench", pages.measure_machine, pages.machines),
            get("/help", pages.help),
            post("/help", pages.explain, pages.help),
            get("/live/run", pages.live_run, "run"),
            get("/live/chat", pages.live_chat),
            get("/live/{kind}", pages.live),
            Route("/columns", columns, methods=["GET"]),
            Route("/check/{path}", check, methods=["GET"]),
            post("/stop/{kind}", pages.stop, pages.rows),
            Route("/static/{name}", static),
        ],
        exception_handlers={HTTPException: say_refused, Exception: say_bug},
    )
