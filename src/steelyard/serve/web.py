"""What services share: bodies with limits, tokens, overload, and errors of one sentence. FastAPI does the HTTP."""

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
from steelyard.serve.bodies import Health
from steelyard.serve.config import HttpConfig, RefusedError

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI, Request, Response
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


async def read_body(request: Request, config: HttpConfig) -> bytes:
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


def guarded_route(config: HttpConfig, token: str | None) -> type[APIRoute]:
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


def sentence(errors: list[dict[str, Any]], pattern_rule: str = "expected another form") -> str:
    """Return the first fault that pydantic found, without the value that was sent."""
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
    if error["type"] == "extra_forbidden":
        return f"unknown field {where!r}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {pattern_rule}"
    if error["type"] == "missing":
        return f"missing field {where!r}" if where != "body" else "expected a body of JSON, found none"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}"


def bare_app(
    title: str,
    description: str,
    config: HttpConfig,
    token: str | None,
    close: Callable[[], None],
    problem: Callable[[int, str], Any],
    model: type,
    invalid: int = 422,
    pattern_rule: str = "",
) -> tuple[FastAPI, APIRouter]:
    """Return an application without endpoints and the router of its guarded ones, to be included when it has them.

    Args:
        title: of the documentation.
        description: of the documentation.
        config: limits.
        token: what clients must send; None: nothing.
        close: called when the application ends.
        problem: (status, sentence) -> body of an error.
        model: pydantic's class of that body.
        invalid: status of a body that is not as described, and of the library's own refusals.
        pattern_rule: what names must look like, in words.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    require("fastapi", "serve")
    import anyio.to_thread
    from fastapi import APIRouter, FastAPI, Security
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        # endpoints wait in threads for the backbone and the disk, one each
        anyio.to_thread.current_default_thread_limiter().total_tokens = config.max_pending + 1
        yield
        await anyio.to_thread.run_sync(close)

    def answer(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        again = {"Retry-After": str(RETRY_SECONDS)}
        extra = {503: again, 429: again, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
        text = text[:LONGEST].encode(errors="replace").decode()  # what was sent may be quoted in it
        return JSONResponse(problem(status, text), status, {**(headers or {}), **extra})

    app = FastAPI(
        title=title,
        version=steelyard.__version__,
        description=description,
        lifespan=life,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": model}, "5XX": {"model": model}},
    )

    @app.exception_handler(SteelyardError)
    async def _refused(_: Request, error: SteelyardError) -> Response:
        return answer(error.status if isinstance(error, RefusedError) else invalid, str(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return answer(invalid, sentence(list(error.errors()), pattern_rule))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        words = {404: f"there is no {request.url.path}", 405: f"{request.url.path} takes no {request.method}"}
        return answer(error.status_code, words.get(error.status_code, str(error.detail)), dict(error.headers or {}))

    app.router.route_class = guarded_route(config, token)
    router = APIRouter(
        prefix="/v1",
        route_class=app.router.route_class,
        dependencies=[] if token is None else [Security(HTTPBearer(auto_error=False))],
    )

    @app.get("/health")
    def health() -> Health:
        """Whether the service answers."""
        return Health(version=steelyard.__version__)

    return app, router
