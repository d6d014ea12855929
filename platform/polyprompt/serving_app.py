"""The endpoint as an ASGI application: routes, their OpenAPI document, and who may do what. Knows nothing of Ray."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match

from polyprompt import __version__
from polyprompt.serving_desk import Desk
from polyprompt.serving_http import PREDICT, Frame, Json, problem
from polyprompt.serving_limits import Limits, Rate, Refusal, check_rows
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_page import PAGE, POLICY
from polyprompt.serving_schema import NAME, Answers, Health, ModelInfo, Models, Problem, Question, Source

#: Holds the token of those who may change what is served.
TOKEN_VARIABLE = "POLYPROMPT_ADMIN_TOKEN"
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def make_app(
    desk: Desk, limits: Limits, metrics: Metrics, *, token: str = "", lifespan: Lifespan | None = None
) -> FastAPI:
    """Return the application. token: of the admin routes; "" shuts them."""
    app = FastAPI(
        title="polyprompt",
        version=__version__,
        description="Answers rows of many text tasks with prompted models.",
        lifespan=lifespan,
        # Their pages are loaded from elsewhere, which needs a network.
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
    )
    rate = Rate(limits.requests_per_second)

    def admit(path: str) -> None:
        if path == PREDICT:
            rate.take()
            desk.waiting.check(1)

    _say_no(app)
    _public(app, desk, limits, metrics)
    _admin(app, desk, token)
    app.add_middleware(Frame, limits=limits, metrics=metrics, admit=admit)
    return app


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": _MEANINGS[status]} for status in statuses}


_MEANINGS = {
    400: "The body cannot be read",
    401: "The token is missing or wrong",
    403: "The admin routes are shut",
    404: "No such model",
    408: "The body did not come in time",
    413: "Too many rows, characters, choices or bytes",
    422: "The request does not fit",
    429: "Too many requests a second; Retry-After says when to come back",
    500: "The server failed",
    503: "Too many rows are waiting, or nobody can answer; Retry-After says when to come back",
    504: "No answer in time",
}
_ANY = (400, 408, 413, 422, 500)


def _public(app: FastAPI, desk: Desk, limits: Limits, metrics: Metrics) -> None:
    @app.post(PREDICT, responses=_problems(*_ANY, 404, 429, 503, 504), tags=["predict"])
    async def predict(
        request: Request,
        question: Question,
        x_request_id: Annotated[
            str | None, Header(description="comes back; made up where it is missing or odd")
        ] = None,
    ) -> Answers:
        """Answer rows of any tasks, in order. A row that does not fit has its error; where none fits: 422."""
        rows = [row.table() for row in question.rows]
        check_rows(rows, limits)
        answers = await desk.ask(rows, question.model, question.mode)
        return Answers(request_id=request.state.request_id, answers=answers)

    @app.get("/models", tags=["predict"])
    async def models() -> Models:
        """The models that are served, with their tasks."""
        return Models(models=desk.models())

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:
        """The server runs."""
        return Health()

    @app.get("/readyz", responses=_problems(503), tags=["operation"])
    async def readyz() -> Health:
        """A model is served, and a replica answers."""
        await desk.ready()
        return Health()

    @app.get("/metrics", response_class=Response, tags=["operation"], responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


def _admin(app: FastAPI, desk: Desk, token: str) -> None:
    digest = hashlib.sha256(token.encode()).digest()
    bearer = HTTPBearer(auto_error=False, description=f"the server's ${TOKEN_VARIABLE}")

    def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not token:
            raise Refusal(
                403, "admin_is_shut", f"models cannot be changed here: the server was started without {TOKEN_VARIABLE}"
            )
        if given is None or not hmac.compare_digest(hashlib.sha256(given.credentials.encode()).digest(), digest):
            raise Refusal(
                401, "not_allowed", f"expected the header Authorization: Bearer … with the server's {TOKEN_VARIABLE}"
            )

    Name = Annotated[str, Path(pattern=NAME, description="what the model is called in requests")]
    admin: dict[str, Any] = {"dependencies": [Depends(allowed)], "tags": ["admin"]}

    @app.put("/admin/models/{name}", responses=_problems(*_ANY, 401, 403, 503), **admin)
    async def put(name: Name, source: Source) -> ModelInfo:
        """Load a model, or replace the one of this name; answers when it is served."""
        return await desk.put(name, source.source)

    @app.delete("/admin/models/{name}", status_code=204, responses=_problems(*_ANY, 401, 403, 404), **admin)
    async def delete(name: Name) -> None:
        """Serve the model no more; requests that were taken are still answered."""
        await desk.drop(name)


def _say_no(app: FastAPI) -> None:
    """One form for every answer that is none."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        raise refusal  # Frame counts and answers it

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> Response:
        first, *others = error.errors()
        where = ".".join(str(part) for part in first["loc"])[:200]
        more = f" (and {len(others)} more)" if others else ""
        raise Refusal(422, "does_not_fit", f"{where}: {first['msg']}{more}; /openapi.json says what is expected")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, "http", f"{error.detail}; /openapi.json lists what there is")
        answer = problem(refusal, request.state.request_id)
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # a route knows its own method alone
            answer.headers["Allow"] = ", ".join(_methods(request))
        return answer


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes at the request's address."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in routes for method in route.methods})


def watching(desk: Desk) -> Lifespan:
    """Return a lifespan that follows the aliases while the application runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(desk.watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return lifespan
