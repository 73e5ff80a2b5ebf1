"""An OpenAI-compatible service over one language model that samples as much as each request needs.

`POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`. A request may carry the extra field `steelyard`
(`lm_bodies.Wanted`): a budget, thresholds, and whether decisions are streamed. The answer's `usage.steelyard` says what
was spent.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steelyard.adapt.best_of_n import Event
from steelyard.adapt.compute_policy import Draw, Trace
from steelyard.config import plain
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import SteelyardError, require
from steelyard.serve.config import RefusedError
from steelyard.serve.lm_bodies import ChatBody, CompletionBody, Problem, problem
from steelyard.serve.lm_engine import CANCELLED, Engine, LMServeConfig, Order, Told
from steelyard.serve.server import listen, read_token, run
from steelyard.serve.web import bare_app
from steelyard.workflows.best_of_n import Answerer, cost_of, require_fit

if TYPE_CHECKING:
    from fastapi import FastAPI, Response

EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
"""Headers of a stream."""


def serve_lm(
    open_answerer: Callable[[], Answerer],
    config: LMServeConfig,
    on_listening: Callable[[str, Engine], None] | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; those that were accepted are finished first.

    Args:
        open_answerer: loads the model; called when the port is taken.
        config: where, and how much.
        on_listening: told the address and the engine, once requests are taken.

    Raises:
        ConfigError: the port is in use, the token cannot be read, or the policy does not fit the scorer.
        MissingExtraError: the extra `serve` is not installed.
    """
    for module in ("fastapi", "uvicorn"):  # before a model is loaded
        require(module, "serve")
    token = read_token(config)
    with listen(config) as listening:
        engine = Engine(open_answerer(), config)

        def say(address: str) -> None:
            if on_listening is not None:
                on_listening(address, engine)

        run(build_lm_app(engine, token), config, listening, say)


def build_lm_app(engine: Engine, token: str | None = None) -> FastAPI:
    """Return the application; it closes the engine when it ends.

    Raises:
        ConfigError: the policy does not fit the scorer.
        MissingExtraError: the extra `serve` is not installed.
    """
    config, answerer = engine.config, engine.answerer
    require_fit(config.policy, answerer.scorer)
    app, router = bare_app(
        "steelyard serve lm",
        "Answers of a language model, with as many samples as each needs.",
        config,
        token,
        engine.close,
        problem,
        Problem,
        invalid=400,
    )
    reply = _reply_class(engine)
    reading = threading.Lock()  # a tokenizer remembers its last prompt
    born = int(time.time())

    def model() -> dict[str, Any]:
        about = {"scorer": answerer.scorer, "policy": plain(config.policy), "max_samples": config.max_samples}
        about |= {"max_new_tokens": config.max_new_tokens, "max_prompt_tokens": config.max_prompt_tokens}
        return {"id": answerer.name, "object": "model", "created": born, "owned_by": "steelyard", "steelyard": about}

    def order(body: ChatBody | CompletionBody) -> Order:
        require_model(body.model)
        with reading:
            tokens = answerer.tokenizer.prompt(body.prompt())
        return _order(body, tuple(tokens), answerer, config)

    def require_model(name: str) -> None:
        if name != answerer.name:
            raise RefusedError(404, f"there is no model {name!r}; this service has {answerer.name!r}")

    @router.get("/models")
    def show_models() -> dict[str, Any]:
        """The one model that is served, and how it is sampled."""
        return {"object": "list", "data": [model()]}

    @router.get("/models/{name:path}")
    def show_model(name: str) -> dict[str, Any]:
        """The model that is served."""
        require_model(name)
        return model()

    @router.post("/chat/completions", response_model=None)
    def chat(body: ChatBody) -> Any:
        """Answer a conversation."""
        return reply(Form(answerer.name, True), order(body), body)

    @router.post("/completions", response_model=None)
    def complete(body: CompletionBody) -> Any:
        """Continue a text."""
        return reply(Form(answerer.name, False), order(body), body)

    app.include_router(router)
    return app


