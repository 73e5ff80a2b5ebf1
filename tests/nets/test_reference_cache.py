"""Cached reference log-probs equal live ones, and are computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steelyard.data.preferences import TextData, TextRow, tokenize
from steelyard.data.tokenizer import ByteChat
from steelyard.errors import DataError
from steelyard.nets.reference_cache import with_reference
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig


def tokenized(extra: str = "") -> object:
    rows = [TextRow(f"{n}?", ("yes" * n + extra, "n" * (5 - n)), pairs=((0, 1),)) for n in range(1, 5)]
    data = TextData("preference", rows)
    return tokenize(data, ByteChat(), 16, 20)


def tiny(seed: int = 0, **options) -> TinyLM:
    return TinyLM(TransformerConfig(ByteChat.vocab_size, 16, 1, 2, 40), torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cached_equals_live(tmp_path, temperature):
    data, model = tokenized(), tiny()
    cached = with_reference(data, model, tmp_path, temperature=temperature, batch_size=3)
    assert len(cached) == 4
    assert cached.content_hash == data.content_hash
    for rows in ([0], [3, 1], [2, 2, 0, 1]):
        batch = cached.batch(rows)
        live = model.reference_token_logps(data.batch(rows), temperature=temperature)
        assert torch.allclose(batch.reference_token_logps, live, atol=1e-5)
        assert (batch.reference_token_logps[batch.scored_mask == 0] == 0).all()


def test_computed_once_for_the_same_data_and_reference(tmp_path, monkeypatch):
    data, model = tokenized(), tiny()
    calls = []
    live = TinyLM.reference_token_logps
    monkeypatch.setattr(
        TinyLM, "reference_token_logps", lambda *given, **named: calls.append(1) or live(*given, **named)
    )
    with_reference(data, model, tmp_path)
    count = len(calls)
    with torch.no_grad():
        model.transformer.token_embedding.add_(1.0)  # training does not touch the reference
    with_reference(data, model, tmp_path)
    assert len(calls) == count
    for others in ((tokenized("!"), model, 1.0), (data, tiny(1), 1.0), (data, model, 0.7)):
        with_reference(others[0], others[1], tmp_path, temperature=others[2])
        count += 1
        assert len(calls) == count
    assert len(list(tmp_path.iterdir())) == 4


def test_a_foreign_file_is_refused(tmp_path):
    model = tiny()
    with_reference(tokenized(), model, tmp_path)
    (mine,) = Path(tmp_path).iterdir()
    with_reference(tokenized("!"), model, tmp_path)
    (other,) = (path for path in Path(tmp_path).iterdir() if path != mine)
    found = load_file(other)
    save_file({"token_logps": found["token_logps"][1:].clone(), "starts": found["starts"]}, mine)
    with pytest.raises(DataError, match="does not belong to these data"):
        with_reference(tokenized(), model, tmp_path)
