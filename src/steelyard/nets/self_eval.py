r"""How a model says whether it would do better if it started over: three readers behind one interface.

Manvi, Singh, Ermon, "Adaptive Inference-Time Compute" (arXiv 2410.02725) ask in words and read one token
(`SuffixEvaluator`).
Their successor ZIP-RC (arXiv 2512.01457) reads reserved entries of the vocabulary in the same forward pass
(`SlotEvaluator`).
A small network on the hidden state leaves the policy untouched by construction (`ProbeEvaluator`); a frozen state knows
how hard a prompt is and little of slips further back, so the network is also told how likely the tokens so far were.

All return P(no fresh sample would be better) of every row as far as it has been read, in the middle of a completion or
at its end.

Shapes: R rows, V vocabulary, W width, m suffix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.config import Config, require_positive, require_range
from steelyard.data.experience import ExperienceBatch
from steelyard.data.tokenizer import ByteChat, Message, Tokenizer
from steelyard.errors import ConfigError, DataError
from steelyard.nets.completions import Rows, head_logps, plain_rows, spread
from steelyard.nets.mlp import MLP
from steelyard.nets.tiny_lm import TinyLM

POSITION_SCALE = 8.0
"""Divides the logarithm of a number of tokens, so that a few thousand are about 1."""


class EvaluatingReader(Protocol):
    """A language model in the middle of reading rows (`envs.samplers.Reader`) that can also look aside.

    Attributes:
        logits: [R, V] of the token that follows what has been read.
        states: [R, W], what the output head makes `logits` from.
        lengths: int64 [R], tokens read of each row, prompt included.
    """

    logits: Tensor
    states: Tensor
    lengths: Tensor

    def read(self, tokens: Tensor) -> None:
        """Read one more token int64 [R] of every row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64)."""
        ...

    def peek(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [R, V], states [R, W]) after the tokens int64 [m] were read after every row, and forget them.

        What follows is exactly as if it had not been called.
        """
        ...

    def fork(self, rows: Tensor) -> EvaluatingReader:
        """Return an independent reader of the given rows (int64, repetitions allowed): one prompt, many samples."""
        ...


class Evaluator(Protocol):
    """Reads P(no better) off a model.

    Attributes:
        extra_tokens: tokens read for one evaluation of one row.
        reserved: token ids that sampling must never draw.
    """

    extra_tokens: int
    reserved: tuple[int, ...]

    def score(self, reader: EvaluatingReader, drawn: Tensor) -> Tensor:
        """Return P(no fresh sample would be better) float32 [R] of every row as read so far.

        Args:
            reader: of the rows, after their last token.
            drawn: float32 [R, 3], how many tokens of its completion each row has, the sum of their log-probs at
                temperature 1, and the lowest of these.
        """
        ...


# ------------------------------------------------------------------------------------------------ configs


@dataclass(frozen=True)
class SuffixConfig(Config):
    """Ask in words after the (partial) answer and read the next token, Yes or No; the question is then forgotten."""

    kind: Literal["suffix"] = "suffix"
    """Name of the reader."""
    question: str = "Would you do better if you started over? Answer Yes or No."
    """What is asked; in a chat model as the user's next message."""
    yes: str = "Yes"
    """Text whose first token means yes, a fresh sample would be better."""
    no: str = "No"
    """Text whose first token means no."""
    tokens: tuple[int, ...] = ()
    """Token ids of the whole suffix, in place of the question."""
    yes_token: int | None = None
    """Token id, in place of the text."""
    no_token: int | None = None
    """Token id, in place of the text."""
    reserved: tuple[int, ...] = ()
    """Token ids that sampling must never draw, where question and answers are no words of the language."""


@dataclass(frozen=True)
class SlotConfig(Config):
    """Read two reserved entries of the vocabulary, which sampling never draws, in the pass that is made anyway."""

    kind: Literal["slot"] = "slot"
    """Name of the reader."""
    yes_token: int | None = None
    """Reserved token id; None: one that the tokenizer never writes."""
    no_token: int | None = None
    """Another one."""


