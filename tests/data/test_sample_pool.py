"""Sample pools: what is written is read back, bit for bit, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.data.sample_pool_files import PoolFolder
from steelyard.errors import DataError

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def full(prompt: str = "two and two?", n: int = 3) -> PromptSamples:
    """A prompt with everything known about it."""
    return PromptSamples(
        prompt,
        np.arange(n, dtype=np.float64),
        np.arange(n, dtype=np.int64) + 4,
        tuple(f"{k} é\n" for k in range(n)),
        tuple((k,) * (k + 4) for k in range(n)),
        temperatures=np.linspace(0, 1, n),
        logps=-np.arange(n, dtype=np.float64),
        certainty=np.arange(n) / 7,
        answers=tuple("" if k == 0 else str(k) for k in range(n)),
        scores=np.arange(n) / 10,
        checkpoint_scores=np.where(np.arange(n)[:, None] + 4 > [4, 5], 0.25, np.nan),
        stratum="easy",
        columns={"id": 7, "rm_score": [0.5 * k for k in range(n)], "note": "ü"},
        prompt_tokens=(1, 2, 3),
        finished=np.arange(n) > 0,
    )


BARE = PromptSamples("", np.array([np.nan]), np.array([1]))
TOY = SamplePool((full(), BARE, full("another", 1)), (4, 5), "toy")


def same(left: SamplePool, right: SamplePool) -> None:
    assert (left.checkpoints, left.source, len(left)) == (right.checkpoints, right.source, len(right))
    for a, b in zip(left, right, strict=True):
        for name in a.__dataclass_fields__:
            one, other = getattr(a, name), getattr(b, name)
            assert type(one) is type(other), name
            np.testing.assert_equal(other, one, name)
            if isinstance(one, np.ndarray):
                assert one.dtype == other.dtype, name


def test_round_trip(tmp_path):
    same(TOY, SamplePool.load(TOY.save(tmp_path / "pool", {"by": "hand"})))
    assert json.loads((tmp_path / "pool/pool.json").read_text())["made_by"] == {"by": "hand"}


def test_round_trip_of_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("steelyard.data.sample_pool_files.PIECE_PROMPTS", 2)
    TOY.save(tmp_path / "pool")
    assert len(list((tmp_path / "pool").glob("piece-*"))) == 2
    same(TOY, SamplePool.load(tmp_path / "pool"))
    same(TOY.take([0]), SamplePool.load(tmp_path / "pool", prompts=1))
    SamplePool.append(tmp_path / "pool", [full("more")])
    same(SamplePool((*TOY.items, full("more")), (4, 5), "toy"), SamplePool.load(tmp_path / "pool"))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters()),  # lone surrogates too: a byte-level decoder may write them
            st.lists(st.tuples(NUMBERS, st.text(st.characters()), st.lists(st.integers(0, 2**31 - 1))), min_size=1),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_round_trip_of_anything(tmp_path_factory, prompts):
    items = []
    for prompt, samples, bare in prompts:
        rewards, texts, tokens = zip(*samples, strict=True)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        known = {} if bare else {"texts": texts, "tokens": tuple(map(tuple, tokens)), "scores": np.array(rewards)}
        items.append(PromptSamples(prompt, np.array(rewards, np.float64), lengths, **known))
    folder = tmp_path_factory.mktemp("any") / "pool"
    pool = SamplePool(tuple(items), (), "any")
    same(pool, SamplePool.load(pool.save(folder)))


def test_pool_goes_on(tmp_path):
    first = PoolFolder.begin(tmp_path / "pool", {"seed": 1}, "toy", (4, 5))
    first.append(TOY.items[:2])
    (tmp_path / "pool/.piece-00001.safetensors.partial").write_bytes(b"half")  # what a kill leaves
    again = PoolFolder.begin(tmp_path / "pool", {"seed": 1}, "toy", (4, 5))
    assert again.prompts == 2
    again.append(TOY.items[2:])
    same(TOY, again.read())
    same(TOY, SamplePool.load(tmp_path / "pool"))


@pytest.mark.parametrize(
    ("made_by", "source", "checkpoints", "named"),
    [
        ({"seed": 2}, "toy", (4, 5), r"made_by.seed was 1, now 2"),
        ({"seed": 1, "model": "m"}, "toy", (4, 5), r"made_by.model was None, now 'm'"),
        ({"seed": 1}, "toy", (4,), r"checkpoints was \[4, 5\], now \[4\]"),
    ],
)
def test_other_settings_are_refused(tmp_path, made_by, source, checkpoints, named):
    PoolFolder.begin(tmp_path / "pool", {"seed": 1}, "toy", (4, 5))
    with pytest.raises(DataError, match=named):
        PoolFolder.begin(tmp_path / "pool", made_by, source, checkpoints)


def test_two_writers_do_not_mix(tmp_path):
    one = PoolFolder.begin(tmp_path / "pool", {}, "toy", (4, 5))
    other = PoolFolder.begin(tmp_path / "pool", {}, "toy", (4, 5))
    one.append(TOY.items[:1])
    with pytest.raises(DataError, match="another process"):
        other.append(TOY.items[:1])


def damaged(tmp_path, change):
    folder = SamplePool((full(),), (4, 5)).save(tmp_path / "pool")
    change(folder)
    return folder


def flip(folder):
    piece = folder / "piece-00000.safetensors"
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(bytes(content))


def cut(folder):
    piece = folder / "piece-00000.safetensors"
    piece.write_bytes(piece.read_bytes()[:-9])


def gap(folder):
    (folder / "piece-00000.safetensors").rename(folder / "piece-00001.safetensors")


def other_head(folder):
    file = folder / "pool.json"
    file.write_text(file.read_text().replace('"made_by": {}', '"made_by": {"a": 1}'))


def foreign_piece(folder):
    other = SamplePool((full(),), (4, 5), "other").save(folder.parent / "other")
    shutil.copy(other / "piece-00000.safetensors", folder / "piece-00000.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, "damaged; its content does not match its hash"),
        (cut, "not a readable safetensors file"),
        (gap, "a piece is missing"),
        (other_head, "belongs to another pool"),
        (foreign_piece, "belongs to another pool"),
        (lambda folder: (folder / "pool.json").unlink(), "holds no sample pool"),
        (lambda folder: (folder / "pool.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "pool.json").write_text('{"format": "x"}'), "expected format"),
        (lambda folder: (folder / "pool.json").write_text("[]"), "expected format"),
    ],
)
def test_damage_is_found(tmp_path, change, said):
    folder = damaged(tmp_path, change)
    with pytest.raises(DataError, match=said):
        SamplePool.load(folder)


def test_what_is_there_is_not_overwritten(tmp_path):
    TOY.save(tmp_path / "pool")
    with pytest.raises(DataError, match="already exists"):
        TOY.save(tmp_path / "pool")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(DataError, match="is no sample pool"):
        PoolFolder.begin(tmp_path / "notes", {})


def test_items_that_cannot_be_written(tmp_path):
    folder = PoolFolder.begin(tmp_path / "pool", {}, "toy", (4,))
    with pytest.raises(DataError, match="expected 1 checkpoint scores each"):
        folder.append([full()])
    with pytest.raises(DataError, match="finite JSON values"):
        folder.append([PromptSamples("", np.ones(1), np.ones(1, np.int64), columns={"x": float("nan")})])
    assert SamplePool.load(tmp_path / "pool").items == ()


def test_arrays(tmp_path):
    pool = SamplePool((full(), full("b")), (4, 5), "toy")
    assert pool.array("rm_score").tolist() == [[0, 0.5, 1]] * 2
    assert pool.array("scores").shape == (2, 3)
    assert pool.array("checkpoint_scores").shape == (2, 3, 2)
    for name in ("id", "note", "nothing", "stratum"):
        with pytest.raises(DataError, match=f"prompt 0 has no '{name}'"):
            pool.array(name)
    with pytest.raises(DataError, match="different numbers of samples"):
        TOY.rewards()


def test_take_samples():
    item = full().take([2, 0])
    assert item.rewards.tolist() == [2, 0]
    assert item.texts == ("2 é\n", "0 é\n")
    assert item.columns == {"id": 7, "rm_score": [1.0, 0.0], "note": "ü"}
    assert item.checkpoint_scores.shape == (2, 2)
    assert (item.prompt_tokens, item.stratum) == ((1, 2, 3), "easy")


def test_other_scores():
    pool = SamplePool((full(), full("b")), (4, 5), "toy")
    scores = np.arange(6.0).reshape(2, 3)
    found = pool.with_scores(scores, scores[:, :, None] / 6, (9,))
    assert (found.array("scores") == scores).all()
    assert found.checkpoints == (9,)
    assert pool.with_scores(scores).items[0].checkpoint_scores is None
    with pytest.raises(DataError, match="expected shape"):
        pool.with_scores(scores, scores[:, :, None], (9, 10))


def test_entries_must_match():
    with pytest.raises(DataError, match="answers has 2 entries, expected 1"):
        PromptSamples("", np.ones(1), np.ones(1, np.int64), answers=("a", "b"))
