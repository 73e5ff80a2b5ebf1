"""Configs: strict round trip of every class, sentences for mistakes, a hash that is the identity of a run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from dataclasses import replace

import pytest

import steelyard
from steelyard.adapt.backbones import FeaturesConfig
from steelyard.bench.suite import SuiteCase, Task
from steelyard.config import Config, config_hash, diff, flatten, from_json, plain, read_config, to_json
from steelyard.data.episode import ArraySpec, Spec
from steelyard.envs.gym import EnvConfig
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import ConfigError
from steelyard.nets.self_eval import SlotConfig
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives import OBJECTIVES, CQLConfig, IQLConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.objectives.preference import DPOConfig
from steelyard.objectives.reward_model import RewardModelConfig
from steelyard.objectives.self_eval import SelfEvalConfig
from steelyard.recipes import RECIPES
from steelyard.report.tables import Claim, ClaimRow
from steelyard.workflows.control import ControlRun


def _classes() -> list[type]:
    for found in pkgutil.walk_packages(steelyard.__path__, "steelyard."):
        importlib.import_module(found.name)
    waiting, classes = [Config], []
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            classes.append(cls)
    return sorted(set(classes), key=lambda cls: (cls.__module__, cls.__name__))


ENV = EnvConfig("X-v0", {"n": 3, "on": True, "text": "a"}, reset_options={"goal": [6, 6], "size": 0.5})
BOX = ArraySpec((2,), low=(-1.0, 0.0), high=(1.0, 2.0), names=("x", "y"))
REQUIRED = {
    "Claim": {"source": "paper", "rows": (ClaimRow("better", "smaller", case="cal_ql", quantity="after"),)},
    "ClaimRow": {"claim": "better", "differs": "smaller", "measured": "not measured"},
    "EnvConfig": {"id": "X-v0"},
    "Suite": {"name": "own", "tasks": {"maze": Task()}, "cases": (SuiteCase("bc", {"kind": "bc"}),)},
    "SuiteCase": {"name": "bc", "objective": {"kind": "bc"}},
    "WalkerConfig": {"action_scale": 0.5},
    "ArraySpec": {"shape": (2,)},
    "Spec": {"observations": {"b": BOX, "a": BOX}, "actions": BOX},
    "ControlArtefact": {"objective": IQLConfig(), "spec": Spec({"observation": BOX}, BOX), "env": ENV},
    "BanditCase": {"objective": DPOConfig()},
    "PreferenceArtefact": {"objective": DPOConfig(), "model": TransformerConfig(), "sampling": SamplingConfig()},
    "AgentConfig": {"run": "runs/agent"},
    "TableSchema": {"columns": ("a",), "categories": {"a": ("x", "y")}, "target": "b"},
    "HeadsArtefact": {"objective": EnsembleConfig(), "backbone": FeaturesConfig(), "width": 4},
    "SelfEvalArtefact": {
        "objective": SelfEvalConfig(),
        "reader": SlotConfig(yes_token=1, no_token=2),
        "model": TransformerConfig(),
    },
    "RewardModelArtefact": {"objective": RewardModelConfig(), "model": TransformerConfig(), "max_tokens": 64},
}
CLASSES = [cls for cls in _classes() if cls.__module__.startswith("steelyard.")]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_round_trip(cls):
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    config = cls(**REQUIRED.get(cls.__name__, {}))
    again = from_json(cls, to_json(config))
    assert again == config
    assert to_json(again) == to_json(config)
    assert config_hash(again) == config_hash(config)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_unknown_keys_are_refused(cls):
    plain = json.loads(to_json(cls(**REQUIRED.get(cls.__name__, {}))))
    with pytest.raises(ConfigError, match=r"^here: unknown key 'no_such_key_zzz'"):
        from_json(cls, json.dumps(plain | {"no_such_key_zzz": 1}), where="here")


@pytest.mark.parametrize("cls", [c for c in CLASSES if not issubclass(c, Claim | ClaimRow)], ids=lambda c: c.__name__)
def test_every_field_is_documented(cls):
    """A string below a field is what `--help` shows."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{cls.__name__}.{field.target.id} has no words"
            assert isinstance(following.value, ast.Constant)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_keeps_its_objective(kind):
    run = ControlRun(objective=OBJECTIVES[kind](), env=ENV)
    again = from_json(ControlRun, to_json(run))
    assert again == run
    assert type(again.objective) is OBJECTIVES[kind]