@dataclass(frozen=True)
class ProbeConfig(Config):
    """A small network on the last hidden state; the policy is left untouched."""

    kind: Literal["probe"] = "probe"
    """Name of the reader."""
    hidden: tuple[int, ...] = (128,)
    """Widths of its hidden layers."""
    dropout: float = 0.0
    """Share of hidden units that are left out in training."""
    confidence: bool = True
    """Also tell it the mean, the lowest and the total log-probability of the tokens so far: what a frozen state lacks
    to tell samples of one prompt apart."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "hidden")
        require_range(self, 0, 0.99, "dropout")


AnyReaderConfig = Annotated[SuffixConfig | SlotConfig | ProbeConfig, pydantic.Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------- evaluators


class _Evaluator(nn.Module):
    """P(no better) = sigma(scale l + offset) of the log-odds l that a reader gives.

    Attributes:
        scale: 1 until it is calibrated.
        offset: 0 until it is calibrated.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def probability(self, log_odds: Tensor) -> Tensor:
        """Return P(no better) of raw log-odds, calibrated."""
        return torch.sigmoid(self.scale * log_odds.float() + self.offset)

    @torch.no_grad()
    def calibrate(self, scale: float, offset: float) -> None:
        """Let raw log-odds l mean scale l + offset from now on."""
        self.scale.fill_(scale)
        self.offset.fill_(offset)


class SuffixEvaluator(_Evaluator):
    """Reads the answer to a question: l = logit(No) - logit(Yes) after the suffix.

    Args:
        suffix: token ids, at least one.
        yes: id of the token that says a fresh sample would be better.
        no: id of the token that says it would not.
        reserved: ids that sampling must never draw.
    """

    def __init__(self, suffix: Sequence[int], yes: int, no: int, reserved: Sequence[int] = ()) -> None:
        super().__init__()
        if not suffix or yes == no:
            raise ConfigError(f"suffix reader: expected a suffix and two answers, found {suffix}, {yes} and {no}")
        self.suffix, self.yes, self.no = tuple(suffix), yes, no
        self.extra_tokens = len(suffix)
        self.reserved: tuple[int, ...] = tuple(reserved)

    @torch.no_grad()
    def score(self, reader: EvaluatingReader, drawn: Tensor) -> Tensor:
        """Return P(no fresh sample would be better) float32 [R] of every row as read so far; see `Evaluator`."""
        logits, _ = reader.peek(torch.tensor(self.suffix, device=reader.logits.device))
        return self.probability(logits[:, self.no] - logits[:, self.yes])


class SlotEvaluator(_Evaluator):
    """Reads two reserved entries of the vocabulary: l = logit(no) - logit(yes) of the token that would follow.

    Args:
        yes: id that says a fresh sample would be better.
        no: id that says it would not.
    """

    extra_tokens = 0

    def __init__(self, yes: int, no: int) -> None:
        super().__init__()
        if yes == no:
            raise ConfigError(f"slot reader: expected two token ids, found {yes} twice")
        self.yes, self.no = yes, no
        self.reserved: tuple[int, ...] = (yes, no)

    @torch.no_grad()
    def score(self, reader: EvaluatingReader, drawn: Tensor) -> Tensor:
        """Return P(no fresh sample would be better) float32 [R] of every row as read so far; see `Evaluator`."""
        return self.probability(reader.logits[:, self.no] - reader.logits[:, self.yes])


