"""The reward service's routes; `serve/web.py` has what every service shares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from steelyard.serve import bodies
from steelyard.serve.bodies import NAME_RULE, Name, Top
from steelyard.serve.service import RewardService
from steelyard.serve.web import bare_app

if TYPE_CHECKING:
    from fastapi import FastAPI


def build_app(service: RewardService, token: str | None = None) -> FastAPI:
    """Return the application; it closes the service when it ends.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    config, heads, method = service.config, service.heads, service.method
    app, router = bare_app(
        "steelyard serve reward",
        "Rewards for each user, from a trained head set and a few labels.",
        config,
        token,
        service.close,
        lambda _, text: {"error": text},
        bodies.Problem,
        pattern_rule=NAME_RULE,
    )
    from fastapi import Body, Response

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
