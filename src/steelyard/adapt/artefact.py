"""A trained head set on disk, and as adaptation and serving see it: backbone, heads, and how to adapt them.

    heads = load_heads("runs/taste")                      # a run, a checkpoint, or what `save_heads` wrote
    features = heads.features(prompts, completions)       # or heads.rows(numbers) where there are no texts
    adapted = adapt(heads.method(), Support(margins(heads, first, second), labels, first - second))

    FOLDER/pretrained/config.json           `HeadsArtefact`, format "steelyard-heads-1"
    FOLDER/pretrained/model.safetensors     heads, statistics, and what of the backbone was trained
    FOLDER/manifest.json                    sizes and hashes

A frozen backbone is not copied: it is loaded from where its config says, and refused where it is not what the heads
were trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from steelyard.adapt.backbones import (
    AgentConfig,
    AgentSource,
    Arrays,
    BackboneConfig,
    FeaturesConfig,
    HashedWords,
    ModelSource,
    TableBackboneConfig,
    load_text_source,
    name_of,
    packed,
    reads_text,
    through_half,
)
from steelyard.adapt.base import Floats, Method, Task
from steelyard.adapt.choose import Auto, BestHead, Uniform
from steelyard.adapt.losses import GaussianNLL, MemberLoss, default_loss
from steelyard.adapt.population import GaussianHeads, HeadMAP, RidgeCombination
from steelyard.adapt.reweight import HyRe
from steelyard.adapt.simplex import SimplexMAP
from steelyard.artefact import find
from steelyard.config import Config, from_json, plain, require_positive, require_range, to_json
from steelyard.data.experience import ExperienceBatch
from steelyard.data.labelled import LabelledBatch, token_rows
from steelyard.data.labelled_files import TableSchema
from steelyard.data.tokenizer import Text
from steelyard.envs.model_scorers import format_of, token_batch
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.nets.backbones import EncoderBackbone, Features, Trunk, width_of
from steelyard.nets.encoder import Encoder
from steelyard.objectives.hyre import EnsembleConfig
from steelyard.objectives.hyre import HyRe as Ensemble
from steelyard.rng import torch_generator
from steelyard.train import checkpoint

FORMAT = "steelyard-heads-1"
MethodName = Literal["hyre", "gaussian", "ridge", "map", "simplex", "best", "uniform", "auto"]
BATCH_SIZE = 64
"""Texts in one forward pass of a trained backbone; features do not depend on it."""


@dataclass(frozen=True)
class AdaptSettings(Config):
    """How a head set is adapted; after training, what was chosen on held-out groups."""

    method: MethodName = "hyre"
    """What turns labels into a combination of the members; auto: hyre or gaussian, by leave-one-out on the labels."""
    eta: float = 1.0
    """How fast evidence sharpens the weights (hyre, simplex)."""
    noise: float = 0.0
    """Assumed share of labels that are wrong (hyre, best; preferences and classes)."""
    mix: float = 0.0
    """Share of the prior that stays in the weights (hyre)."""
    heads_weight: float = 1.0
    """Prior variance along the heads (gaussian), or of every coefficient (ridge)."""
    feature_weight: float = 0.0
    """Prior variance of a linear function of the features beside the heads (gaussian), or the only one (map)."""
    variance: float = 1.0
    """Of a regression's targets around the adapted function (gaussian, ridge, map, simplex)."""
    variance_floor: float = 0.0
    """Least variance of a member's residuals (hyre on a regression): without one, few labels may pick a single head."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_range(self, 0, math.inf, "eta", "heads_weight", "feature_weight", "variance_floor")
        require_range(self, 0, 1, "mix")
        require_positive(self, "variance")
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise must be at least 0 and below 1, found {self.noise}")

    def build(self, task: Task, variance: Floats) -> Method:
        """Return the method; `variance` [H] is that of the members' residuals, for a regression."""
        loss: MemberLoss = default_loss(task, self.noise)
        if task == "regression":
            loss = GaussianNLL(variance, self.variance_floor)
        hyre = HyRe(loss, self.eta, self.mix)
        gaussian = GaussianHeads(self.heads_weight, self.feature_weight, task, self.variance)
        match self.method:
            case "hyre":
                return hyre
            case "gaussian":
                return gaussian
            case "ridge":
                return RidgeCombination(self.heads_weight, task, self.variance)
            case "map":
                return HeadMAP(self.feature_weight, task=task, noise=self.variance)
            case "simplex":
                return SimplexMAP(self.eta, task, self.variance)
            case "best":
                return BestHead(loss)
            case "uniform":
                return Uniform()
        return Auto((hyre, gaussian), task, noise=self.variance)