def _order(
    body: ChatBody | CompletionBody, tokens: tuple[int, ...], answerer: Answerer, config: LMServeConfig
) -> Order:
    """Return what a request asks for.

    Raises:
        RefusedError: it asks for more than the service gives.
        ConfigError: its policy is none, or does not fit the scorer.
    """
    policy = body.policy(config.policy)
    require_fit(policy, answerer.scorer)
    if policy.budget.max_samples > config.max_samples:
        found = policy.budget.max_samples
        raise RefusedError(400, f"steelyard.budget.max_samples: expected at most {config.max_samples}, found {found}")
    if len(tokens) > config.max_prompt_tokens:
        raise RefusedError(400, f"the prompt has {len(tokens)} tokens; expected at most {config.max_prompt_tokens}")
    context = answerer.model.context
    extra = 0 if answerer.evaluator is None else answerer.evaluator.extra_tokens  # the question must fit in too
    room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(tokens) - extra)
    if room < 1:
        raise RefusedError(400, f"the prompt has {len(tokens)} tokens; expected less than {context}, the context")
    limit = body.limit
    if limit is None:
        limit = min(config.new_tokens, room, policy.budget.max_tokens or room)
    elif limit > room:
        raise RefusedError(400, f"max_tokens: expected at most {room} after this prompt, found {limit}")
    sampling = SamplingConfig(top_p=body.top_p or 1.0, max_new_tokens=limit)
    seed = secrets.randbits(53) if body.seed is None else body.seed  # 53: a number of JSON
    return Order(body.prompt(), tokens, policy, sampling, seed)


