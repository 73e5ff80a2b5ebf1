"""A head set's run: labelled examples of many users -> heads on a backbone -> how well they adapt to unseen users.

Beside the files of every run (`train/rundir.py`):

    eval.jsonl        one row for each (held-out group, number of labels, way of adapting); `value` is the accuracy
                      (of a regression the root of the mean squared error) on examples that were not drawn
    diversity.json    whether the heads differ where held-out groups do, and what that promises
    adaptation.json   the settings that were chosen on held-out groups, and how

The checkpoint is an artefact for `adapt.artefact.load_heads`, `steelyard adapt`, `steelyard serve` and
`--scorer hyre:DIR`. What a frozen backbone says of a text is computed once and kept on disk.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from steelyard import runtime
from steelyard.adapt.artefact import AdaptSettings, HeadsArtefact, Source, build, default_names, is_model, load_source
from steelyard.adapt.backbones import (
    AgentSource,
    BackboneConfig,
    HashedWords,
    ModelSource,
    name_of,
    read_texts,
    reads_text,
)
from steelyard.adapt.choose import HeldOutTask
from steelyard.bench.diversity import Diversity, measure
from steelyard.config import Config, plain, require_positive, require_range
from steelyard.data.clusters import k_means
from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import LabelledBatch, LabelledData, LabelledSource, token_rows
from steelyard.data.labelled_files import ARRAYS, Examples, LabelledDataConfig, Texts, hold_out, read_examples
from steelyard.envs.model_scorers import token_batch
from steelyard.errors import ConfigError
from steelyard.nets.encoder import Encoder, EncoderConfig
from steelyard.nets.lm import LanguageModelConfig
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.rng import numpy_generator
from steelyard.train import checkpoint
from steelyard.train.loop import LoopConfig, Stage, fit
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.progress import ProgressLine
from steelyard.train.rundir import RunDir
from steelyard.workflows.common import Case, begin, carry_out, read_run_config, rewind
from steelyard.workflows.hyre_evaluation import (
    AdaptationConfig,
    choose,
    cross_fitted,
    evaluation_rows,
    headline,
)

LOOKED_AT = 2048
"""Training examples that statistics of a trained backbone, and the members' scales, are fitted on."""


@dataclass(frozen=True)
class HyReRun(Config):
    """One head set: everything that decides its result."""

    objective: EnsembleConfig = field(default_factory=EnsembleConfig)
    """What is learned, by which heads, and what each of them sees."""
    backbone: BackboneConfig = field(default_factory=EncoderConfig)
    """What the heads stand on."""
    trained: bool = False
    """Train the text encoder or language model, too; otherwise its features are computed once. An adapter is always
    trained."""
    trunk: tuple[int, ...] = ()
    """Hidden layers between a frozen backbone and the heads, trained by all heads together; e.g. 128."""
    max_tokens: int = 512
    """Longest prompt and completion together, of language models; encoders have their own limits."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Examples, and which of them are kept apart."""
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    """How adaptation to held-out groups is evaluated, and its settings chosen."""
    feature_cache: str | None = None
    """Folder for features of texts; None: the library's own."""
    batch_size: int = 64
    """Examples per update."""
    epochs: float = 20.0
    """Passes over the data, where `steps` is not given."""
    steps: int | None = None
    """Updates."""
    evaluate_every: int = 0
    """Updates between evaluations; 0: at the beginning and at the end."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50, checkpoint_every=1_000))
    """Log and checkpoint intervals."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser; `shards` is gradient accumulation."""
    runtime: runtime.RuntimeConfig = field(default_factory=runtime.RuntimeConfig)
    """Threads, precision, device."""
    seed: int = 0
    """Of everything random in the run."""

    def __post_init__(self) -> None:
        """Check ranges, and what excludes what."""
        require_positive(self, "batch_size", "epochs", "steps", "trunk", "max_tokens")
        require_range(self, 0, math.inf, "evaluate_every")
        if self.trains_backbone and not is_model(self.backbone):
            raise ConfigError(f"trained: the backbone {name_of(self.backbone)!r} is no encoder and no language model")
        if self.trains_backbone and self.trunk:
            raise ConfigError("trunk: a backbone that is trained needs none; it is for frozen ones")
        if self.objective.shares in ("groups", "one_group"):
            path = self.data.path  # files of features hold groups of their own
            own = path is None or Path(path).suffix.lower() in ARRAYS
            if self.data.group_column is None and not self.data.clusters and not own:
                raise ConfigError(
                    f"shares {self.objective.shares!r} need groups: name their column with --group-column, or have "
                    "clusters found with --data.clusters K"
                )

    @property
    def trains_backbone(self) -> bool:
        """Whether the encoder or language model itself is trained."""
        return self.trained or (isinstance(self.backbone, LanguageModelConfig) and self.backbone.adapter is not None)


