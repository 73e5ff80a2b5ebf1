"""What clients of the language-model service send and get: OpenAI's form, and one extra field, `steelyard`.

Fields of OpenAI that this service cannot honour are refused unless they have the value that changes nothing; those that
carry no meaning here are ignored. Null is the same as absent. Nothing else is let through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, field_validator, model_validator

from steelyard.adapt.compute_policy import ComputePolicy, TemperatureSchedule
from steelyard.config import from_json, plain, with_fields
from steelyard.errors import ConfigError
from steelyard.serve.bodies import Body, Text

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields without a meaning here."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
"""{field of OpenAI that is not honoured: values of it that ask for nothing}."""


class Wanted(Body):
    """The field `steelyard` of a request: a part of `ComputePolicy`, and what to stream."""

    temperatures: dict[str, JsonValue] = Field(default={}, description="fields of TemperatureSchedule")
    stop: dict[str, JsonValue] = Field(default={}, description="fields of StopRule, e.g. threshold")
    prune: dict[str, JsonValue] = Field(default={}, description="fields of PruneRule")
    budget: dict[str, JsonValue] = Field(default={}, description="max_samples, max_tokens")
    waves: Annotated[list[int], Field(min_length=1)] | None = Field(default=None, description="samples of each round")
    decisions: bool = Field(default=False, description="stream what was drawn and decided before the answer")

    def policy(self, own: ComputePolicy) -> ComputePolicy:
        """Return the service's policy with what was asked for.

        Raises:
            ConfigError: a field that a policy does not have, or a value that it cannot have.
        """
        values = plain(own)
        for section, fields in self.model_dump(exclude={"decisions", "waves"}).items():
            values[section] |= fields
        if self.waves is not None:
            values["waves"] = self.waves
        return from_json(ComputePolicy, json.dumps(values), where="steelyard")


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class _Request(Body):
    """What both endpoints take."""

    model: str = Field(description="the one that is served: GET /v1/models")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="the schedule's highest; 0: one greedy sample"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="absent: a fresh one, told in usage")
    stream: bool = False
    stream_options: StreamOptions | None = None
    steelyard: Wanted = Wanted()

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, sent: Any) -> Any:
        if not isinstance(sent, Mapping):
            return sent
        kept = {}
        for name, value in sent.items():
            if value is None or name in IGNORED:
                continue
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    expected = " or ".join(json.dumps(known) for known in NEUTRAL[name])
                    raise ValueError(f"{name} is not supported: expected {expected} or nothing")
                continue
            kept[name] = value
        return kept

    @property
    def limit(self) -> int | None:
        """Longest answer that was asked for."""
        return self.max_tokens

    def policy(self, own: ComputePolicy) -> ComputePolicy:
        """Return how to sample: the service's policy with what was asked for."""
        found = self.steelyard.policy(own)
        if self.temperature is None:
            return found
        if self.temperature == 0:  # all samples would be the same one
            fields = {"temperatures": TemperatureSchedule("constant", 0.0), "budget.max_samples": 1}
            return with_fields(found, fields)
        return with_fields(found, {"temperatures.high": self.temperature})


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, sent: Any) -> Any:
        return {k: v for k, v in sent.items() if v is not None} if isinstance(sent, Mapping) else sent

    def plain(self) -> dict[str, Any]:
        """Return what chat templates read."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Request):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        """Longest answer that was asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompt(self) -> list[dict[str, Any]]:
        """Return the conversation."""
        return [message.plain() for message in self.messages]


class CompletionBody(_Request):
    """A text to be continued."""

    prompt_: Text = Field(alias="prompt")
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="the same as steelyard.budget.max_samples")

    @field_validator("prompt_", mode="before")
    @classmethod
    def _one(cls, sent: Any) -> Any:
        return sent[0] if isinstance(sent, list) and len(sent) == 1 else sent

    def prompt(self) -> str:
        """Return the text."""
        return self.prompt_

    def policy(self, own: ComputePolicy) -> ComputePolicy:
        """Return how to sample: the service's policy with what was asked for."""
        if self.best_of is not None and "max_samples" in self.steelyard.budget:
            raise ConfigError("best_of and steelyard.budget.max_samples exclude each other")
        found = own if self.best_of is None else with_fields(own, {"budget.max_samples": self.best_of})
        return super().policy(found)


class ErrorAnswer(BaseModel):
    """Why a request was not carried out, in one sentence."""

    message: str
    type: str
    param: None = None
    code: str | None = None


class Problem(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorAnswer


TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem(status: int, sentence: str, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}
