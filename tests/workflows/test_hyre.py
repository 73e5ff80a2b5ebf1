"""Head sets from file to artefact: they adapt to unseen users, resume exactly and load as they were trained."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from steelyard.adapt.artefact import AdaptSettings, HeadsArtefact, load_heads, save_heads
from steelyard.adapt.backbones import AgentConfig, FeaturesConfig, TableBackboneConfig, WordsConfig, read_texts
from steelyard.adapt.base import Support
from steelyard.adapt.head_set import HeadSet, margins
from steelyard.adapt.losses import GaussianNLL
from steelyard.adapt.population import GaussianHeads
from steelyard.adapt.profile import write_profile
from steelyard.adapt.reweight import HyRe, adapt
from steelyard.artefact import ControlArtefact
from steelyard.cli import train_hyre
from steelyard.cli.main import main
from steelyard.config import from_json, plain, to_json
from steelyard.data.episode import ArraySpec, Spec
from steelyard.data.labelled_files import LabelledDataConfig, hold_out, read_examples
from steelyard.envs.scorers import scorer_from_name
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.nets.encoder import EncoderConfig
from steelyard.nets.ensemble import HeadsConfig
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig
from steelyard.objectives import CQLConfig, DiscreteCQLConfig, build_learner
from steelyard.objectives.actor_critic import DataStatistics, NetworkConfig
from steelyard.objectives.discrete_cql import DiscreteNetworkConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.rng import torch_generator
from steelyard.train import checkpoint
from steelyard.train.loop import Interrupted, LoopConfig
from steelyard.workflows import hyre
from steelyard.workflows.hyre import HyReRun
from steelyard.workflows.hyre_evaluation import AdaptationConfig

from .kill import differences, everything

NEUTRAL = ["a", "model", "answer", "with", "some", "words", "about", "this", "topic"]
STYLES = (("regards", "furthermore"), ("yo", "dude"), ("42", "99"))
SMALL = AdaptationConfig(labels=(1, 5), draws=2)


def styled(style: int, generator: np.random.Generator) -> str:
    words = list(generator.choice(NEUTRAL, 6))
    return " ".join([*words, *STYLES[style]])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """12 users with 24 pairs each; half like the first style best and the third least, half the other way round."""
    path, generator = tmp_path_factory.mktemp("data") / "pairs.jsonl", np.random.default_rng(0)
    rows = []
    for user in range(12):
        for number in range(24):
            a, b = sorted(generator.choice(3, 2, replace=False), reverse=user % 2)
            rows.append(
                {
                    "prompt": f"question {number}",
                    "chosen": styled(a, generator),
                    "rejected": styled(b, generator),
                    "user": f"user{user}",
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def few_pairs(pairs, tmp_path_factory) -> Path:
    """The first 8 pairs of 4 users, for models that take their time."""
    path, lines = tmp_path_factory.mktemp("data") / "few.jsonl", pairs.read_text().splitlines(keepends=True)
    path.write_text("".join(line for user in range(4) for line in lines[24 * user : 24 * user + 8]))
    return path


def run_of(path: Path, **changes) -> HyReRun:
    """User heads on hashed words, in 30 updates."""
    config = HyReRun(
        objective=EnsembleConfig(
            shares="one_group", heads=HeadsConfig(init_scale=0.0), head_learning_rate=0.02, l2=1e-3
        ),
        backbone=WordsConfig(64),
        data=LabelledDataConfig(str(path), group_column="user", held_out=("user0", "user1", "user4", "user5")),
        adaptation=SMALL,
        steps=30,
        loop=LoopConfig(log_every=10, checkpoint_every=10),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """Return (run directory, the parts that trained it)."""
    kept = {}
    inner = hyre._train

    def remembered(run, parts, found, quiet):
        kept["parts"] = parts
        inner(run, parts, found, quiet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyre, "_train", remembered)
        run = hyre.start(run_of(pairs), tmp_path_factory.mktemp("run") / "run", quiet=True)
    return run, kept["parts"]


def rows_of(run: Path, step: int | None = None) -> list[dict]:
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    last = max(row["update_step"] for row in rows) if step is None else step
    return [row for row in rows if row["update_step"] == last]


def mean_of(run: Path, method: str, n: int) -> float:
    return float(np.mean([row["value"] for row in rows_of(run) if (row["method"], row["n"]) == (method, n)]))


# ------------------------------------------------------------------------------------------------ whole runs


def test_user_heads_adapt_to_users_that_none_has_seen(trained):
    run, parts = trained
    assert mean_of(run, "hyre", 5) > 0.9
    assert mean_of(run, "single", 5) < 0.7  # half of the users like the opposite
    rows = rows_of(run)
    assert {row["group"] for row in rows} == {"user0", "user1", "user4", "user5"}
    assert {(row["method"], row["n"]) for row in rows} == {
        (method, n) for method in ("single", "uniform") for n in (0, 1, 5)
    } | {(method, n) for method in ("hyre", "gaussian", "best") for n in (1, 5)}
    assert all(row["length"] == SMALL.draws * (24 - row["n"]) for row in rows if row["n"])  # drawn ones are not scored
    assert parts.config.objective.heads.num_heads == 8
    assert parts.artefact.names == ("pooled", *parts.train.names)
    assert not set(parts.train.names) & {"user0", "user1", "user4", "user5"}


def test_a_run_says_whether_adaptation_can_help(trained):
    run, _ = trained
    diversity = json.loads((run / "diversity.json").read_text())
    adaptation = json.loads((run / "adaptation.json").read_text())
    assert diversity["sentence"] in (run / "events.log").read_text()
    assert adaptation["settings"] == plain(load_heads(run).settings)
    assert "on 4 held-out groups" in adaptation["sentences"][0]


def test_settings_of_a_group_are_chosen_on_others(trained, monkeypatch):
    _, parts = trained
    from steelyard.workflows import hyre_evaluation

    seen = []
    inner = hyre_evaluation.choose
    monkeypatch.setattr(
        hyre_evaluation, "choose", lambda tasks, *args: seen.append({one.name for one in tasks}) or inner(tasks, *args)
    )
    tasks = parts.tasks()
    hyre_evaluation.cross_fitted(tasks, SMALL, "preference", np.ones(9), 0)
    for number, task in enumerate(tasks):
        assert task.name not in seen[number % 2]
    assert seen[0] | seen[1] == {task.name for task in tasks}


def start_and_interrupt(config, run, at, monkeypatch):
    """Begin a run and press ctrl-C while it draws the batch of update `at`."""
    inner = hyre.LabelledSource.batch

    def pressed(source, step):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return inner(source, step)

    with monkeypatch.context() as patch:
        patch.setattr(hyre.LabelledSource, "batch", pressed)
        with pytest.raises(Interrupted):
            hyre.start(config, run, quiet=True)


def test_an_interrupted_run_resumes_bit_for_bit(pairs, tmp_path, monkeypatch):
    config = run_of(pairs, objective=replace(run_of(pairs).objective, shares="groups"), trunk=(8,))
    start_and_interrupt(config, tmp_path / "run", 16, monkeypatch)
    assert (tmp_path / "run/checkpoints/step_00000017").is_dir()
    hyre.resume(tmp_path / "run", quiet=True)
    hyre.start(config, tmp_path / "whole", quiet=True)
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "run")) == []
    assert load_heads(tmp_path / "run").head_id == load_heads(tmp_path / "whole").head_id


def test_a_resume_refuses_other_data(pairs, tmp_path, monkeypatch):
    copy = tmp_path / "pairs.jsonl"
    copy.write_bytes(pairs.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(hyre.LabelledSource, "batch", lambda source, step: signal.raise_signal(signal.SIGINT))
        with pytest.raises((Interrupted, AttributeError)):
            hyre.start(run_of(copy), tmp_path / "run", quiet=True)
    copy.write_text(copy.read_text().replace("question 3", "question 33"))
    with pytest.raises(DataError, match="not the data that"):
        hyre.resume(tmp_path / "run", quiet=True)


def test_a_finished_run_is_left_alone(trained):
    run, _ = trained
    before = (run / "metrics.jsonl").read_bytes()
    assert hyre.resume(run, quiet=True) == run
    assert (run / "metrics.jsonl").read_bytes() == before


def test_clusters_stand_in_for_groups(pairs, tmp_path):
    data = LabelledDataConfig(str(pairs), clusters=6)
    run = hyre.start(run_of(pairs, data=data, steps=5), tmp_path / "run", quiet=True)
    assert load_heads(run).num_members == 7
    assert {row["group"] for row in rows_of(run)} == {"held-out examples"}


def test_without_held_out_examples_nothing_is_claimed(pairs, tmp_path):
    data = LabelledDataConfig(str(pairs), group_column="user", held_out_fraction=0.0)
    run = hyre.start(run_of(pairs, data=data, steps=2), tmp_path / "run", quiet=True)
    assert (run / "eval.jsonl").read_text() == ""
    assert "Nothing was held out" in json.loads((run / "diversity.json").read_text())["sentence"]
    assert "no settings were chosen" in json.loads((run / "adaptation.json").read_text())["sentences"][0]
    assert load_heads(run).settings == AdaptSettings()
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize("kind", ["pca", "mlp", "epinet"])
def test_other_kinds_of_heads(kind, pairs, tmp_path):
    objective = EnsembleConfig(heads=HeadsConfig(num_heads=4, kind=kind))
    run = hyre.start(run_of(pairs, objective=objective, steps=3), tmp_path / "run", quiet=True)
    heads = load_heads(run)
    features = heads.features(["q"] * 3, ["yo dude", "regards", "42 99"])
    assert np.isfinite(heads.members(features)).all()
    assert (heads.linear() is None) == (kind != "pca")


# -------------------------------------------------------------------------------------------------- artefact


def test_loaded_members_equal_trained_ones(trained):
    run, parts = trained
    heads = load_heads(run)
    first, second = parts.held_out.texts, parts.held_out.other_texts
    features = [heads.features(*zip(*side, strict=True)) for side in (first, second)]
    support = parts.learner.support(parts.held.batch())
    assert np.allclose(features[0] - features[1], support.features, atol=1e-5)
    assert np.allclose(margins(heads, *features), support.members, atol=1e-5)
    assert isinstance(heads.head_id, str)
    checked: HeadSet = heads  # the protocol
    assert checked.num_features == 64


def test_an_artefact_is_found_from_every_directory_and_checked(trained, tmp_path):
    run, _ = trained
    last = checkpoint.last(run / "checkpoints")
    assert len({load_heads(path).head_id for path in (run, last, last / "pretrained")}) == 1
    heads = load_heads(run)
    assert load_heads(save_heads(tmp_path / "copy", heads.artefact, heads.learner)).head_id == heads.head_id
    file = tmp_path / "copy/pretrained/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        load_heads(tmp_path / "copy")


def test_head_id_is_that_of_the_numbers(trained, tmp_path):
    run, _ = trained
    heads = load_heads(run)
    settings = replace(heads.artefact, adapt=AdaptSettings("uniform"), names=())
    assert load_heads(save_heads(tmp_path / "a", settings, heads.learner)).head_id == heads.head_id
    heads.learner.mean[0] += 1e-3
    assert load_heads(save_heads(tmp_path / "b", heads.artefact, heads.learner)).head_id != heads.head_id


def test_a_config_with_a_slip_is_refused(tmp_path):
    artefact = HeadsArtefact(EnsembleConfig(heads=HeadsConfig(num_heads=2)), FeaturesConfig(), width=4)
    folder = save_heads(tmp_path / "heads", artefact)
    assert from_json(HeadsArtefact, to_json(artefact)) == artefact
    with pytest.raises(ConfigError, match="unknown key 'widht'; did you mean 'width'"):
        from_json(HeadsArtefact, json.dumps(plain(artefact) | {"widht": 3}))
    with pytest.raises(ConfigError, match="names: expected 3, one for each member, found 1"):
        replace(artefact, names=("a",))
    other = plain(artefact) | {"format": "steelyard-control-1"}
    state = load_heads(folder).learner.state_dict()
    (folder / checkpoint.MANIFEST).unlink()
    files = {"pretrained/config.json": other, "pretrained/model.safetensors": state}
    checkpoint.write_files(folder, files, {"step": 0, "score": None})
    with pytest.raises(CheckpointError, match="expected a head set"):
        load_heads(folder)


@pytest.mark.parametrize("name", ["hyre", "gaussian", "ridge", "map", "simplex", "best", "uniform", "auto"])
def test_settings_build_every_method(name, tmp_path):
    settings = AdaptSettings(name, eta=2.0, heads_weight=3.0, feature_weight=0.1)
    artefact = HeadsArtefact(EnsembleConfig(heads=HeadsConfig(num_heads=3)), FeaturesConfig(), 4, adapt=settings)
    heads = load_heads(save_heads(tmp_path / "heads", artefact))
    first, second = np.random.default_rng(0).standard_normal((2, 3, 4))
    support = Support(margins(heads, first, second), np.ones(3), first - second)
    outputs = adapt(heads.method(), support).combination.apply(support.members, support.features)
    assert outputs.shape == (3, 1)
    if name == "hyre":
        assert heads.method() == HyRe(eta=2.0)
    if name == "gaussian":
        assert heads.method() == GaussianHeads(3.0, 0.1)


def test_heads_refuse_what_they_cannot_read(tmp_path):
    objective = EnsembleConfig(heads=HeadsConfig(num_heads=2))
    numbers = load_heads(save_heads(tmp_path / "n", HeadsArtefact(objective, FeaturesConfig(), 4)))
    words = load_heads(save_heads(tmp_path / "w", HeadsArtefact(objective, WordsConfig(8), 8)))
    with pytest.raises(ConfigError, match="features, which reads no texts; give rows"):
        numbers.features(["q"], ["a"])
    with pytest.raises(ConfigError, match="words, which reads texts, not rows"):
        words.rows(np.zeros((1, 8)))
    with pytest.raises(DataError, match=r"rows: expected shape \[rows, 4\]"):
        numbers.rows(np.zeros((1, 5)))
    with pytest.raises(DataError, match="row 1, number 2: expected a finite number, found nan"):
        numbers.rows(np.array([[0, 0, 0, 0], [0, 0, np.nan, 0]]))


# ------------------------------------------------------------------------------------------- tables and features


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def table_rows(count: int = 240) -> list[dict]:
    """Target = a + slope of the site * b + 3 for red."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        a, b = generator.standard_normal(2)
        site, colour = number % 8, ("red", "blue")[number // 8 % 2]
        y = 50 + a + (2 if site % 2 else -2) * b + 3 * (colour == "red")
        rows.append(
            {"a": a, "b": b, "colour": colour, "site": f"s{site}", "y": y, "level": ("low", "high")[int(y > 51)]}
        )
    return rows


def table_run(path: Path, task: str = "regression", **data) -> HyReRun:
    target = {"target": "y", "ignore": ("level",)} if task == "regression" else {"target": "level", "ignore": ("y",)}
    kept = {"group_column": "site", "categorical": ("colour",), "held_out": ("s0", "s1")}
    return HyReRun(
        objective=EnsembleConfig(task=task, shares="one_group", learning_rate=3e-3, head_learning_rate=1e-2),
        backbone=TableBackboneConfig((16,)),
        data=LabelledDataConfig(str(path), **(target | kept | data)),
        adaptation=SMALL,
        batch_size=60,
        steps=150,
    )


def test_a_regression_on_a_table(tmp_path):
    path = write_csv(tmp_path / "t.csv", table_rows())
    run = hyre.start(table_run(path), tmp_path / "run", quiet=True)
    assert {row["measure"] for row in rows_of(run)} == {"rmse"}
    assert mean_of(run, "gaussian", 5) < mean_of(run, "uniform", 5)
    heads = load_heads(run)
    rows = table_rows()[:16]
    outputs = heads.members(heads.rows(rows))
    assert abs(outputs.mean() - 50) < 5  # in the targets' own units
    hyre_method = replace(heads.settings, method="hyre").build("regression", np.ones(7))
    assert isinstance(hyre_method.loss, GaussianNLL)
    array = np.array([[row["a"], row["b"], row["colour"] == "blue", row["colour"] == "red"] for row in rows])
    assert np.allclose(heads.rows(array), heads.rows(rows), atol=1e-5)
    with pytest.raises(DataError, match="row 0: column 'colour' holds 'green', which is new"):
        heads.rows([rows[0] | {"colour": "green"}])


def test_a_classification_on_a_table(tmp_path):
    path = write_csv(tmp_path / "t.csv", table_rows())
    run = hyre.start(table_run(path, "classification"), tmp_path / "run", quiet=True)
    heads = load_heads(run)
    assert heads.artefact.classes == ("high", "low")
    assert heads.members(heads.rows(table_rows()[:3])).shape == (3, 7, 2)
    assert mean_of(run, "uniform", 0) > 0.5


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_pairs_of_features(suffix, tmp_path):
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 120, 6)).astype(np.float32)
    groups = np.arange(120) % 6
    sign = np.where(groups % 2, 1, -1) * np.sign((first - second)[:, 0])
    path = tmp_path / f"features{suffix}"
    arrays = {"inputs": first, "other": second, "targets": (sign > 0).astype(np.float32), "groups": groups}
    np.savez(path, **arrays) if suffix == ".npz" else safetensors.numpy.save_file(arrays, path)
    data = LabelledDataConfig(str(path), held_out=("0", "1"))
    run = hyre.start(run_of(path, data=data, backbone=FeaturesConfig(), steps=60), tmp_path / "run", quiet=True)
    assert mean_of(run, "hyre", 5) > mean_of(run, "single", 5) + 0.1
    heads = load_heads(run)
    assert heads.members(heads.rows(first)).shape == (120, 5, 1)


