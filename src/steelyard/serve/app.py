"""The HTTP side: routes, bodies with limits, tokens, overload, and errors of one sentence. FastAPI does the HTTP."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import steelyard
from steelyard.errors import SteelyardError, require
from steelyard.serve import bodies
from steelyard.serve.bodies import NAME_RULE, Name, Top
from steelyard.serve.config import RefusedError, ServeConfig
from steelyard.serve.service import RewardService

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.routing import APIRoute

RETRY_SECONDS = 1
LONGEST = 400
"""Characters of a sentence."""
OPEN = ("/health",)
"""Paths that need no token and are answered in overload too."""


class Admission:
    """How many requests are at work; further ones are refused at once instead of waiting in a queue without end."""

    def __init__(self, most: int) -> None:
        self.most, self.at_work = most, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a request for as long as it is at work."""
        if self.at_work >= self.most:
            raise RefusedError(503, f"{self.most} requests are at work already; try again later")
        self.at_work += 1
        try:
            yield
        finally:
            self.at_work -= 1


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """Return a request's body.

    Raises:
        RefusedError: it is no JSON, too long, or too slow.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"expected content of type application/json, found {kind or 'none'}")
    too_long = RefusedError(413, f"expected a body of at most {config.max_body_bytes} bytes, found more")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > config.max_body_bytes:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > config.max_body_bytes:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {config.body_seconds:g} seconds") from None
    return b"".join(parts)


def read_json(body: bytes) -> Any:
    """Return what JSON says.

    Raises:
        RefusedError: it is malformed, nested too deeply, or holds NaN or Infinity, which JSON has not.
    """

    def refuse(constant: str) -> NoReturn:
        raise RefusedError(400, f"body: expected numbers of JSON, found {constant}")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise RefusedError(400, "body: nested too deeply") from None
    except UnicodeDecodeError:
        raise RefusedError(400, "body: expected UTF-8") from None
    except json.JSONDecodeError as error:
        raise RefusedError(400, f"body: malformed JSON at character {error.pos}: {error.msg}") from None
    except ValueError:  # an integer of thousands of digits
        raise RefusedError(400, "body: a number has too many digits") from None


def guarded_route(config: ServeConfig, token: str | None) -> type[APIRoute]:
    """Return the class of routes that check the token, admit or refuse, and read bodies with limits."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.routing import APIRoute
    from starlette.exceptions import HTTPException

    admission = Admission(config.max_pending)

    class LimitedRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                with told():
                    self._body = await read_body(self, config)
            return self._body

        async def json(self) -> Any:
            with told():
                return read_json(await self.body())

    @contextmanager
    def told() -> Iterator[None]:
        # FastAPI calls whatever else goes wrong while a body is read "an error parsing the body"
        try:
            yield
        except RefusedError as refusal:
            raise HTTPException(refusal.status, str(refusal)) from None

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                if request.url.path in OPEN:
                    return await handle(request)
                if token is not None:
                    require_token(request.headers.get("authorization", ""), token)
                with admission.one():
                    try:
                        response = await handle(LimitedRequest(request.scope, request.receive))
                    except (SteelyardError, RequestValidationError, HTTPException):
                        raise
                    except Exception as error:
                        raise fault(error) from None
                response.headers["Cache-Control"] = "no-store"
                return response

            return guarded

    return GuardedRoute