@dataclass(frozen=True)
class HeadsArtefact(Config):
    """pretrained/config.json of a head set."""

    objective: EnsembleConfig
    """What was learned, and how; the heads."""
    backbone: BackboneConfig
    """What the heads stand on."""
    width: int
    """Numbers that the backbone says of an input, before the trunk."""
    trained: bool = False
    """The text encoder or language model was trained, too; its weights (or its adapter) are in the file."""
    trunk: tuple[int, ...] = ()
    """Hidden layers between the backbone and the heads."""
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    """How to adapt."""
    names: tuple[str, ...] = ()
    """What the members are called; empty: pooled, head 1, head 2, ..."""
    classes: tuple[str, ...] = ()
    """What the numbers of classes mean."""
    table: TableSchema | None = None
    """How a row of a table becomes numbers."""
    backbone_key: str = ""
    """Identity of the frozen backbone; empty where there is none."""
    max_tokens: int = 512
    """Longest prompt and completion together, of language models."""
    seed: int = 0
    """Of the first weights: a frozen random model ("tiny") is drawn again, not saved."""
    format: Literal["steelyard-heads-1"] = "steelyard-heads-1"
    """Version of this layout."""

    def __post_init__(self) -> None:
        """Check ranges and counts."""
        require_positive(self, "width", "trunk", "max_tokens")
        members = self.objective.heads.num_members
        if self.names and len(self.names) != members:
            raise ConfigError(f"names: expected {members}, one for each member, found {len(self.names)}")
        if self.trained and not is_model(self.backbone):
            raise ConfigError(f"trained: the backbone {name_of(self.backbone)!r} is no encoder and no language model")
        if self.trained and self.trunk:
            raise ConfigError("a trained backbone has no trunk: leave `trunk` empty")

    @property
    def hidden(self) -> tuple[int, ...]:
        """All hidden layers that are trained on what the backbone says."""
        own = self.backbone.hidden if isinstance(self.backbone, TableBackboneConfig) else ()
        return (*own, *self.trunk)

    @property
    def outputs(self) -> int:
        """C."""
        return len(self.classes) if self.objective.task == "classification" else 1


def is_model(config: BackboneConfig) -> bool:
    """Return whether a backbone is an encoder or a language model, which may be trained."""
    return reads_text(config) and getattr(config, "kind", "") != "words"


Source = HashedWords | ModelSource | AgentSource | None
"""What reads an input; None where inputs are numbers already."""


def load_source(artefact: HeadsArtefact, device: str = "cpu") -> Source:
    """Load what reads the inputs, with weights as before training.

    Raises:
        CheckpointError: it is not what the heads were trained on.
    """
    config = artefact.backbone
    if isinstance(config, FeaturesConfig | TableBackboneConfig):
        return None
    source: HashedWords | ModelSource | AgentSource
    if isinstance(config, AgentConfig):
        source = AgentSource(config)
    else:
        source = load_text_source(config, artefact.max_tokens, artefact.seed, device)
    if artefact.backbone_key not in ("", source.key):
        raise CheckpointError(
            f"{name_of(config)}: has changed since the heads were trained on it; its weights or settings are others"
        )
    return source


