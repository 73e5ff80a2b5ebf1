import gzip
import json

import numpy as np
import pytest

from steelyard.data.generated_tastes import TastesConfig, generate_tastes
from steelyard.data.pair_tasks import Taste, read_personas
from steelyard.errors import DataError
from steelyard.rng import numpy_generator

ROWS = [
    {"persona": "likes-art", "statement": "Art matters", "match": "Yes"},
    {"persona": "likes-art", "statement": "Art is dull", "match": "No"},
    {"persona": "likes-maths", "statement": "Proofs are fun", "match": "Yes"},
]


def packed(folder, rows):
    path = folder / "persona_statements/statements.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    return path


def taste(liked=30, disliked=20, width=3):
    features = np.random.default_rng(0).normal(size=(liked + disliked, width)).astype(np.float32)
    return Taste("anna", features, np.arange(liked + disliked) < liked)


def test_personas_are_read_in_order(tmp_path):
    packed(tmp_path, ROWS)
    art, maths = read_personas(tmp_path)
    assert (art.name, art.texts, art.liked.tolist()) == ("likes-art", ("Art matters", "Art is dull"), [True, False])
    assert maths.texts == ("Proofs are fun",)


def test_a_clone_of_the_original_repository_reads_the_same(tmp_path):
    (tmp_path / "persona").mkdir()
    for name in ("likes-maths", "likes-art"):
        lines = [
            json.dumps({"statement": row["statement"], "answer_matching_behavior": f" {row['match']}"})
            for row in ROWS
            if row["persona"] == name
        ]
        (tmp_path / "persona" / f"{name}.jsonl").write_text("\n".join(lines))
    art, maths = read_personas(tmp_path)
    assert (art.name, art.texts, art.liked.tolist()) == ("likes-art", ("Art matters", "Art is dull"), [True, False])
    assert maths.name == "likes-maths"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"persona": "a", "statement": "b", "match": "Maybe"}, r"line 1: match must be Yes or No, found 'Maybe'"),
        ({"persona": "a", "match": "Yes"}, r"line 1: expected texts persona, statement, match, found keys"),
        ([1], r"line 1: expected a JSON object, found list"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    packed(tmp_path, [row])
    with pytest.raises(DataError, match=message):
        read_personas(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected persona_statements/statements\.jsonl\.gz, or persona/NAME\.jsonl"):
        read_personas(tmp_path)
    path = packed(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_personas(tmp_path)


def test_the_real_personas(shared_data):
    personas = read_personas(shared_data)
    assert len(personas) == 90
    assert sum(len(persona.texts) for persona in personas) == 88_904


def test_halves_share_no_item_and_have_both_kinds():
    user = taste()
    first, second = user.halves(numpy_generator(0, "halves"))
    assert not set(first) & set(second)
    assert sorted([*first, *second]) == list(range(50))
    assert user.liked[first].sum() == 15
    assert user.liked[second].sum() == 15


def test_pairs_are_liked_and_disliked_and_use_every_item_before_any_twice():
    user = taste()
    pairs = user.pairs(np.arange(50), 45, numpy_generator(0, "pairs"))
    assert user.liked[pairs[:, 0]].all()
    assert not user.liked[pairs[:, 1]].any()
    assert np.bincount(pairs[:30, 0], minlength=30)[:30].tolist() == [1] * 30
    assert np.bincount(pairs[:40, 1] - 30).tolist() == [2] * 20
    opposite = user.flipped().pairs(np.arange(50), 45, numpy_generator(0, "pairs"))
    assert not user.liked[opposite[:, 0]].any()
    differences = user.differences(pairs)
    np.testing.assert_allclose(differences, user.features[pairs[:, 0]] - user.features[pairs[:, 1]])


def test_tastes_refuse_what_does_not_fit():
    with pytest.raises(DataError, match="no disliked item"):
        taste().pairs(np.arange(30), 2, numpy_generator(0, "pairs"))
    with pytest.raises(DataError, match="expected features"):
        Taste("bob", np.zeros((3, 2), np.float32), np.zeros(2, bool))


def test_generated_users_take_sides_on_the_axis_of_their_name():
    config = TastesConfig(users=60, items=600, features=16, axes=2, noise=0.0, own=0.0, shared=0.0)
    tastes = generate_tastes(config, 0)
    directions = np.stack([user.features[user.liked].mean(0) - user.features[~user.liked].mean(0) for user in tastes])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    axis = np.array([user.name.split("axis ")[1][0] for user in tastes])
    minority = np.array(["minority" in user.name for user in tastes])
    similar = directions @ directions.T
    same = (axis[:, None] == axis) & (minority[:, None] == minority)
    opposite = (axis[:, None] == axis) & (minority[:, None] != minority)
    assert similar[same].min() > 0.8
    assert similar[opposite].max() < -0.8
    assert abs(similar[axis[:, None] != axis]).max() < 0.4
    assert 0.2 < minority.mean() < 0.5
    assert all(user.liked.mean() == 0.5 for user in tastes)


def test_generated_users_are_a_function_of_the_seed():
    config = TastesConfig(users=3, items=10)
    one, again, other = generate_tastes(config, 0), generate_tastes(config, 0), generate_tastes(config, 1)
    assert all(np.array_equal(a.features, b.features) and a.name == b.name for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0].features, other[0].features)