def require_token(authorization: str, token: str) -> None:
    """Refuse a request without the token; how long that takes says nothing about it."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise RefusedError(401, "expected the header Authorization: Bearer TOKEN with this service's token")


def fault(error: Exception) -> RefusedError:
    """Log where an unexpected error came from, without its message (it may hold a text), and return the refusal."""
    where = "".join(traceback.format_tb(error.__traceback__))
    print(f"a fault of the service: {type(error).__name__}\n{where}", file=sys.stderr, flush=True)
    return RefusedError(500, "a fault of the service; its log says where")


def sentence(errors: list[dict[str, Any]]) -> str:
    """Return the first fault that pydantic found, without the value that was sent."""
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
    if error["type"] == "extra_forbidden":
        return f"unknown field {where!r}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {NAME_RULE}"
    if error["type"] == "missing":
        return f"missing field {where!r}" if where != "body" else "expected a body of JSON, found none"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}"


def build_app(service: RewardService, token: str | None = None) -> FastAPI:
    """Return the application; it closes the service when it ends.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    require("fastapi", "serve")
    import anyio.to_thread
    from fastapi import APIRouter, Body, FastAPI, Response, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException

    config, heads, method = service.config, service.heads, service.method

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        # endpoints wait in threads for the backbone and the disk, one each
        anyio.to_thread.current_default_thread_limiter().total_tokens = config.max_pending + 1
        yield
        await anyio.to_thread.run_sync(service.close)

    def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        extra = {503: {"Retry-After": str(RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
        text = text[:LONGEST].encode(errors="replace").decode()  # what was sent may be quoted in it
        return JSONResponse({"error": text}, status, {**(headers or {}), **extra})

    app = FastAPI(
        title="steelyard serve reward",
        version=steelyard.__version__,
        description="Rewards for each user, from a trained head set and a few labels.",
        lifespan=life,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": bodies.Problem}, "5XX": {"model": bodies.Problem}},
    )

    @app.exception_handler(SteelyardError)
    async def _refused(_: Request, error: SteelyardError) -> Response:
        return problem(error.status if isinstance(error, RefusedError) else 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return problem(422, sentence(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        words = {404: f"there is no {request.url.path}", 405: f"{request.url.path} takes no {request.method}"}
        return problem(error.status_code, words.get(error.status_code, str(error.detail)), dict(error.headers or {}))

    app.router.route_class = guarded_route(config, token)
    router = APIRouter(
        prefix="/v1",
        route_class=app.router.route_class,
        dependencies=[] if token is None else [Security(HTTPBearer(auto_error=False))],
    )

    @app.get("/health")
    def health() -> bodies.Health:
        """Whether the service answers."""
        return bodies.Health(version=steelyard.__version__)

    @router.get("/heads")
    def show_heads() -> bodies.HeadsAnswer:
        """Which head set is served, and how it is adapted."""
        return bodies.HeadsAnswer(
            head_id=service.head_id,
            task=heads.task,
            members=service.members,
            features=service.width,
            linear=heads.linear() is not None,
            texts=service.reads_texts,
            method=bodies.MethodAnswer(name=method.name, loss=method.loss.name, eta=method.eta, mix=method.mix),
        )

    @router.post("/score")
    def score(body: bodies.ScoreBody) -> bodies.ScoreAnswer:
        """Score items, each for its user."""
        outputs = service.score(body.items, [item.user for item in body.items])
        single = heads.task != "classification"
        return bodies.ScoreAnswer(scores=outputs[:, 0].tolist() if single else outputs.tolist())

    @router.post("/rank")
    def rank(body: bodies.RankBody) -> bodies.RankAnswer:
        """Order candidates for a user, best first."""
        order, scores = service.rank(body.items(), body.user)
        return bodies.RankAnswer(order=order, scores=scores.tolist())

    @router.post("/feedback")
    def feedback(body: bodies.FeedbackBody) -> bodies.FeedbackAnswer:
        """Count a label of a user; the answer is sent when it is on the disk."""
        posterior, repeated = service.feedback(body)
        return bodies.FeedbackAnswer(n=posterior.n, ess=posterior.ess, repeated=repeated)

    @router.post("/query")
    def query(body: bodies.QueryBody) -> bodies.QueryAnswer:
        """Choose which of the offered pairs (or items) to ask a user about."""
        return bodies.QueryAnswer(ask=service.query(body))

    @router.get("/profiles")
    def count() -> bodies.CountAnswer:
        """How many users have a profile; who they are is not kept."""
        return bodies.CountAnswer(users=service.store.count())

    @router.get("/profiles/{user}", response_model=None)
    def export(user: Name, top: Top | None = None) -> Response:
        """Hand out a user's profile: exact, or short with the `top` largest weights."""
        return Response(service.export(user, top), media_type="application/json")

    @router.put("/profiles/{user}")
    def restore(user: Name, body: dict[str, Any] = Body()) -> bodies.KeptAnswer:  # noqa: B008
        """Replace a user's profile by one that was handed out, here or elsewhere, for the same head set."""
        posterior = service.restore(user, json.dumps(body))
        return bodies.KeptAnswer(n=posterior.n, ess=posterior.ess)

    @router.delete("/profiles/{user}")
    def delete(user: Name) -> bodies.DeletedAnswer:
        """Delete all there is of a user, also the keys of labels."""
        return bodies.DeletedAnswer(deleted=service.delete(user))

    app.include_router(router)
    return app
