"""`steelyard serve reward`: head sets from disk, what it prints, and mistakes told in one sentence."""

from __future__ import annotations

import signal
import socket
import sys

import numpy as np
import pytest

from steelyard.adapt.artefact import AdaptSettings, HeadsArtefact, load_heads, save_heads
from steelyard.adapt.backbones import FeaturesConfig, WordsConfig
from steelyard.adapt.base import Support
from steelyard.adapt.head_set import margins
from steelyard.cli.main import main
from steelyard.errors import ConfigError, MissingExtraError
from steelyard.nets.ensemble import HeadsConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.serve.config import ServeConfig
from steelyard.serve.server import listen, read_token, serve
from steelyard.serve.service import RewardService

from .process import Process

OBJECTIVE = EnsembleConfig(heads=HeadsConfig(num_heads=5))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A head set that reads texts, and would rather adapt by another method."""
    artefact = HeadsArtefact(OBJECTIVE, WordsConfig(16), width=16, adapt=AdaptSettings("gaussian", eta=2.0))
    return save_heads(tmp_path_factory.mktemp("words"), artefact)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A head set over rows of 3 numbers, with a hidden layer of 4."""
    artefact = HeadsArtefact(OBJECTIVE, FeaturesConfig(), width=3, trunk=(4,))
    return save_heads(tmp_path_factory.mktemp("numbers"), artefact)


def served(folder, store, *options: str) -> Process:
    command = [sys.executable, "-m", "steelyard.cli.main", "serve", "reward", str(folder), "--port", "0"]
    return Process([*command, "--store", str(store), *options], store.with_suffix(".log"))


def test_a_head_set_from_disk(words, tmp_path):
    """Feedback and scores equal the library's own; it ends with status 0 at ctrl-C."""
    token = tmp_path / "token"
    token.write_text("long enough\n")
    heads = load_heads(words)
    with served(words, tmp_path / "p.sqlite", "--token-file", str(token)) as service:
        assert f"head set: {heads.head_id} (preference, 6 members)" in service.said
        assert f"store: {tmp_path}/p.sqlite, 0 users" in service.said
        assert "note: its settings name gaussian; the service adapts by HyRe (eta 2)" in service.said
        assert f"listening at {service.address}" in service.said
        assert "long enough" not in service.said
        assert service.client.get("/v1/heads").status_code == 401
        service.client.headers["Authorization"] = "Bearer long enough"
        assert service.client.get("/v1/heads").json()["method"]["eta"] == 2.0
        assert service.feedback("ann", "k", "green tea", "a cup of coffee").status_code == 200
        answer = service.post("score", {"items": [{"completion": "black tea", "user": "ann"}]}).json()
        assert service.signal(signal.SIGINT) == 0
    first, second, asked = heads.features([""] * 3, ["green tea", "a cup of coffee", "black tea"])[:, None]
    method = AdaptSettings(eta=2.0).build("preference", np.ones(6))
    posterior = method.begin(6).update(Support(margins(heads, first, second), np.ones(1)))
    np.testing.assert_allclose(answer["scores"], posterior.combination().apply(heads.members(asked))[:, 0])


def test_heads_over_numbers_take_rows(numbers, tmp_path):
    """Rows go through what was trained before the heads; texts are refused in one sentence."""
    heads = load_heads(numbers)
    rows = np.random.default_rng(0).normal(size=(4, 3))
    with served(numbers, tmp_path / "p.sqlite") as service:
        about = service.client.get("/v1/heads").json()
        assert (about["features"], about["texts"]) == (3, False)
        scores = service.post("score", {"items": [{"features": row.tolist()} for row in rows]}).json()["scores"]
        np.testing.assert_allclose(scores, heads.members(heads.rows(rows)).mean(1)[:, 0], rtol=1e-6)
        answer = service.post("score", {"items": [{"completion": "x"}]})
        assert answer.status_code == 422
        assert answer.json() == {"error": "item 0: these heads read no texts; send features"}
        assert "expected 3 features, found 4" in service.post("rank", {"features": [[0.0] * 4]}).json()["error"]


def run(capsys, *words: object) -> tuple[int, str, str]:
    try:
        status = main(["serve", *map(str, words)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


def test_mistakes(words, numbers, tmp_path, capsys):
    other = tmp_path / "songs.sqlite"
    other.write_text("la la la " * 1000)
    (tmp_path / "empty").mkdir()
    cases = [
        (["rewrad"], "did you mean 'reward'?"),
        (["reward", tmp_path / "nowhere"], "nowhere"),
        (["reward", tmp_path / "empty"], "empty"),
        (["reward", words, "--store", tmp_path / "no" / "p.sqlite"], "there is no folder"),
        (["reward", words, "--port", 0, "--store", other], "not an SQLite database"),
        (["reward", words, "--port", 70000], "port must be between 0 and 65535, found 70000"),
        (["reward", words, "--max-items", 0], "max_items must be above 0, found 0"),
        (["reward", words, "--token", "short"], "at least 8 printable"),
        (["reward", words, "--token-file", tmp_path / "none"], "No such file"),
        (["reward", words, "--token", "long enough", "--token-file", "x"], "exclude each other"),
        (["reward", words, "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
    ]
    for arguments, said in cases:
        if "--store" not in arguments:
            arguments += ["--store", tmp_path / "p.sqlite"]
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, ""), arguments
        assert said in err.replace("\n", " "), arguments
    assert run(capsys)[0] == 2
    assert run(capsys, "--help")[0] == 0
    status, out, _ = run(capsys, "reward", "--help")
    assert status == 0
    assert all(f"--{option}" in out for option in ("host", "port", "store", "token-file", "max-pending", "threads"))


def test_a_store_of_another_head_set(words, numbers, tmp_path, capsys):
    RewardService(load_heads(words), ServeConfig(store=str(tmp_path / "p.sqlite"))).close()
    status, _, err = run(capsys, "reward", numbers, "--port", 0, "--store", tmp_path / "p.sqlite")
    assert status == 2
    assert "its profiles are of the head set sha256:" in err
    assert err.count("\n") == 1


def test_port_in_use_and_free_ports():
    with listen(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        assert port > 0
        assert taken.proto == socket.IPPROTO_TCP  # else asyncio leaves answers to Nagle's algorithm, 40 ms each
        with pytest.raises(ConfigError, match=rf"^cannot listen at 127\.0\.0\.1 port {port}: Address already in use$"):
            listen(ServeConfig(port=port))
    if socket.has_ipv6:
        with listen(ServeConfig(host="::1", port=0)) as six:
            assert six.family == socket.AF_INET6


@pytest.mark.parametrize("token", ["short", "with\nline break", "ünprintable", "        "])
def test_tokens_that_are_none(token):
    with pytest.raises(ConfigError, match="the token"):
        read_token(ServeConfig(token=token))


def test_without_the_extra(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    status, _, err = run(capsys, "reward", words, "--store", tmp_path / "p.sqlite")
    assert status == 2
    assert "fastapi is not installed; install it with: pip install 'steelyard[serve]'" in err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError):
        serve(load_heads(words), ServeConfig(store=str(tmp_path / "q.sqlite")))
    assert not (tmp_path / "q.sqlite").exists()
