"""What clients send and get: JSON with known fields only, of the right types, with finite numbers only."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from steelyard.adapt.query import How


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected text, found half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
LARGEST = 1e6
"""Features and labels beyond it are mistakes, and their losses could swallow all others."""
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Features = list[Number]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:+=-]{0,127}$")]
"""A user or a key: something that fits into a path and a log."""

NAME_RULE = "expected 1 to 128 letters, digits or . _ @ : + = -, the first one a letter or digit"
Top = Annotated[int, Field(ge=1)]
"""How many weights a short profile keeps."""


class Body(BaseModel):
    """Base of all: closed to unknown fields, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Item(Body):
    """Something to be judged: a completion (of a prompt), or the features of one."""

    prompt: Text = ""
    completion: Text | None = None
    features: Features | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.completion is None) == (self.features is None):
            raise ValueError("expected either a completion or features")
        if self.features is not None and self.prompt:
            raise ValueError("features take no prompt")
        return self


class ScoreItem(Item):
    """An item, and for whom to judge it."""

    user: Name | None = Field(None, description="nobody in particular where absent")


class ScoreBody(Body):
    """Items of any users."""

    items: Annotated[list[ScoreItem], Field(min_length=1)]


class ScoreAnswer(Body):
    """One score an item; for a classification one list of the classes' scores an item."""

    scores: list[float] | list[list[float]]


class RankBody(Body):
    """Candidates for one place, for one user: completions of a prompt, or features."""

    user: Name | None = None
    prompt: Text = ""
    completions: Annotated[list[Text], Field(min_length=1)] | None = None
    features: Annotated[list[Features], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.completions is None) == (self.features is None):
            raise ValueError("expected either completions or features")
        return self

    def items(self) -> list[Item]:
        """Return the candidates."""
        if self.completions is not None:
            return [Item(prompt=self.prompt, completion=completion) for completion in self.completions]
        return [Item(features=features) for features in self.features or []]


class RankAnswer(Body):
    """Numbers of the candidates, best first (equal ones as they came), and their scores as they came."""

    order: list[int]
    scores: list[float]


class FeedbackBody(Body):
    """A label of a user: of two items the chosen and the rejected one, or an item and its label.

    The key names the label: sent again (after a timeout, say) it counts once.
    """

    user: Name
    key: Name
    chosen: Item | None = None
    rejected: Item | None = None
    item: Item | None = None
    label: Number | None = Field(
        None, description="a target or the number of a class; of a pair, the probability that `chosen` is preferred"
    )

    @model_validator(mode="after")
    def _pair_or_label(self) -> Self:
        pair = self.chosen is not None and self.rejected is not None and self.item is None
        single = self.item is not None and self.label is not None and self.chosen is None and self.rejected is None
        if not (pair or single):
            raise ValueError("expected either chosen and rejected, or item and label")
        return self


class FeedbackAnswer(Body):
    """What is known of the user now."""

    n: float = Field(description="labels counted")
    ess: float = Field(description="effective number of members, 1 / sum of squared weights")
    repeated: bool = Field(description="whether this key had been counted before")


class Pair(Body):
    """Two items that a user might be asked to compare."""

    first: Item
    second: Item


class QueryBody(Body):
    """What a user might be asked: pairs for preferences, items else."""

    user: Name | None = None
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = None
    items: Annotated[list[Item], Field(min_length=1)] | None = None
    count: int = Field(1, ge=1, description="how many to choose")
    how: How = Field("bald", description="which criterion; variance for a regression")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.pairs is None) == (self.items is None):
            raise ValueError("expected either pairs or items")
        return self


class QueryAnswer(Body):
    """Numbers of the offered pairs or items to ask, best first."""

    ask: list[int]


class MethodAnswer(Body):
    """How profiles are adapted."""

    name: str
    loss: str
    eta: float
    mix: float


class HeadsAnswer(Body):
    """The head set that is served."""

    head_id: str
    task: Literal["preference", "regression", "classification"]
    members: int
    features: int = Field(description="numbers of one item, where features are sent")
    linear: bool
    texts: bool = Field(description="whether texts are read, or features only")
    method: MethodAnswer


class Health(Body):
    """It answers."""

    status: Literal["ok"] = "ok"
    version: str


class CountAnswer(Body):
    """How many users have a profile."""

    users: int


class DeletedAnswer(Body):
    """Whether there was anything to delete."""

    deleted: bool


class KeptAnswer(Body):
    """What is known of the user now."""

    n: float
    ess: float


class Problem(Body):
    """Why a request was not carried out, in one sentence."""

    error: str
