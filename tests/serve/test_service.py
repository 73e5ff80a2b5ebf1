"""Every endpoint of a running service, and everything it must refuse."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from steelyard.adapt.base import Support
from steelyard.adapt.losses import BradleyTerry
from steelyard.adapt.profile import Profile
from steelyard.adapt.query import acquire
from steelyard.adapt.reweight import HyRe
from steelyard.rng import numpy_generator

from .process import HEADS, httpx, toy
from .toy_service import FEATURES, MEMBERS, toy_heads

TOKEN = "correct horse"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with toy(tmp_path_factory.mktemp("service") / "p.sqlite", max_items=8, max_text=100, max_body_bytes=20_000) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A classification with three classes, behind a token, for two users at most."""
    heads = {"task": "classification", "outputs": 3}
    with toy(tmp_path_factory.mktemp("guarded") / "p.sqlite", heads, token=TOKEN, max_users=2) as one:
        one.client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield one


def features(*texts: str) -> np.ndarray:
    return HEADS.features([""] * len(texts), texts)


def posterior(pairs: list[tuple[str, str]]):
    """What HyRe believes after these pairs, worked out here."""
    chosen, rejected = (HEADS.members(features(*side)) for side in zip(*pairs, strict=True))
    return HyRe().begin(MEMBERS).update(Support(chosen - rejected, np.ones(len(pairs))))


def test_health_and_heads(service):
    health = service.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    answer = service.client.get("/v1/heads").json()
    assert answer["head_id"] == HEADS.head_id
    assert answer["task"] == "preference"
    assert (answer["members"], answer["features"]) == (MEMBERS, FEATURES)
    assert answer["texts"]
    assert answer["linear"]
    assert answer["method"] == {"name": "HyRe", "loss": "bt", "eta": 1.0, "mix": 0.0}


def test_scores_of_mixed_users_in_one_batch(service):
    """Each item with its own user's weights; nobody's and strangers' with the prior's; texts and features alike."""
    pairs = {"mixed-1": [("aaa", "eee"), ("a", "uuu")], "mixed-2": [("eee", "aaa")]}
    for user, given in pairs.items():
        for number, pair in enumerate(given):
            assert service.feedback(user, f"{number}", *pair).status_code == 200
    texts = ["aeiou", "uuu", "aa", "oi"]
    users = ["mixed-1", "mixed-2", None, "stranger"]
    items = [{"completion": text} | ({} if user is None else {"user": user}) for text, user in zip(texts, users)]  # noqa: B905
    items.append({"features": features("ee")[0].tolist(), "user": "mixed-1"})
    scores = service.post("score", {"items": items}).json()["scores"]
    outputs = HEADS.members(features(*texts, "ee"))[:, :, 0]
    prior = np.full(MEMBERS, 1 / MEMBERS)
    one, two = (posterior(pairs[user]).weights() for user in pairs)
    expected = [outputs[row] @ weights for row, weights in enumerate((one, two, prior, prior, one))]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert len(set(np.round(scores, 9))) == 5


def test_prompts_are_read(service):
    body = {"items": [{"prompt": "uu", "completion": "a"}, {"completion": "a"}]}
    with_prompt, without = service.post("score", body).json()["scores"]
    assert with_prompt != without


def test_rank_orders_for_the_user(service):
    service.feedback("ranker", "1", "oooo", "uuuu")
    answer = service.post("rank", {"user": "ranker", "completions": ["u", "o", "a"]}).json()
    expected = HEADS.members(features("u", "o", "a"))[:, :, 0] @ posterior([("oooo", "uuuu")]).weights()
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-12)
    assert answer["order"] == np.argsort(-expected).tolist()
    same = service.post("rank", {"user": "ranker", "features": features("u", "o", "a").tolist()}).json()
    assert same == answer


def test_ties_keep_their_order(service):
    assert service.post("rank", {"completions": ["aa", "aa", "aa"]}).json()["order"] == [0, 1, 2]


def test_feedback_counts_once_and_exactly(service):
    answers = [service.feedback("once", key, "aaa", "eee").json() for key in ("k1", "k1", "k2", "k1")]
    assert [answer["n"] for answer in answers] == [1, 1, 2, 2]
    assert [answer["repeated"] for answer in answers] == [False, True, False, True]
    expected = posterior([("aaa", "eee"), ("aaa", "eee")])
    assert service.evidence("once") == expected.evidence.tolist()
    assert answers[-1]["ess"] == pytest.approx(expected.ess)


def test_the_same_key_with_another_label_is_refused(service):
    assert service.feedback("other", "k", "aaa", "eee").status_code == 200
    answer = service.feedback("other", "k", "eee", "aaa")
    assert answer.status_code == 409
    assert "'k'" in answer.json()["error"]
    assert service.feedback("another", "k", "eee", "aaa").status_code == 200  # keys are each user's own