def build(artefact: HeadsArtefact, source: Source = None) -> Ensemble:
    """Build the learner with first weights; a trained backbone is that of `source`."""
    generator = torch_generator(artefact.seed, "backbone")
    backbone: nn.Module
    if artefact.trained:
        if not isinstance(source, ModelSource):
            raise ConfigError(f"{name_of(artefact.backbone)}: expected an encoder or a language model to train")
        backbone = source.model
        if isinstance(backbone, Encoder):
            backbone = EncoderBackbone(backbone.requires_grad_(True))
        elif artefact.backbone.adapter is None:  # type: ignore[union-attr]
            backbone.requires_grad_(True)
    elif artefact.hidden:
        backbone = Trunk(artefact.width, artefact.hidden, generator)
    else:
        backbone = Features(artefact.width)
    return Ensemble(artefact.objective, backbone, torch_generator(artefact.seed, "heads"), artefact.outputs)


class LoadedHeads:
    """A trained head set: `head_set.HeadSet`, and what it knows of itself.

    Args:
        artefact: what it is.
        learner: with all its weights.
        source: what reads inputs; loaded when it is first needed where None.

    Attributes:
        settings: how to adapt, chosen on held-out groups where there were any.
        names: of members [H].
        head_id: "sha256:..." of backbone, statistics and heads.
    """

    def __init__(self, artefact: HeadsArtefact, learner: Ensemble, source: Source = None) -> None:
        self.artefact, self.learner, self._loaded = artefact, learner.eval(), source
        self.settings, self.task = artefact.adapt, artefact.objective.task
        self.num_members, self.num_features = learner.head.num_members, width_of(learner.backbone)
        self.names = artefact.names or default_names(artefact.objective)
        digest = hashlib.sha256(f"{FORMAT} {self.task} {artefact.backbone_key}".encode())
        digest.update(to_json(artefact.objective.heads).encode())
        for name, value in sorted(learner.state_dict().items()):
            digest.update(name.encode() + repr(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.head_id = f"sha256:{digest.hexdigest()}"

    @cached_property
    def _source(self) -> Source:
        return self._loaded if self._loaded is not None else load_source(self.artefact)

    @cached_property
    def _linear(self) -> tuple[Floats, Floats] | None:
        found = self.learner.linear()
        return None if found is None else (_floats(found[0]), _floats(found[1]))

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Floats:
        """Return the features [N, D] of completions of prompts.

        Raises:
            ConfigError: the backbone does not read texts.
        """
        if not reads_text(self.artefact.backbone):
            raise ConfigError(
                f"these heads stand on {name_of(self.artefact.backbone)}, which reads no texts; give rows"
            )
        source = self._source
        assert isinstance(source, HashedWords | ModelSource)
        texts = list(zip(prompts, completions, strict=True))
        if self.artefact.trained:
            assert isinstance(source, ModelSource)
            return self._trained_features(source, texts)
        return self._of_raw(through_half(source.read([(packed(prompt), packed(text)) for prompt, text in texts])))

    def rows(self, inputs: Sequence[Mapping[str, Any]] | Arrays | Floats) -> Floats:
        """Return the features [N, D] of rows of numbers [N, X], or of a table's rows by column.

        Raises:
            ConfigError: the backbone reads texts.
            DataError: a row that is not as those in training.
        """
        if reads_text(self.artefact.backbone):
            raise ConfigError(f"these heads stand on {name_of(self.artefact.backbone)}, which reads texts, not rows")
        if not isinstance(inputs, np.ndarray):
            schema = self.artefact.table
            if schema is None:
                raise ConfigError("these heads were not trained on a table with columns; give an array [rows, numbers]")
            inputs = np.array([schema.encode(row, f"row {number}") for number, row in enumerate(inputs)])
        raw = np.asarray(inputs, np.float32)
        if isinstance(self._source, AgentSource):
            raw = self._source.read(raw)
        return self._of_raw(raw)

    def members(self, features: Floats) -> Floats:
        """Return what every member says of features [N, D]: [N, H, C], standardised."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise DataError(f"features: expected shape [rows, {self.num_features}], found {features.shape}")
        if self._linear is not None:
            weight, bias = self._linear
            outputs: Floats = (features @ weight.reshape(-1, self.num_features).T).reshape(-1, *bias.shape) + bias
            return outputs
        return _floats(self.learner.of_features(torch.as_tensor(features, dtype=torch.float32)))

    def linear(self) -> tuple[Floats, Floats] | None:
        """Return (weight [H, C, D], bias [H, C]) where members are linear in the features, else None."""
        return self._linear

    def method(self) -> Method:
        """Return the way of adapting that the settings say."""
        return self.settings.build(self.task, _floats(self.learner.head.variance))

    def _of_raw(self, raw: Arrays) -> Floats:
        if raw.ndim != 2 or raw.shape[1] != self.artefact.width:
            raise DataError(f"rows: expected shape [rows, {self.artefact.width}], found {raw.shape}")
        if not np.isfinite(raw).all():
            row, column = np.argwhere(~np.isfinite(raw))[0]
            raise DataError(f"row {row}, number {column}: expected a finite number, found {raw[row, column]}")
        return _floats(self.learner.features(LabelledBatch(torch.from_numpy(raw), torch.zeros(len(raw)))))

    def _trained_features(self, source: ModelSource, texts: Sequence[tuple[Text, Text]]) -> Floats:
        rows = [source.tokens(prompt, completion) for prompt, completion in texts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        found = np.zeros((len(rows), self.num_features))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            found[chosen] = _floats(self.learner.features(text_batch(source, [rows[row] for row in chosen])))
        return found


def text_batch(source: ModelSource, rows: Sequence[tuple[list[int], int]]) -> LabelledBatch | ExperienceBatch:
    """Return token rows as the batch that a trained backbone reads, without labels."""
    if isinstance(source.model, Encoder):
        return LabelledBatch(torch.from_numpy(token_rows(rows)), torch.zeros(len(rows)))
    return token_batch([(ids[:begin], ids[begin:]) for ids, begin in rows], source.model.tokenizer.pad)


def default_names(objective: EnsembleConfig) -> tuple[str, ...]:
    """Return "pooled", "head 1", "head 2", ..."""
    heads = objective.heads
    return ("pooled",) * heads.pooled + tuple(f"head {number + 1}" for number in range(heads.num_heads))


def load_heads(path: str | Path, which: Literal["last", "best"] = "last") -> LoadedHeads:
    """Read a head set from a run, a checkpoint, its pretrained/ directory or a folder of `save_heads`.

    Every file is checked against its hash.

    Raises:
        CheckpointError: something else, or damaged.
    """
    folder = find(path, which)
    checkpoint.verify(folder)
    file = folder / "pretrained/config.json"
    found = format_of(folder)
    if found != FORMAT:
        raise CheckpointError(f"{path}: expected a head set ({FORMAT}), found format {found!r}")
    artefact = from_json(HeadsArtefact, file.read_text(encoding="utf-8"), where=str(file))
    source = load_source(artefact) if artefact.trained else None
    learner = build(artefact, source)
    weights = safetensors.torch.load_file(folder / "pretrained/model.safetensors")
    checkpoint.load_into(learner, weights, str(folder))
    return LoadedHeads(artefact, learner, source)


def save_heads(folder: str | Path, artefact: HeadsArtefact, learner: Ensemble | None = None) -> Path:
    """Write a head set that no run has trained, in the layout of a checkpoint. Return the folder.

    Args:
        folder: new, or overwritten.
        artefact: what it is.
        learner: its weights; None: random ones, with statistics that change nothing.
    """
    if learner is None:
        learner = build(artefact, load_source(artefact) if artefact.trained else None)
        with torch.no_grad():
            for name, value in (("mean", 0.0), ("spread", 1.0), ("target_mean", 0.0), ("target_spread", 1.0)):
                getattr(learner, name).fill_(value)
    folder = Path(folder)
    (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
    files = {"pretrained/config.json": plain(artefact), "pretrained/model.safetensors": learner.state_dict()}
    checkpoint.write_files(folder, files, {"step": 0, "score": None})
    return folder


def _floats(values: Tensor) -> Floats:
    found: Floats = values.detach().cpu().double().numpy()
    return found