@pytest.mark.parametrize("name", RECIPES)
def test_presets_round_trip(name):
    for preset in importlib.import_module(f"steelyard.recipes.{name}").PRESETS.values():
        assert from_json(type(preset), to_json(preset)) == preset


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"batchsize": 3}', "here: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ('{"loop": {"log_evry": 3}}', "here: unknown key 'loop.log_evry'; did you mean 'log_every'?"),
        ('{"zzzzzz": 3}', "here: unknown key 'zzzzzz'"),
        ('{"batch_size": "many"}', "here: key 'batch_size': Input should be a valid integer, found 'many'"),
        ('{"batch_size": 3.5}', "here: key 'batch_size': Input should be a valid integer, "),
        ('{"batch_size": "3"}', "here: key 'batch_size': Input should be a valid integer, found '3'"),
        ('{"evaluation": {"renders": 1}}', "here: key 'evaluation.renders': Input should be a valid boolean, found 1"),
        ('{"data": {"rewards": {"horizon": "long"}}}', "here: key 'data.rewards.horizon': Input should be 'finite', "),
        ('{"env": {}}', "here: key 'env.id': "),
        ("{", "here: not JSON: "),
    ],
)
def test_sentences(text, sentence):
    with pytest.raises(ConfigError) as caught:
        from_json(ControlRun, text, where="here")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"kind": "iql", "expectle": 0.3}, ("unknown key", "expectle", "did you mean 'expectile'?")),
        ({"kind": "cql", "cql_wieght": 0.3}, ("unknown key", "cql_wieght", "did you mean 'cql_weight'?")),
        ({"kind": "iql", "network": {"actor_hiden": [8]}}, ("actor_hiden", "did you mean 'actor_hidden'?")),
        ({"kind": "iql", "expectile": "high"}, ("objective", "expectile", "found 'high'")),
        ({"kind": "iqll"}, ("objective", "iqll", "'cal_ql', 'cql'")),
        ({"expectile": 0.3}, ("objective", "kind")),
    ],
)
def test_mistakes_inside_the_objective_are_about_the_one_that_was_meant(objective, words):
    with pytest.raises(ConfigError) as caught:
        from_json(ControlRun, json.dumps({"objective": objective}))
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_absent(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json: no such config file"):
        read_config(ControlRun, tmp_path / "absent.json")


def test_hash():
    run = ControlRun(env=ENV)
    values = json.loads(to_json(run))

    def backwards(value):
        return {k: backwards(value[k]) for k in reversed(value)} if isinstance(value, dict) else value

    assert config_hash(from_json(ControlRun, json.dumps(backwards(values)))) == config_hash(run)
    assert config_hash(replace(run, seed=1)) != config_hash(run)
    assert config_hash(replace(run, objective=CQLConfig())) != config_hash(run)
    assert len(config_hash(run)) == 16
    assert to_json(run).endswith("}\n")


def test_flatten_and_diff():
    left, right = (
        plain(ControlRun()),
        plain(ControlRun(seed=4, objective=IQLConfig(expectile=0.5), env=EnvConfig("X-v0"))),
    )
    flat = flatten(left)
    assert flat["loop.log_every"] == 500
    assert not any(isinstance(value, dict) for value in flat.values())
    found = diff(left, right)
    assert found["seed"] == (0, 4)
    assert found["objective.kind"] == ("cal_ql", "iql")
    assert found["objective.expectile"] == (None, 0.5)
    assert found["env.id"] == (None, "X-v0")
    assert "batch_size" not in found
    assert diff(left, left) == {}