def agent(folder: Path, discrete: bool) -> Path:
    """An untrained learner as a run leaves it."""
    box = ArraySpec((3,), low=(-1.0,) * 3, high=(1.0,) * 3)
    if discrete:
        spec = Spec({"observation": box}, ArraySpec((), dtype="int64"), num_actions=2)
        objective = DiscreteCQLConfig(network=DiscreteNetworkConfig(hidden=(8,)))
    else:
        spec = Spec({"observation": box}, ArraySpec((2,), low=(-1.0,) * 2, high=(1.0,) * 2))
        objective = CQLConfig(network=NetworkConfig(actor_hidden=(7,), critic_hidden=(5, 6)))
    statistics = DataStatistics(torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 2.0), 0.0)
    learner = build_learner(spec, objective, statistics, torch_generator(0, "agent"))
    config, state = plain(ControlArtefact(objective, spec)), {"logs": {}}
    checkpoint.save(folder / "checkpoints", 1, config=config, model=learner.state_dict(), optimizers={}, source={},
                    state=state)  # fmt: skip
    return folder


@pytest.mark.parametrize(("part", "columns", "width"), [("critic", 5, 12), ("actor", 3, 7)])
def test_a_critic_or_an_actor_as_backbone(part, columns, width, tmp_path):
    run = agent(tmp_path / "agent", discrete=False)
    inputs = np.random.default_rng(0).uniform(-1, 1, (60, columns)).astype(np.float32)
    np.savez(tmp_path / "d.npz", inputs=inputs, targets=inputs[:, 0] * 3, groups=np.arange(60) % 5)
    config = HyReRun(
        objective=EnsembleConfig(task="regression", heads=HeadsConfig(num_heads=4)),
        backbone=AgentConfig(str(run), part),
        data=LabelledDataConfig(str(tmp_path / "d.npz")),
        adaptation=SMALL,
        steps=3,
    )
    heads = load_heads(hyre.start(config, tmp_path / "run", quiet=True))
    assert heads.num_features == width
    # by hand: what the output layer makes of the raw features is what the network says
    source = heads._source
    raw = torch.from_numpy(source.read(inputs))
    nets = source.nets
    states = nets.normalizer(torch.from_numpy(inputs[:, :3]))
    if part == "critic":
        expected = nets.critic(states, torch.from_numpy(inputs[:, 3:]).clamp(-nets.action_clip, nets.action_clip))
        output = nets.critic.output
        found = torch.stack(
            [h @ w[:, 0] + b[0] for h, w, b in zip(raw.split(6, 1), output.weight, output.bias, strict=True)]
        )
    else:
        expected, found = nets.actor.net(states), nets.actor.net.layers[-1](raw)
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(DataError, match=f"expected rows of {columns} numbers"):
        heads.rows(inputs[:, 1:])