def test_unsure_labels(service):
    assert service.feedback("unsure", "k", "aaa", "eee", label=0.75).status_code == 200
    members = HEADS.members(features("aaa")) - HEADS.members(features("eee"))
    assert service.evidence("unsure") == BradleyTerry()(members, np.array([0.75]))[0].tolist()


def test_query_is_bald_with_the_users_weights(service):
    sides = [("a", "e"), ("i", "oo"), ("u", "aaa"), ("aei", "o"), ("uu", "ee")]
    body = {"pairs": [{"first": {"completion": one}, "second": {"completion": two}} for one, two in sides], "count": 3}
    members = np.concatenate([HEADS.members(features(a)) - HEADS.members(features(b)) for a, b in sides])
    for user, given in (("query-new", []), ("query-known", [("aaa", "eee")])):
        for pair in given:
            service.feedback(user, "k", *pair)
        weights = posterior(given).weights() if given else np.full(MEMBERS, 1 / MEMBERS)
        expected = acquire(members, weights, 3, "bald", "preference", numpy_generator(0, "query"))
        assert service.post("query", body | {"user": user}).json() == {"ask": expected.tolist()}
    assert len(service.post("query", body | {"how": "joint_bald"}).json()["ask"]) == 3
    assert service.post("query", body | {"count": 6}).status_code == 422
    assert service.post("query", body | {"how": "guess"}).status_code == 422


def test_profile_round_trip(service):
    """Export, delete, import: the same profile, and later labels go on from it."""
    for key, pair in enumerate([("aaa", "eee"), ("ai", "ou")]):
        service.feedback("traveller", str(key), *pair)
    answer = service.client.get("/v1/profiles/traveller")
    assert answer.headers["cache-control"] == "no-store"
    text = answer.text
    Profile.from_json(text).require(HEADS)
    before = service.client.get("/v1/profiles").json()["users"]
    assert service.client.delete("/v1/profiles/traveller").json() == {"deleted": True}
    assert service.client.delete("/v1/profiles/traveller").json() == {"deleted": False}
    assert service.client.get("/v1/profiles/traveller").status_code == 404
    assert service.client.get("/v1/profiles").json()["users"] == before - 1
    headers = {"Content-Type": "application/json"}
    put = service.client.put("/v1/profiles/traveller", content=text, headers=headers)
    assert (put.status_code, put.json()["n"]) == (200, 2)
    assert service.client.get("/v1/profiles/traveller").text == text
    assert service.feedback("traveller", "0", "u", "o").json()["n"] == 3  # the key was deleted too
    short = service.client.get("/v1/profiles/traveller", params={"top": 2}).text
    assert len(json.loads(short)["w"]) == 2
    assert service.client.put("/v1/profiles/short", content=short, headers=headers).json()["n"] == 3


def test_an_import_replaces_and_is_seen_at_once(service):
    service.feedback("replaced", "1", "aaa", "eee")
    service.feedback("model", "1", "eee", "aaa")
    service.post("score", {"items": [{"completion": "a", "user": "replaced"}]})  # known in memory now
    text = service.client.get("/v1/profiles/model").text
    service.client.put("/v1/profiles/replaced", content=text, headers={"Content-Type": "application/json"})
    items = [{"completion": "a", "user": user} for user in ("model", "replaced")]
    one, two = service.post("score", {"items": items}).json()["scores"]
    assert one == two


def test_profiles_of_other_head_sets_and_forged_ones_are_refused(service, guarded):
    service.feedback("mine", "1", "aaa", "eee")
    profile = service.client.get("/v1/profiles/mine").json()
    answer = guarded.client.put("/v1/profiles/x", json=profile)
    assert answer.status_code == 409
    assert "another head set" in answer.json()["error"]
    forged = profile | {"evidence": [0.0] * MEMBERS}
    assert "hash" in service.client.put("/v1/profiles/mine", json=forged).json()["error"]
    for wrong in ({}, {"v": 1}, profile | {"surprise": 1}, profile | {"hash": "\ud800"}):
        answer = service.client.put("/v1/profiles/mine", content=json.dumps(wrong), headers={"content-type": "application/json"})  # noqa: E501  # fmt: skip
        assert answer.status_code == 422
    assert service.client.put("/v1/profiles/mine", json=[1]).status_code == 422
    assert service.client.get("/v1/profiles/mine").json() == profile