def start(config: HyReRun, run_dir: str | Path, case: Case | None = None, quiet: bool = False) -> Path:
    """Begin a run in a new directory and carry it to its end. Return the directory.

    Raises:
        SteelyardError: anything that makes the run impossible or stops it, in one sentence.
        Interrupted: ctrl-C, after a checkpoint was written.
    """
    run = RunDir(run_dir)
    _one_process()
    parts = Parts(config, quiet)
    begin(run, parts.config, case or Case(), parts.data_hash)
    for sentence in parts.notes:
        run.event(sentence)
        if not quiet:
            print(sentence, file=sys.stderr)
    return carry_out(run, lambda: _train(run, parts, None, quiet))


def resume(run_dir: str | Path, quiet: bool = False) -> Path:
    """Continue a stopped run exactly. Return its directory.

    Raises:
        CheckpointError: the directory holds no run, or its files are damaged.
        DataError: the data have changed since.
    """
    run = RunDir(run_dir)
    _one_process()
    config = read_run_config(run, HyReRun)
    if run.read_status() == "done":
        return run.path
    parts = Parts(config, quiet)
    found = rewind(run, config.data.path, parts.data_hash)
    return carry_out(run, lambda: _train(run, parts, found, quiet))


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a head set is trained in one process; start it without torchrun, with optim.shards parts")