def test_a_backbone_that_has_changed_is_refused(tmp_path):
    run = agent(tmp_path / "agent", discrete=True)
    objective = EnsembleConfig(task="regression", heads=HeadsConfig(num_heads=2))
    artefact = HeadsArtefact(objective, AgentConfig(str(run)), 8, backbone_key="critic/of another day")
    heads = load_heads(save_heads(tmp_path / "heads", artefact))
    with pytest.raises(CheckpointError, match="has changed since the heads were trained on it"):
        heads.rows(np.zeros((1, 3)))


# ----------------------------------------------------------------------------------------------- language models


def lm_run(path: Path, **changes) -> HyReRun:
    config = run_of(
        path,
        objective=EnsembleConfig(heads=HeadsConfig(num_heads=3), shares="groups", learning_rate=1e-3),
        backbone=LanguageModelConfig("tiny", reference="none"),
        data=LabelledDataConfig(str(path), group_column="user", held_out=("user0", "user1")),
        max_tokens=96,
        batch_size=16,
        steps=4,
        loop=LoopConfig(log_every=1, checkpoint_every=2),
        adaptation=replace(SMALL, labels=(1,)),
    )
    return replace(config, **changes)


@pytest.mark.lm
@pytest.mark.parametrize("kind", ["frozen", "lora", "full"])
def test_a_language_model_frozen_adapted_or_trained(kind, few_pairs, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = lm_run(few_pairs, trained=kind == "full")
    if kind == "lora":
        config = replace(config, backbone=replace(config.backbone, adapter=LoRAConfig(rank=2, alpha=4.0)))
    parts = hyre.Parts(config, quiet=True)
    before = {name: value.clone() for name, value in parts.learner.backbone.named_parameters()}
    run = hyre.start(config, tmp_path / "run", quiet=True)
    heads = load_heads(run)
    after = dict(heads.learner.backbone.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if kind == "frozen":
        assert not before
    else:
        assert moved
        assert all("lora" in name for name in moved) == (kind == "lora")
    # the same features from the artefact, whatever else is in the batch
    texts = parts.held_out.texts[:5]
    features = heads.features(*zip(*texts, strict=True))
    alone = np.concatenate([heads.features([prompt], [text]) for prompt, text in texts])
    assert np.allclose(features, alone, atol=2e-3 if kind == "frozen" else 1e-4)
    assert features.shape == (5, 32)


@pytest.mark.lm
def test_adapters_resume_bit_for_bit(few_pairs, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    config = lm_run(few_pairs)
    config = replace(config, backbone=replace(config.backbone, adapter=LoRAConfig(rank=2, alpha=4.0)))
    start_and_interrupt(config, tmp_path / "run", 2, monkeypatch)
    hyre.resume(tmp_path / "run", quiet=True)
    hyre.start(config, tmp_path / "whole", quiet=True)
    assert differences(everything(tmp_path / "whole"), everything(tmp_path / "run")) == []


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory) -> Path:
    """A random BERT with words as tokens."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    known = sorted({*NEUTRAL, "question", *(word for style in STYLES for word in style)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known, *map(str, range(24))]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(settings).save_pretrained(folder)
    return folder


@pytest.mark.lm
@pytest.mark.parametrize("trained", [False, True])
def test_an_encoder_frozen_or_trained(trained, tiny_encoder, few_pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = lm_run(
        few_pairs, backbone=EncoderConfig(str(tiny_encoder), max_tokens=64, max_prompt_tokens=16), trained=trained
    )
    run = hyre.start(config, tmp_path / "run", quiet=True)
    heads = load_heads(run)
    parts = hyre.Parts(config, quiet=True)
    texts = parts.held_out.texts[:4]
    features = heads.features(*zip(*texts, strict=True))
    assert features.shape == (4, 16)
    if trained:
        encoder = heads.learner.backbone.encoder.network
        before = parts.learner.backbone.encoder.network
        assert not torch.equal(encoder.embeddings.word_embeddings.weight, before.embeddings.word_embeddings.weight)
    else:
        expected = parts.learner.features(parts.held.batch(np.arange(4)))
        assert np.allclose(features, expected.numpy(), atol=1e-4)
        assert list((tmp_path / "cache/steelyard/features").glob("*.safetensors"))


def test_features_of_texts_are_read_once(pairs, tmp_path, monkeypatch):
    """A text that comes often is one text to the backbone; conversations survive the way to the cache and back."""
    parts = hyre.Parts(run_of(pairs), quiet=True)
    read = []
    inner = parts.source.read
    monkeypatch.setattr(parts.source, "read", lambda texts: read.append(list(texts)) or inner(texts))
    texts = [("q", "yes dude"), ("q", "no"), ("q", "yes dude")]
    first, second = parts._features(texts, texts[::-1], quiet=True)
    assert [len(one) for one in read] == [2]
    assert np.array_equal(first, second[::-1])
    chat = [{"role": "assistant", "content": "yes dude"}]
    turned = read_texts(parts.source, [([{"role": "user", "content": "q"}], chat)])
    assert np.array_equal(turned[0], first[0])


# ---------------------------------------------------------------------------------------------------- sentences


def test_examples_are_held_out_by_group_and_item(pairs):
    examples = read_examples(LabelledDataConfig(str(pairs), group_column="user"), "preference")
    config = LabelledDataConfig(str(pairs), group_column="user", held_out_fraction=0.25)
    train, held = hold_out(examples, config, 0)
    assert len(held.names) == 3
    assert len(train.names) == 9
    assert not set(held.names) & set(train.names)
    assert len(train) + len(held) == len(examples)
    assert sorted(set(train.groups)) == list(range(9))
    again = hold_out(examples.take(np.arange(len(examples))[::-1]), config, 0)[1]
    assert set(again.names) == set(held.names)
    assert {hold_out(examples, config, seed)[1].names for seed in range(4)} != {held.names}
    plain_examples = read_examples(LabelledDataConfig(str(pairs)), "preference")
    train, held = hold_out(plain_examples, LabelledDataConfig(str(pairs)), 0)
    assert not set(train.items) & set(held.items)


def test_equal_pairs_are_one_item_whichever_side_comes_first(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [("q", "a", "b"), ("q", "b", "a"), ("q", "a", "c"), ("r", "a", "b"), ("q", "a", "b")]
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in rows)
    )
    items = read_examples(LabelledDataConfig(str(path)), "preference").items
    assert items.tolist() == [0, 0, 1, 2, 0]


BAD_CELLS = {
    "": "line 4: column 'a' is empty; fill it in, or leave the row out",
    "nan": "line 4: column 'a': expected a finite number, found nan",
    "tall": "line 4: column 'a': expected a number, found 'tall'; list a column of names under --data.categorical",
}


@pytest.mark.parametrize("cell", BAD_CELLS)
def test_bad_cells_are_named(cell, tmp_path):
    rows = table_rows(16)
    rows[2]["a"] = cell
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(DataError) as error:
        hyre.Parts(table_run(path))
    assert str(error.value) == f"{path}: {BAD_CELLS[cell]}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": None}, "say which column is learned with --target (a, b, colour, site, y, level)"),
        ({"target": "yy"}, "expected a column 'yy'; did you mean 'y'?"),
        ({"group_column": "sites"}, "expected a column 'sites'; did you mean 'site'?"),
        ({"categorical": ()}, "line 2: column 'colour': expected a number, found 'red'"),
        ({"held_out": ("s9",)}, "has no group 's9'"),
        ({"held_out": tuple(f"s{n}" for n in range(8))}, "all 8 groups would be held out and none be trained on"),
        ({"group_column": None, "held_out": ()}, "shares 'one_group' need groups"),
        ({"path": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"path": None}, "no data: give pairs, a table or features with --data PATH"),
    ],
)
def test_sentences_of_tables(changes, sentence, tmp_path):
    path = write_csv(tmp_path / "t.csv", table_rows(16))
    config = table_run(path)
    with pytest.raises((DataError, ConfigError)) as error:
        hyre.Parts(replace(config, data=replace(config.data, **changes)))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_one_group_only_is_said(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "user": "ann"}) + "\n")
    with pytest.raises(DataError, match=r"expected examples of at least 2 groups, found one only \('ann'\)"):
        read_examples(LabelledDataConfig(str(path), group_column="user"), "preference")
    with pytest.raises(DataError, match="line 1: expected the group column 'usr'; did you mean 'user'"):
        read_examples(LabelledDataConfig(str(path), group_column="usr"), "preference")


@pytest.mark.parametrize(
    ("arrays", "task", "sentence"),
    [
        ({"inputs": np.zeros((3, 2))}, "preference", "expected the array 'other', found inputs"),
        ({"inputs": np.zeros((3, 2))}, "regression", "expected the array 'targets', found inputs"),
        ({"inputs": np.zeros(3), "targets": np.zeros(3)}, "regression", "inputs: expected shape [rows, features]"),
        ({"inputs": np.full((3, 2), np.nan), "targets": np.zeros(3)}, "regression", "inputs, row 0, column 0"),
        ({"inputs": np.zeros((3, 2)), "targets": np.zeros(2)}, "regression", "targets: expected 3 of them"),
        ({"inputs": np.zeros((3, 2)), "targets": np.ones(3)}, "classification", "one class only"),
        ({"inputs": np.zeros((3, 2)), "other": np.zeros((3, 2)), "targets": np.full(3, 2.0)}, "preference",
         "targets, row 0: expected P(first is preferred) in 0..1, found 2"),
        ({"inputs": np.zeros((3, 2)), "targets": np.zeros(3), "groups": np.zeros(2)}, "regression",
         "groups: expected 3"),
    ],
)  # fmt: skip
def test_sentences_of_arrays(arrays, task, sentence, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError) as error:
        read_examples(LabelledDataConfig(str(tmp_path / "d.npz")), task)
    assert sentence in str(error.value)


def test_texts_and_numbers_are_not_mixed_up(pairs, tmp_path):
    with pytest.raises(ConfigError, match="holds texts, and the backbone 'table' reads numbers"):
        hyre.Parts(run_of(pairs, backbone=TableBackboneConfig()))
    path = write_csv(tmp_path / "t.csv", table_rows(16))
    with pytest.raises(ConfigError, match="holds numbers, and the backbone 'words' reads texts"):
        hyre.Parts(replace(table_run(path), backbone=WordsConfig()))
    with pytest.raises(ConfigError, match="no encoder and no language model"):
        run_of(pairs, trained=True)


# -------------------------------------------------------------------------------------------------- command, scorer


def test_the_command_trains_reports_and_resumes(pairs, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "hyre", "--data", str(pairs), "--group-column", "user", "--backbone", "words", "--shares",
             "one_group", "--out", str(out), "--steps", "3", "--adaptation.draws", "1"]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "Held-out groups" in printed.out
    assert json.loads((out / "diversity.json").read_text())["sentence"] in printed.err
    assert main(["report", str(out)]) == 0
    assert "Gains" in (out / "report.md").read_text()
    assert main(["train", "--resume", str(out)]) == 0
    assert main(["train", "--resume", str(out), "--steps", "5"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", "hyre", "--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert "--group-column NAME" in help_text
    assert "--adaptation.choose-at" in help_text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], EncoderConfig()),
        (["--data", "t.csv"], TableBackboneConfig()),
        (["--data", "t.npz"], FeaturesConfig()),
        (["--backbone", "smollm2"], LanguageModelConfig("smollm2", reference="none")),
        (["--backbone", "lm:org/name"], LanguageModelConfig("org/name", reference="none")),
        (["--backbone", "encoder:org/name"], EncoderConfig("org/name")),
        (["--backbone", "critic:runs/a"], AgentConfig("runs/a")),
        (["--backbone", "actor:runs/a"], AgentConfig("runs/a", "actor")),
    ],
)
def test_backbones_of_the_command_line(argv, expected):
    assert train_hyre.read(argv).backbone == expected


def test_options_of_the_command_line(tmp_path):
    config = train_hyre.read(["--heads", "7", "--trunk", "128,16", "--task", "regression", "--data", "t.csv"])
    assert config.objective.heads.num_heads == 7
    assert config.trunk == (128, 16)
    assert config.objective.task == "regression"
    config = train_hyre.read(["--backbone", "smollm2", "--lora", "8"])
    assert config.backbone.adapter == LoRAConfig(8, 16.0)
    assert config.trains_backbone
    assert config.objective.learning_rate == 1e-4
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert isinstance(train_hyre.read(["--backbone", str(tmp_path)]).backbone, LanguageModelConfig)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert isinstance(train_hyre.read(["--backbone", str(tmp_path)]).backbone, EncoderConfig)
    for argv, sentence in (
        (["--backbone", "minilmm"], "--backbone: expected minilm, "),
        (["--lora", "8"], "--lora: adapters are for language models"),
        (["--shares", "onegroup"], "--shares: unknown 'onegroup'; did you mean 'one_group'?"),
        (["--heads", "many"], "--heads: expected a whole number, found 'many'"),
    ):
        with pytest.raises(ConfigError) as error:
            train_hyre.read(argv)
        assert sentence in str(error.value)


def test_a_head_set_scores_texts_for_one_user(trained, tmp_path):
    from steelyard.adapt.personalizer import Personalizer

    run, _ = trained
    heads = load_heads(run)
    people = Personalizer(heads, heads.method())
    liked, other = "a model answer yo dude", "a model answer regards furthermore"
    first, second = heads.features(["q"] * 2, [liked, other])
    profile = people.new()
    for number in range(5):
        profile = people.feedback(profile, f"{number}", first, second, 1.0)
    write_profile(tmp_path / "ann.json", profile)
    scorer = scorer_from_name(f"hyre:{run}#{tmp_path / 'ann.json'}")
    scores = scorer.score(["q"] * 2, [liked, other], [], {})
    assert scores.dtype == torch.float32
    assert scores[0] > scores[1] + 0.5
    expected = people.score(np.stack([first, second]), profile)
    assert np.allclose(scores.numpy(), expected, atol=1e-5)
    before = scorer_from_name(f"hyre:{run}").score(["q"] * 2, [liked, other], [], {})
    assert abs(before[0] - before[1]) < scores[0] - scores[1]
    objective = EnsembleConfig(heads=HeadsConfig(num_heads=8))
    stranger = save_heads(tmp_path / "heads", HeadsArtefact(objective, WordsConfig(64), 64))
    with pytest.raises(DataError, match="belongs to another head set"):
        scorer_from_name(f"hyre:{stranger}#{tmp_path / 'ann.json'}")
    numbers = save_heads(tmp_path / "numbers", HeadsArtefact(objective, FeaturesConfig(), 64))
    with pytest.raises(ConfigError, match="expected a head set of preferences that reads texts"):
        scorer_from_name(f"hyre:{numbers}")