def test_classification_and_the_limit_of_users(guarded):
    """Labels are class numbers, scores a list each; a third user is refused, the two known ones go on."""
    item = {"completion": "aie"}
    members = toy_heads(task="classification", outputs=3).members(features("aie"))
    scores = guarded.post("score", {"items": [item]}).json()["scores"]
    np.testing.assert_allclose(scores, members.mean(1))
    for number, user in enumerate(("first", "second", "first")):
        body = {"user": user, "key": str(number), "item": item, "label": 2}
        assert guarded.post("feedback", body).status_code == 200
    logp = members[0] - np.log(np.exp(members[0]).sum(1, keepdims=True))
    np.testing.assert_allclose(guarded.evidence("first"), -2 * logp[:, 2], rtol=1e-12)
    refused = guarded.post("feedback", {"user": "third", "key": "k", "item": item, "label": 2})
    assert refused.status_code == 507
    assert guarded.client.delete("/v1/profiles/second").json()["deleted"]
    assert guarded.post("feedback", {"user": "third", "key": "k", "item": item, "label": 2}).json()["n"] == 1
    for label in (3, -1, 0.5):
        assert guarded.post("feedback", {"user": "first", "key": "x", "item": item, "label": label}).status_code == 422
    assert guarded.feedback("first", "x", "a", "e").status_code == 422  # pairs are for preferences
    assert guarded.post("rank", {"completions": ["a"]}).status_code == 422
    assert guarded.post("query", {"items": [item, {"completion": "u"}]}).json()["ask"] in ([0], [1])


def test_the_token(guarded):
    for authorization in ("", TOKEN, f"Basic {TOKEN}", "Bearer wrong", "Bearer", "Bearer \xe9"):
        headers = {"Authorization": authorization.encode("latin-1")}
        for answer in (
            httpx.get(f"{guarded.address}/v1/heads", headers=headers),
            httpx.delete(f"{guarded.address}/v1/profiles/first", headers=headers),
            httpx.post(f"{guarded.address}/v1/score", headers=headers, content=b"{"),
        ):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in answer.text
    assert httpx.get(f"{guarded.address}/health").status_code == 200


WRONG_BODIES = [
    ("{", 400, "malformed JSON"),
    ("", 422, "expected a body"),
    ("\xff", 400, "UTF-8"),
    ("[" * 9000, 400, "nested too deeply"),
    ('{"items": ' + "[" * 500 + "]" * 500 + "}", 422, "items.0"),
    ('{"items": [{"features": [NaN, 0, 0, 0, 0, 0]}]}', 400, "NaN"),
    ('{"items": [{"features": [0, -Infinity, 0, 0, 0, 0]}]}', 400, "-Infinity"),
    ('{"items": [{"features": [1e999, 0, 0, 0, 0, 0]}]}', 422, "items.0.features.0: input should be a finite number"),
    ('{"items": [{"features": [1e7, 0, 0, 0, 0, 0]}]}', 422, "items.0.features.0"),
    ('{"items": [{"features": ["1", 0, 0, 0, 0, 0]}]}', 422, "items.0.features.0"),
    ('{"items": [{"features": [true, 0, 0, 0, 0, 0]}]}', 422, "items.0.features.0"),
    ('{"items": [{"features": [' + "9" * 4000 + ", 0, 0, 0, 0, 0]}]}", 422, "items.0.features.0"),
    ('{"items": [{"features": [' + "9" * 5000 + ", 0, 0, 0, 0, 0]}]}", 400, "digits"),
    ('{"items": [{"features": [1, 2]}]}', 422, "item 0: expected 6 features, found 2"),
    ('{"items": [{"features": [1, 2], "completion": "x"}]}', 422, "items.0: expected either"),
    ('{"items": [{"features": [1, 2, 3, 4, 5, 6], "prompt": "x"}]}', 422, "features take no prompt"),
    ('{"items": [{}]}', 422, "items.0: expected either a completion or features"),
    ('{"items": []}', 422, "items"),
    ('{"items": {}}', 422, "items"),
    ('{"items": [{"completion": 3}]}', 422, "items.0.completion"),
    ('{"items": [{"completion": null}]}', 422, "items.0"),
    ('{"items": [{"completion": "\\ud800"}]}', 422, "items.0.completion"),
    ('{"items": [{"completion": "x", "colour": 1}]}', 422, "unknown field 'items.0.colour'"),
    ('{"items": [{"completion": "x"}], "\\ud800": 1}', 422, "unicode"),
    ('{"items": [{"completion": "x", "user": "a/b"}]}', 422, "items.0.user: expected 1 to 128"),
    ('{"items": [{"completion": "x", "user": "a\\n"}]}', 422, "items.0.user"),
    ('{"items": [{"completion": "x", "user": "' + "a" * 129 + '"}]}', 422, "items.0.user"),
    ("[]", 422, "body"),
    ("3", 422, "body"),
    ("null", 422, "body"),
    ('{"items": [' + ", ".join(['{"completion": "x"}'] * 9) + "]}", 413, "at most 8 items in a request, found 9"),
    ('{"items": [{"completion": "' + "x" * 101 + '"}]}', 413, "at most 100 characters, found 101"),
    ('{"items": [{"prompt": "' + "x" * 101 + '", "completion": "x"}]}', 413, "at most 100 characters"),
    ('{"items": [{"completion": "' + "x" * 20_000 + '"}]}', 413, "at most 20000 bytes"),
]


