"""`steelyard serve reward DIR`: answer HTTP requests with a trained head set; `serve lm` is in `cli/serve_lm.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from steelyard import runtime
from steelyard.errors import ConfigError, near, require
from steelyard.serve.config import LOCAL, ServeConfig

USAGE = """usage: steelyard serve reward DIR [OPTIONS]
       steelyard serve lm MODEL [OPTIONS]

Answer HTTP requests: rewards for each user, from a trained head set and a few labels (reward); answers of a language
model in OpenAI's form, with as many samples as each needs (lm).

`steelyard serve reward --help` and `steelyard serve lm --help` list the options.
"""


@dataclass(frozen=True)
class ServeArguments:
    """Serve a trained head set: score, rank, feedback, query, profiles (docs/serving.md)."""

    heads: Annotated[str, tyro.conf.Positional]
    """Run directory, checkpoint or saved head set."""
    service: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    threads: int = 1
    """CPU threads of the backbone."""


def main(argv: list[str]) -> int:
    """Run the command; it ends with SIGTERM or SIGINT (ctrl-C), with status 0."""
    if argv and argv[0] == "lm":
        from steelyard.cli.serve_lm import serve_lm

        return serve_lm(argv[1:])
    if not argv or argv[0] != "reward":
        if argv and argv[0] not in ("-h", "--help"):
            raise ConfigError(f"unknown service {argv[0]!r}; {near(argv[0], ['reward', 'lm'])}")
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    arguments = tyro.cli(ServeArguments, prog="steelyard serve reward", args=argv[1:])
    for module in ("fastapi", "uvicorn"):  # said before a backbone is loaded
        require(module, "serve")
    runtime.prepare(runtime.RuntimeConfig(threads=arguments.threads))
    from steelyard.adapt.artefact import load_heads
    from steelyard.adapt.backbones import reads_text
    from steelyard.adapt.reweight import HyRe
    from steelyard.serve.server import serve
    from steelyard.serve.service import RewardService

    heads = load_heads(arguments.heads)
    settings = replace(heads.settings, method="hyre")
    method = settings.build(heads.task, heads.learner.head.variance.double().numpy())
    assert isinstance(method, HyRe)
    rows = None if reads_text(heads.artefact.backbone) else (heads.artefact.width, heads.rows)

    def say(address: str, service: RewardService) -> None:
        print(f"head set: {service.head_id} ({heads.task}, {heads.num_members} members)")
        print(f"store: {service.store.path.resolve()}, {service.store.count()} users")
        if heads.settings.method != "hyre":
            print(f"note: its settings name {heads.settings.method}; the service adapts by HyRe (eta {method.eta:g})")
        if arguments.service.host not in LOCAL and arguments.service.token is arguments.service.token_file is None:
            print("warning: without a token, whoever reaches this address can read and delete profiles")
        print(f"listening at {address} (documentation at {address}/docs); ctrl-C ends it", flush=True)

    serve(heads, arguments.service, method, rows, say)
    return 0
