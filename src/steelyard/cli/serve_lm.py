"""`steelyard serve lm MODEL`: an OpenAI-compatible service over a language model that samples as much as is needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from steelyard import runtime
from steelyard.cli import arguments
from steelyard.errors import require
from steelyard.serve.config import LOCAL
from steelyard.serve.lm_engine import Engine, LMServeConfig


@dataclass(frozen=True)
class ServeLMArguments:
    """Serve a language model in OpenAI's form; each answer is the best of as many samples as it needs.

    docs/serving_lm.md has the endpoints.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Run of `steelyard train self_eval`, a preference run, a name on the hub, a folder, a *.gguf file, "smollm2" or
    "tiny"."""
    name: str | None = None
    """What clients call the model; default: as it is named here."""
    scorer: str | None = None
    """What chooses among samples: self (default of a self-evaluation run), logp, certainty, reward_model:DIR,
    hyre:DIR#profile.json, python:FILE.py:FUNCTION and the other scorers."""
    service: Annotated[LMServeConfig, tyro.conf.arg(name="")] = field(default_factory=LMServeConfig)
    device: str = "cpu"
    """Where the model runs."""
    threads: int = 1
    """CPU threads of the model."""


def serve_lm(argv: list[str]) -> int:
    """Run the command; it ends with SIGTERM or SIGINT (ctrl-C), with status 0."""
    from steelyard.workflows.best_of_n import Answerer, default_policy, open_answerer, require_fit, scorer_of

    for module in ("fastapi", "uvicorn"):  # said before a model is loaded
        require(module, "serve")
    named, rest = arguments.take_option(argv, "--scorer", None)
    default = LMServeConfig(policy=default_policy(named or "self"))
    preset = ServeLMArguments(model=tyro.MISSING, scorer=named, service=default)
    args = tyro.cli(ServeLMArguments, default=preset, prog="steelyard serve lm", args=rest)
    scorer = scorer_of(args.model, args.scorer)
    require_fit(args.service.policy, scorer)
    runtime.prepare(runtime.RuntimeConfig(device=args.device, threads=args.threads))
    from steelyard.serve.lm import serve_lm as serve

    def opened() -> Answerer:
        answerer = open_answerer(args.model, args.scorer, args.device, allow_code=True)
        return replace(answerer, name=args.name or args.model)

    def say(address: str, engine: Engine) -> None:
        print(f"model: {engine.answerer.name}, samples chosen by {engine.answerer.scorer}")
        if args.service.host not in LOCAL and args.service.token is args.service.token_file is None:
            print("warning: without a token, whoever reaches this address can use the model")
        print(
            f"listening at {address} (base_url {address}/v1, documentation {address}/docs); ctrl-C ends it", flush=True
        )

    serve(opened, args.service, say)
    return 0