class Parts:
    """Data, backbone and learner of a config.

    Attributes:
        config: as given, with as many heads as groups where each group has one.
        train, held_out: examples as read.
        learner: with statistics and first weights.
        artefact: what it is.
        notes: sentences that a user should read once.
    """

    def __init__(self, config: HyReRun, quiet: bool = False) -> None:
        runtime.prepare(config.runtime)
        if config.optim.autocast == "bf16":
            runtime.require_bf16(config.runtime.device)
        examples = read_examples(config.data, config.objective.task)
        self._check_inputs(config, examples)
        self.data_hash = examples.content_hash
        self.train, self.held_out = hold_out(examples, config.data, config.seed)
        self.config = config = self._with_heads(config)
        self.notes = [*examples.notes, self._said(examples)]
        first = HeadsArtefact(
            config.objective,
            config.backbone,
            width=1,
            trained=config.trains_backbone,
            trunk=config.trunk,
            classes=examples.classes,
            table=examples.schema,
            max_tokens=config.max_tokens,
            seed=config.seed,
        )
        self.source: Source = load_source(first, config.runtime.device)
        self.notes += getattr(getattr(self.source, "model", None), "notes", ())
        self.data = self._data(self.train, quiet)
        self.held = None if self.held_out is None else self._data(self.held_out, quiet)
        width = self.data.inputs.shape[1] if isinstance(self.data, LabelledData) else 0
        if isinstance(self.source, ModelSource):
            width = self.source.width
        key = "" if self.source is None else self.source.key
        self.artefact = replace(first, width=width, backbone_key=key, names=self._names(config))
        if config.data.clusters:
            self._cluster()
        self.learner = build(self.artefact, self.source).to(config.runtime.device)
        self.learner.fit_statistics(self.some())
        if self.data.group_counts is not None:
            self.learner.set_groups(self.data.group_counts)
        self.optimizers = Optimizers(self.learner, config.optim)

    @staticmethod
    def _check_inputs(config: HyReRun, examples: Examples) -> None:
        if (examples.texts is not None) != reads_text(config.backbone):
            kind = "texts" if examples.texts is not None else "numbers"
            raise ConfigError(
                f"{examples.source} holds {kind}, and the backbone {name_of(config.backbone)!r} reads "
                f"{'texts' if kind == 'numbers' else 'numbers'}"
            )
        if examples.groups is not None and config.data.clusters:
            raise ConfigError(f"clusters stand in for groups, and {examples.source} has {len(examples.names)} groups")
        grouped = examples.groups is not None or config.data.clusters
        if config.objective.shares in ("groups", "one_group") and not grouped:
            raise ConfigError(f"shares {config.objective.shares!r} need groups, and {examples.source} has none")

    def _with_heads(self, config: HyReRun) -> HyReRun:
        if config.objective.shares != "one_group":
            return config
        count = config.data.clusters or len(self.train.names)
        heads = replace(config.objective.heads, num_heads=count)
        return replace(config, objective=replace(config.objective, heads=heads))

    def _said(self, examples: Examples) -> str:
        held = 0 if self.held_out is None else len(self.held_out)
        if examples.groups is None:
            return f"{len(self.train)} examples to train on, {held} held out, no groups"
        names = 0 if self.held_out is None else len(self.held_out.names)
        return (
            f"{len(self.train)} examples of {len(self.train.names)} groups to train on, {held} of {names} other groups "
            "held out"
        )

    def _names(self, config: HyReRun) -> tuple[str, ...]:
        names = default_names(config.objective)
        if config.objective.shares != "one_group" or config.data.clusters:
            return names
        return (*names[: len(names) - len(self.train.names)], *self.train.names)

    # inputs

    def _data(self, examples: Examples, quiet: bool) -> LabelledData | CompletionPairs:
        """Return examples as the learner reads them."""
        if examples.texts is None:
            assert examples.inputs is not None
            read = self.source.read if isinstance(self.source, AgentSource) else _same
            other = None if examples.other is None else read(examples.other)
            return LabelledData(read(examples.inputs), examples.targets, other, examples.groups)
        assert examples.other_texts is not None
        if self.config.trains_backbone:
            assert isinstance(self.source, ModelSource)
            sides = [[self.source.tokens(*text) for text in side] for side in (examples.texts, examples.other_texts)]
            if not isinstance(self.source.model, Encoder):
                return CompletionPairs(sides[0], sides[1], self.source.model.tokenizer.pad, examples.groups)
            return LabelledData(token_rows(sides[0]), examples.targets, token_rows(sides[1]), examples.groups)
        first, second = self._features(examples.texts, examples.other_texts, quiet)
        return LabelledData(first, examples.targets, second, examples.groups)

    def _features(
        self, texts: Texts, others: Texts, quiet: bool
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return what the frozen backbone says of both sides; a text that comes often is read once."""
        assert isinstance(self.source, HashedWords | ModelSource)
        keys = [json.dumps(text) for text in (*texts, *others)]
        place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        different = list({key: text for key, text in zip(keys, (*texts, *others), strict=True)}.values())
        label = f"features of {len(different)} texts"
        with ProgressLine(label, len(different), quiet=quiet or isinstance(self.source, HashedWords)) as line:
            raw = read_texts(self.source, different, line.advance_to, self.config.feature_cache)
        rows = np.array([place[key] for key in keys])
        return raw[rows[: len(texts)]], raw[rows[len(texts) :]]

    def _cluster(self) -> None:
        """Give the training examples groups: clusters of what the backbone says (of pairs: of the differences)."""
        if not isinstance(self.data, LabelledData) or self.data.is_text:
            raise ConfigError("clusters: the features of a backbone that is trained change; freeze it, or name groups")
        values = self.data.inputs if self.data.other is None else self.data.inputs - self.data.other
        spread = values.std(0)
        points = values.astype(np.float64) / np.where(spread > 0, spread, 1.0)
        generator = numpy_generator(self.config.seed, "clusters")
        self.data = self.data.with_groups(k_means(points, self.config.data.clusters, generator))

    # what evaluation needs

    def some(self) -> list[LabelledBatch | ExperienceBatch]:
        """Return training batches: all where features are known, else of some examples."""
        if isinstance(self.data, LabelledData) and not self.data.is_text:
            return [batch.to(self.config.runtime.device) for batch in self.data.batches()]
        return self._batches(self.data, self._few())

    def _few(self) -> npt.NDArray[np.int64]:
        order = numpy_generator(self.config.seed, "statistics").permutation(len(self.data))
        return np.sort(order[:LOOKED_AT])

    def _batches(
        self, data: LabelledData | CompletionPairs, rows: npt.NDArray[np.int64]
    ) -> list[LabelledBatch | ExperienceBatch]:
        size = 1024 if isinstance(data, LabelledData) and not data.is_text else self.config.batch_size
        device = self.config.runtime.device
        return [data.batch(rows[i : i + size]).to(device) for i in range(0, len(rows), size)]

    def finish(self) -> None:
        """Fit directions of fixed heads and the members' scales to the weights as they are."""
        if self.config.objective.heads.fixed:
            self.learner.fit_directions(self.some())
        if self.config.objective.task == "regression" and self.held is not None:
            self.learner.calibrate(self._batches(self.held, np.arange(len(self.held))))
        else:
            self.learner.calibrate(self._batches(self.data, self._few()))

    def tasks(self) -> list[HeldOutTask]:
        """Return held-out groups as adaptation sees them; all held-out examples as one where there are no groups."""
        if self.held is None or self.held_out is None:
            return []
        groups = np.zeros(len(self.held), np.int64) if self.held_out.groups is None else self.held_out.groups
        names = self.held_out.names or ("held-out examples",)
        found = []
        for number, name in enumerate(names):
            rows = np.flatnonzero(groups == number)
            supports = [self.learner.support(batch) for batch in self._batches(self.held, rows)]
            examples = supports[0]
            for more in supports[1:]:
                examples = examples.joined(more)
            found.append(HeldOutTask(examples, sources=self.held_out.items[rows], name=name))
        return found


class CompletionPairs:
    """Pairs of completions as token rows, for a language model that is trained; `data.labelled.LabelledData` for it."""

    def __init__(
        self,
        first: list[tuple[list[int], int]],
        second: list[tuple[list[int], int]],
        pad: int,
        groups: npt.NDArray[np.int64] | None,
    ) -> None:
        self.first, self.second, self.pad, self.groups = first, second, pad, groups

    def __len__(self) -> int:
        return len(self.first)

    @property
    def group_counts(self) -> torch.Tensor | None:
        """Pairs of each group, int64 [G]."""
        return None if self.groups is None else torch.from_numpy(np.bincount(self.groups))

    def batch(self, rows: npt.NDArray[np.int64]) -> ExperienceBatch:
        """Return the given pairs; the first of a pair is the preferred one."""
        tokens = [side[row] for row in rows for side in (self.first, self.second)]
        batch = token_batch([(ids[:begin], ids[begin:]) for ids, begin in tokens], self.pad)
        return replace(
            batch,
            pairs=torch.arange(2 * len(rows)).view(-1, 2),
            groups=None if self.groups is None else torch.from_numpy(self.groups[rows]),
            numbers=torch.from_numpy(np.asarray(rows, np.int64)),
        )


def _same(inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return inputs


def _train(run: RunDir, parts: Parts, found: checkpoint.Checkpoint | None, quiet: bool) -> None:
    config, learner = parts.config, parts.learner
    if found is not None:
        checkpoint.load_into(learner, found.model, str(found.path))
        parts.optimizers.load_state_tensors(found.optimizers)
    steps = config.steps or max(1, math.ceil(config.epochs * len(parts.data) / config.batch_size))
    artefact = plain(replace(parts.artefact, adapt=config.adaptation.first))

    def say(sentence: str) -> None:
        run.event(sentence)
        if not quiet:
            print(sentence, file=sys.stderr)

    def evaluate(step: int) -> float | None:
        parts.finish()
        tasks = parts.tasks()
        task, variance = config.objective.task, learner.head.variance.double().cpu().numpy()
        settings: tuple[AdaptSettings, ...] = (config.adaptation.first,) * len(tasks)
        if step == steps:
            choice = choose(tasks, config.adaptation, task, variance, config.seed)
            settings = cross_fitted(tasks, config.adaptation, task, variance, config.seed)
            artefact["adapt"] = plain(choice.settings)  # of the checkpoint that is written next
            diversity = measure_diversity(parts, tasks)
            meter = diversity.sentence()
            if not tasks:
                meter = f"Nothing was held out, so the training examples stand in for unseen groups. {meter}"
            run.write_json("adaptation.json", {"settings": plain(choice.settings), "sentences": list(choice.sentences)})
            run.write_json("diversity.json", diversity.to_dict() | {"sentence": meter})
            for sentence in (meter, *choice.sentences):
                say(sentence)
        rows = evaluation_rows(tasks, settings, config.adaptation, task, variance, config.seed)
        fixed = {"phase": "offline", "update_step": step, "env_step": 0, "episode_seed": config.seed}
        run.append("eval.jsonl", [fixed | row for row in rows])
        return headline(rows)

    fit(
        learner,
        LabelledSource(parts.data, min(config.batch_size, len(parts.data)), config.seed),  # type: ignore[arg-type]
        parts.optimizers,
        Stage("offline", 0, steps, config.evaluate_every or steps),
        config.loop,
        run,
        seed=config.seed,
        start=found.step if found is not None else 0,
        artefact=artefact,
        evaluate=evaluate,
        quiet=quiet,
        label=f"hyre seed {config.seed}",
    )


def measure_diversity(parts: Parts, tasks: list[HeldOutTask]) -> Diversity:
    """Return how far the members differ on held-out groups, or on training examples where none are held out."""
    if tasks:
        return measure([task.examples for task in tasks], parts.config.objective.task)
    return measure([parts.learner.support(batch) for batch in parts.some()[:1]], parts.config.objective.task)