# ------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Form:
    """OpenAI's form of an answer: of a conversation, or of a text."""

    model: str
    chat: bool
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _base(self, chunk: bool) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        kind += ".chunk" if chunk and self.chat else ""
        return {"id": f"{prefix}-{self.key}", "object": kind, "created": self.created, "model": self.model}

    def whole(self, trace: Trace, usage: dict[str, Any]) -> dict[str, Any]:
        """Return an answer in one piece."""
        draw = trace.draws[trace.chosen]
        text = {"message": {"role": "assistant", "content": draw.text}} if self.chat else {"text": draw.text}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": reason(draw)}
        return {**self._base(False), "choices": [choice], "usage": usage}

    def piece(self, text: str | None, finish: str | None = None, first: bool = False, **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
            choice: dict[str, Any] = {"index": 0, "delta": delta}
        else:
            choice = {"index": 0, "text": text or ""}
        choice |= {"logprobs": None, "finish_reason": finish}
        return {**self._base(True), "choices": [choice], **more}

    def spent(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk with the usage."""
        return {**self._base(True), "choices": [], "usage": usage}


def reason(draw: Draw) -> str:
    """Return why an answer ends where it does."""
    return "stop" if draw.finished else "length"


def usage_of(order: Order, trace: Trace) -> dict[str, Any]:
    """Return what was spent: OpenAI's counts are those of the chosen answer, ours of everything."""
    chosen = trace.draws[trace.chosen]
    prompt, completion = len(order.tokens), len(chosen.tokens)
    spent = {**cost_of(trace), "score": _number(chosen.score), "seed": order.seed}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "steelyard": spent,
    }


def told(event: Event) -> dict[str, Any]:
    """Return a decision as JSON values."""
    found: dict[str, Any] = {"event": event.kind, "wave": event.wave}
    if event.kind == "started":
        found["started"] = [request.sample for request in event.requests]
        found["temperatures"] = [request.temperature for request in event.requests]
    if event.draw is not None:
        draw = event.draw
        found |= {"sample": draw.request.sample, "score": _number(draw.score), "tokens": draw.decoded}
        found |= {"text": draw.text, "finished": draw.finished}
    if event.trace is not None:
        found |= {"chosen": event.trace.draws[event.trace.chosen].request.sample, **cost_of(event.trace)}
    return found


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class Unfolding:
    """Text of tokens that come one by one; half a character waits for its other half."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.tokens, self.sent = decode, list[int](), ""

    def add(self, token: int) -> str:
        """Return what is new and will not change."""
        self.tokens.append(token)
        return self._new(self.decode(self.tokens).rstrip("\N{REPLACEMENT CHARACTER}"))

    def rest(self, text: str) -> str:
        """Return what is missing of the whole text."""
        return self._new(text)

    def _new(self, text: str) -> str:
        if not text.startswith(self.sent):
            return ""
        new = text[len(self.sent) :]
        self.sent = text
        return new


async def chunks(
    form: Form,
    order: Order,
    inbox: asyncio.Queue[Told],
    decode: Callable[[list[int]], str],
    decisions: bool,
    usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a stream.

    A request for a single sample is streamed token by token. Which of several is the answer is known at the end only,
    so it comes in one piece, after the decisions where they were asked for.

    Raises:
        SteelyardError: what the job ended with; before the first chunk where it could not begin.
    """
    text, begun = Unfolding(decode), False
    while (item := await inbox.get()) is not None:
        if isinstance(item, SteelyardError):
            raise item
        if not begun:
            yield form.piece("", first=True)
            begun = True
        if isinstance(item, int):
            new = text.add(item)
            if new:
                yield form.piece(new)
            continue
        if decisions:
            yield form.piece(None, steelyard=told(item))
        if item.trace is not None:
            chosen = item.trace.draws[item.trace.chosen]
            rest = text.rest(chosen.text)
            if rest:
                yield form.piece(rest)
            yield form.piece(None, reason(chosen))
            if usage:
                yield form.spent(usage_of(order, item.trace))


def _reply_class(engine: Engine) -> Callable[[Form, Order, ChatBody | CompletionBody], Response]:
    """Return the class of answers that do the work when they are sent, and stop it when the client has left."""
    from starlette.responses import JSONResponse, Response

    decode = engine.answerer.tokenizer.decode

    class Reply(Response):
        def __init__(self, form: Form, order: Order, body: ChatBody | CompletionBody) -> None:
            super().__init__()
            self.form, self.order, self.asked = form, order, body

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            loop = asyncio.get_running_loop()
            inbox: asyncio.Queue[Told] = asyncio.Queue()

            def tell(item: Told) -> None:
                loop.call_soon_threadsafe(inbox.put_nowait, item)

            job = engine.submit(self.order, tell)

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                job.cancel()

            watching = asyncio.create_task(watch())
            try:
                await (self._stream(inbox, send) if self.asked.stream else self._whole(inbox, scope, receive, send))
            except RefusedError as refusal:
                if refusal.status != CANCELLED:
                    raise
            finally:
                job.cancel()
                watching.cancel()

        async def _whole(self, inbox: asyncio.Queue[Told], scope: Any, receive: Any, send: Any) -> None:
            while (item := await inbox.get()) is not None:
                if isinstance(item, SteelyardError):
                    raise item
                if isinstance(item, Event) and item.trace is not None:
                    answer = self.form.whole(item.trace, usage_of(self.order, item.trace))
            await JSONResponse(answer, headers={"Cache-Control": "no-store"})(scope, receive, send)

        async def _stream(self, inbox: asyncio.Queue[Told], send: Any) -> None:
            options = self.asked.stream_options
            usage = options is not None and options.include_usage
            found = chunks(self.form, self.order, inbox, decode, self.asked.steelyard.decisions, usage)
            begun = False
            try:
                async for chunk in found:
                    if not begun:  # what cannot begin is answered with a status of its own
                        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                        begun = True
                    await send(_line(json.dumps(chunk, ensure_ascii=False)))
            except SteelyardError as error:
                status = error.status if isinstance(error, RefusedError) else 400
                if not begun or status == CANCELLED:
                    raise
                await send(_line(json.dumps(problem(status, str(error)))))
            await send(_line("[DONE]", last=True))

    return Reply


def _line(data: str, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": not last}