class ProbeEvaluator(_Evaluator):
    """A small network on the last hidden state, normalised, the number of tokens read and how likely they were.

    Args:
        width: W of the states.
        config: its hidden layers, and whether it is told how likely the tokens were.
        generator: of its first weights.
    """

    extra_tokens = 0
    reserved: tuple[int, ...] = ()

    def __init__(self, width: int, config: ProbeConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.confidence = config.confidence
        inputs = width + 1 + 3 * config.confidence
        self.net = MLP(inputs, config.hidden, 1, generator, dropout=config.dropout)

    def log_odds(
        self, states: Tensor, lengths: Tensor, drawn: Tensor, dropout: torch.Generator | None = None
    ) -> Tensor:
        """Return l [...].

        Args:
            states: [..., W].
            lengths: [...], tokens read, prompt included.
            drawn: [..., 3], tokens of the completion, the sum of their log-probs, the lowest (`drawn_so_far`).
            dropout: of training.
        """
        seen = [
            functional.layer_norm(states.float(), states.shape[-1:]),
            lengths.float().clamp(min=1).log()[..., None] / POSITION_SCALE,
        ]
        if self.confidence:
            count, total, lowest = drawn.float().unbind(-1)
            surprise = torch.stack([total / count.clamp(min=1), lowest, total], -1)
            seen.append(torch.log1p(-surprise.clamp(max=0)))
        found: Tensor = self.net(torch.cat(seen, -1), dropout)[..., 0]
        return found

    @torch.no_grad()
    def score(self, reader: EvaluatingReader, drawn: Tensor) -> Tensor:
        """Return P(no fresh sample would be better) float32 [R] of every row as read so far; see `Evaluator`."""
        return self.probability(self.log_odds(reader.states, reader.lengths, drawn))


AnyEvaluator = SuffixEvaluator | SlotEvaluator | ProbeEvaluator


# ------------------------------------------------------------------------------------------ building them


def build_evaluator(
    config: SuffixConfig | SlotConfig | ProbeConfig,
    model: Any,
    generator: torch.Generator,
    tokenizer: Tokenizer | None = None,
) -> AnyEvaluator:
    """Build the reader that `config` describes for a model.

    Args:
        config: which; token ids in it need no tokenizer.
        model: a `TinyLM` or a `CausalLM`.
        generator: of a probe's first weights.
        tokenizer: turns words into ids; default: the model's own, where it has one.

    Raises:
        ConfigError: ids are missing and there is no tokenizer, or they are not in the vocabulary.
    """
    weight, _ = head(model)
    if isinstance(config, ProbeConfig):
        return ProbeEvaluator(weight.shape[1], config, generator).to(weight.device)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    evaluator: SuffixEvaluator | SlotEvaluator
    if isinstance(config, SuffixConfig):
        suffix = config.tokens
        yes, no = config.yes_token, config.no_token
        if not suffix or yes is None or no is None:
            if tokenizer is None:
                raise ConfigError("suffix reader: the model has no tokenizer; give tokens, yes_token and no_token")
            suffix = suffix or suffix_tokens(tokenizer, config.question)
            yes = _first_token(tokenizer, config.yes) if yes is None else yes
            no = _first_token(tokenizer, config.no) if no is None else no
        evaluator = SuffixEvaluator(suffix, yes, no, config.reserved)
        used: tuple[int, ...] = (*suffix, yes, no, *config.reserved)
    else:
        yes, no = config.yes_token, config.no_token
        if yes is None or no is None:
            yes, no = _unused_tokens(model, tokenizer, len(weight))
        evaluator, used = SlotEvaluator(yes, no), (yes, no)
    outside = [token for token in used if not 0 <= token < len(weight)]
    if outside:
        raise ConfigError(f"{config.kind} reader: token ids must be in 0..{len(weight) - 1}, found {outside[0]}")
    return evaluator.to(weight.device)


def suffix_tokens(tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
    """Return what is read after a (partial) answer: the turn's end, the question as the user's, an answer's beginning.

    A tokenizer with a chat template writes them as it would between two turns; without one the question stands in a
    line of its own. An answer's own EOS is never read before it: the suffix itself ends the turn.
    """
    turns: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:  # what a template writes after an answer does not depend on the answer
        through = [*tokenizer.prompt(turns[:1]), *tokenizer.completion(turns[:1], "x")[:-1]]
        whole = tokenizer.prompt([*turns, {"role": "user", "content": question}])
        if whole[: len(through)] == through:
            return tuple(whole[len(through) :])
    except (ConfigError, DataError):  # no chat template
        pass
    ids = tokenizer.completion("", f"\n\n{question}\n")
    return tuple(ids[:-1])


def _first_token(tokenizer: Tokenizer, text: str) -> int:
    return tokenizer.completion("", text)[0]


def _unused_tokens(model: Any, tokenizer: Tokenizer | None, vocabulary: int) -> tuple[int, int]:
    """Return two ids that no text contains."""
    if isinstance(tokenizer, ByteChat):
        return 0xFE, 0xFF  # in no UTF-8
    found: list[int] = []
    if tokenizer is not None:
        found += range(tokenizer.vocab_size, vocabulary)  # rows that only fill up the matrix
        inner = getattr(tokenizer, "tokenizer", None)
        known = {tokenizer.eos, tokenizer.pad, getattr(tokenizer, "bos", None), getattr(inner, "unk_token_id", None)}
        template = str(getattr(inner, "chat_template", "") or "")
        special = getattr(inner, "added_tokens_decoder", {})
        found += [
            number for number, token in sorted(special.items())
            if token.special and number not in known and str(token) not in template
        ]  # fmt: skip
    if len(found) < 2:
        raise ConfigError("slot reader: no two unused token ids are known; give yes_token and no_token")
    return found[0], found[1]


# --------------------------------------------------------------------------------- reading whole batches


def head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Return the output head, weight [V, W] and bias [V] or None.

    Raises:
        ConfigError: logits are no plain matrix times the last hidden state (a soft cap, a scale).
    """
    if isinstance(model, TinyLM):
        return model.transformer.token_embedding, None
    if not model.head_is_plain:
        raise ConfigError(f"self-evaluation: the output head of {model.base} is no plain matrix, which it has to be")
    found: tuple[Tensor, Tensor | None] = model._head()
    return found


def hidden_states(model: Any, batch: ExperienceBatch) -> tuple[Tensor, Rows]:
    """Return the last hidden states of all columns, flat [R * C, W], and the rows that say which is which."""
    if isinstance(model, TinyLM):
        rows = plain_rows(batch)
        return model.transformer.features(rows.tokens).flatten(0, 1), rows
    rows = model._rows(batch)
    return model._features(rows).flatten(0, 1), rows


def places(rows: Rows, scored_mask: Tensor, counts: Tensor, completions: Tensor | None = None) -> Tensor:
    """Return int64 [N, K], the flat index of the state after the first `counts` [N, K] tokens of each completion.

    Args:
        rows: of the forward pass.
        scored_mask: [N', T] of its completions.
        counts: 0 is the state of the prompt's last token; entries below 0 are read as 0.
        completions: int64 [N], which ones; None: all.
    """
    used = (scored_mask > 0).sum(1)
    offsets = used.cumsum(0) - used
    padded = torch.cat([rows.sources, rows.ends.new_zeros(1)])
    first, begins = torch.where(used > 0, padded[offsets], rows.ends), rows.ends - used
    if completions is not None:
        first, begins = first[completions], begins[completions]
    return torch.where(counts > 0, begins[:, None] + counts, first[:, None])


def drawn_so_far(token_logps: Tensor, counts: Tensor) -> Tensor:
    """Return float32 [N, K, 3]: how many tokens, the sum of their log-probs, the lowest of them; zeros for no token.

    Args:
        token_logps: [N, T] of the completions, at temperature 1.
        counts: int64 [N, K], after how many tokens; below 0 is read as 0.
    """
    counts = counts.clamp(min=0)
    none = token_logps.new_zeros(len(token_logps), 1)
    total = torch.cat([none, token_logps.cumsum(1)], 1).gather(1, counts)
    lowest = torch.cat([none, token_logps.cummin(1).values], 1).gather(1, counts)
    return torch.stack([counts.float(), total.float(), lowest.float()], -1)


@torch.no_grad()
def lengths_and_drawn(
    model: Any, batch: ExperienceBatch, states: Tensor, rows: Rows, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a probe is told beside states where it reads: tokens read int64 [M], and `drawn_so_far` [M, 3].

    Args:
        model: a `TinyLM` or a `CausalLM`.
        batch: whole completions.
        states: as `hidden_states` returned them for the batch.
        rows: the same.
        counts: int64 [N, K], after how many tokens to read; below 0: not.
    """
    weight, bias = head(model)
    logps = spread(head_logps(states[rows.sources], weight, rows.targets, bias), batch)
    lengths = batch.prompt_mask.sum(1).long()[batch.prompt_of][:, None] + counts
    wanted = counts >= 0
    return lengths[wanted], drawn_so_far(logps, counts)[wanted]


def with_suffix(batch: ExperienceBatch, counts: Tensor, suffix: Sequence[int]) -> ExperienceBatch:
    """Return a batch with a row for every place to read: the first tokens of a completion, then the suffix.

    Args:
        batch: completions.
        counts: int64 [N, K], after how many tokens; below 0: no row. The rows are in row-major order.
        suffix: token ids.
    """
    rows, _ = (counts >= 0).nonzero(as_tuple=True)
    lengths = counts[counts >= 0][:, None]
    extra = torch.tensor(suffix, device=counts.device)
    columns = torch.arange(int(lengths.max()) + len(extra), device=counts.device)
    own = functional.pad(batch.completions, (0, len(extra)))[rows][:, : len(columns)]
    offset = columns - lengths
    tokens = torch.where(offset < 0, own, extra[offset.clamp(0, len(extra) - 1)])
    mask = (offset < len(extra)).float()
    return ExperienceBatch(batch.prompts, batch.prompt_mask, tokens, mask, batch.prompt_of[rows])


@dataclass(frozen=True)
class Reading:
    """What a model was read to say, and where its own predictions are in the same forward pass.

    Attributes:
        log_odds: float32 [N, K], raw l at each place; NaN where nothing was to be read.
        states: [R * C, W], last hidden states.
        predicting: int64 [M], flat index of the states that predict the completions' tokens, completions in turn.
    """

    log_odds: Tensor
    states: Tensor
    predicting: Tensor


def read(model: Any, evaluator: AnyEvaluator, batch: ExperienceBatch, counts: Tensor) -> Reading:
    """Read P(no better) of completions after some of their tokens, in one forward pass: `Evaluator.score` for training.

    Args:
        model: a `TinyLM` or a `CausalLM`.
        evaluator: how.
        batch: whole completions.
        counts: int64 [N, K], after how many tokens to read; below 0: not. A suffix sees the policy's predictions of a
            completion as far as its longest prefix among these and one token more, which may be EOS.
    """
    wanted = counts >= 0
    if isinstance(evaluator, SuffixEvaluator):
        asked = with_suffix(batch, counts, evaluator.suffix)
        states, rows = hidden_states(model, asked)
        index = rows.ends
        number = torch.full(counts.shape, -1, device=counts.device)
        number[wanted] = torch.arange(len(asked), device=counts.device)
        most, longest = counts.max(1)
        seen = torch.minimum(most + 1, batch.lengths.long())[:, None]
        columns = torch.arange(int(seen.max()), device=counts.device)
        kept = number.gather(1, longest[:, None])[:, 0]
        predicting = places(rows, asked.scored_mask, columns.expand(len(batch), -1), kept)[columns < seen]
    else:
        states, rows = hidden_states(model, batch)
        index = places(rows, batch.scored_mask, counts)[wanted]
        predicting = rows.sources
    if isinstance(evaluator, ProbeEvaluator):
        found = evaluator.log_odds(states[index], *lengths_and_drawn(model, batch, states, rows, counts))
    else:
        weight, bias = head(model)
        found = states[index].float() @ (weight[evaluator.no] - weight[evaluator.yes]).float()
        if bias is not None:
            found = found + (bias[evaluator.no] - bias[evaluator.yes]).float()
    empty = torch.full(counts.shape, torch.nan, device=counts.device)
    return Reading(empty.masked_scatter(wanted, found), states, predicting)