@pytest.mark.parametrize(("content", "status", "said"), WRONG_BODIES, ids=[body[:40] for body, _, _ in WRONG_BODIES])
def test_wrong_bodies_are_told_in_one_sentence(service, content, status, said):
    headers = {"Content-Type": "application/json"}
    answer = service.client.post("/v1/score", content=content.encode("latin-1"), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert said in error
    assert "\n" not in error
    assert len(error) <= 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"chosen": {"completion": "a"}}, "expected either chosen and rejected, or item and label"),
        ({"item": {"completion": "a"}}, "expected either"),
        ({"item": {"completion": "a"}, "label": 1}, "trained for preference"),
        ({"chosen": {"completion": "a"}, "rejected": {"completion": "e"}, "label": 1.5}, "between 0 and 1"),
        ({"chosen": {"completion": "a"}, "rejected": {"completion": "e"}, "item": {"completion": "a"}}, "expected"),
        (
            {"chosen": {"completion": "a"}, "rejected": {"completion": "e", "user": "x"}},
            "unknown field 'rejected.user'",
        ),
        ({"chosen": {"completion": "a"}, "rejected": {"completion": "e"}, "key": ""}, "key: expected 1 to 128"),
        ({"chosen": {"completion": "a"}, "rejected": {"completion": "e"}, "user": None}, "user"),
    ],
)
def test_wrong_feedback_leaves_nothing(service, body, said):
    answer = service.post("feedback", {"user": "nobody", "key": "k"} | body)
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert service.client.get("/v1/profiles/nobody").status_code == 404


def test_wrong_kinds_methods_and_paths(service):
    post = service.client.post
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=x"}):
        answer = post("/v1/score", content=b'{"items": [{"completion": "a"}]}', headers=headers)
        assert answer.status_code == 415
    charset = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert post("/v1/score", content=b'{"items": [{"completion": "a"}]}', headers=charset).status_code == 200
    assert service.client.get("/v1/score").json() == {"error": "/v1/score takes no GET"}
    assert service.client.get("/v1/score").status_code == 405
    assert service.client.delete("/v1/profiles").status_code == 405
    assert service.client.get("/v1/nothing").status_code == 404
    for user in ("a%2Fb", "..%2f", "-x", "%00", "a%0A", "x" * 200):
        assert service.client.get(f"/v1/profiles/{user}").status_code in (404, 422)
    for top in ("0", "x", "1.5", ""):
        assert service.client.get(f"/v1/profiles/x?top={top}").status_code == 422


def test_a_body_without_announced_length_is_limited_too(service):
    """Chunks are counted as they come; the client hears 413 also where it goes on sending."""

    def chunks():
        for _ in range(300):
            yield b"x" * 10_000

    answer = service.client.post("/v1/score", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert service.client.get("/health").status_code == 200


def test_bytes_that_are_no_http(service):
    host, port = service.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x00\x01nonsense\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000)
        assert b" 400 " in connection.recv(100)
    assert service.client.get("/health").status_code == 200


def test_cors_is_off(service):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = service.client.options("/v1/score", headers=headers)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_openapi_and_its_page(service):
    assert "swagger" in service.client.get("/docs").text.lower()
    schema = service.client.get("/openapi.json").json()
    assert {path: sorted(found) for path, found in schema["paths"].items()} == {
        "/health": ["get"], "/v1/heads": ["get"], "/v1/score": ["post"], "/v1/rank": ["post"],
        "/v1/feedback": ["post"], "/v1/query": ["post"], "/v1/profiles": ["get"],
        "/v1/profiles/{user}": ["delete", "get", "put"],
    }  # fmt: skip


def test_a_fault_of_a_backbone_says_nothing_of_the_text(service):
    """Neither to the client nor in the log; requests that were read together with it are answered."""
    answer = service.post("score", {"items": [{"completion": "raise"}]})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    log = service.log.read_text()
    assert "a fault of the service: RuntimeError" in log
    assert "secret" not in log.replace('raise RuntimeError("the secret text")', "")
