"""The loop: as many updates as asked, rows and checkpoints where they belong, and a stop that leaves no damage."""

from __future__ import annotations

import json
import random
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steelyard.errors import NonFiniteError
from steelyard.objectives.base import Phase
from steelyard.train import checkpoint
from steelyard.train.guards import FiniteGuard, require_finite
from steelyard.train.loop import Interrupted, LoopConfig, Stage, fit, update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir

from .tiny import Line, Numbers, Rows


def carry_out(
    path,
    stop,
    *,
    first=0,
    start=None,
    log=10,
    save=10,
    every=0,
    evaluate=None,
    learner=None,
    source=None,
    optim=None,
    optimizers=None,
):
    """Fit a `Line` in a new run directory and return (learner, source, run)."""
    learner, source, run = learner or Line(), source or Numbers(), RunDir(path)
    if not path.exists():
        run.create()
    fit(
        learner,
        source,
        optimizers or Optimizers(learner, optim or OptimConfig()),
        Stage("offline", first, stop, every),
        LoopConfig(log, save),
        run,
        seed=0,
        start=first if start is None else start,
        artefact={},
        evaluate=evaluate,
        quiet=True,
    )
    return learner, source, run


def rows_of(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 23])
def test_as_many_updates_as_asked(count, tmp_path):
    learner, source, run = carry_out(tmp_path / "run", count, log=10, save=4)
    assert source.asked == list(range(count))
    assert learner.calls == {"fit": count, "level": count // 2, "after": count}
    assert [row["update_step"] for row in rows_of(run)] == [10, 20][: count // 10] + [count] * (count % 10 > 0)
    if count:
        found = checkpoint.load(checkpoint.last(run.checkpoints))
        assert found.step == found.state["update_step"] == count
        assert found.source["asked"].tolist() == source.asked
        assert torch.equal(found.model["slope"], learner.slope)
    else:
        assert checkpoint.steps(run.checkpoints) == []


def test_a_later_stage_counts_on(tmp_path):
    learner, source, run = carry_out(tmp_path / "run", 12, first=7, log=5, save=100)
    assert source.asked == list(range(7, 12))
    assert learner.calls["fit"] == 5
    assert learner.calls["level"] == 3  # updates 7, 9 and 11: every second of the run, not of the stage
    assert [row["update_step"] for row in rows_of(run)] == [10, 12]


def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path, monkeypatch):
    saved, original = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, step, **parts: saved.append(step) or original(folder, step, **parts)
    )
    carry_out(tmp_path / "run", 11, save=4)
    assert saved == [4, 8, 11]
    saved.clear()
    carry_out(tmp_path / "other", 8, save=4)
    assert saved == [4, 8]


def test_rows_hold_the_metrics_of_their_update(tmp_path):
    _, _, run = carry_out(tmp_path / "run", 6, log=3)
    rows = rows_of(run)
    assert rows[0].keys() - rows[1].keys() == set()
    assert rows[1].keys() == {
        "phase", "update_step", "env_step", "time/updates_per_second",
        "loss/fit", "grad/fit", "loss/level", "grad/level",
    }  # fmt: skip
    assert "loss/level" not in rows[0]  # update 2, counted from 0, has no second phase
    assert rows[0]["phase"] == "offline"
    learner = Line()
    optimizers = Optimizers(learner, OptimConfig())
    for step in range(3):
        metrics = update(learner, optimizers, Numbers().batch(step), 0, step)
    assert rows[0]["loss/fit"] == float(metrics["loss/fit"])
    assert rows[0]["grad/fit"] == float(metrics["grad/fit"])


def test_a_phase_moves_only_its_groups():
    learner = Line()
    optimizers = Optimizers(learner, OptimConfig())
    update(learner, optimizers, Numbers().batch(0), 0, 0)
    assert learner.slope.abs().min() > 0
    assert learner.level.item() == 0
    assert learner.slope.grad is None


# ---------------------------------------------------------------------------------------------- evaluation


def test_when_evaluations_come(tmp_path):
    def schedule(name, stop, every, **more):
        steps = []
        carry_out(tmp_path / name, stop, every=every, evaluate=lambda step: steps.append(step), **more)
        return steps

    assert schedule("a", 10, 4) == [0, 4, 8, 10]
    assert schedule("b", 8, 4) == [0, 4, 8]
    assert schedule("c", 1, 100) == [0, 1]
    assert schedule("d", 10, 0) == []
    assert schedule("e", 17, 5, first=7) == [7, 12, 17]
    assert schedule("f", 17, 5, first=7, start=12) == [17]  # a resume does not repeat what was written
    assert schedule("g", 17, 5, first=7, start=17) == []


def test_the_score_of_a_checkpoint_is_that_of_its_own_step(tmp_path, monkeypatch):
    scores, original = {}, checkpoint.save

    def save(folder, step, **parts):
        scores[step] = parts["score"]
        return original(folder, step, **parts)

    monkeypatch.setattr(checkpoint, "save", save)
    _, _, run = carry_out(tmp_path / "run", 9, save=2, every=3, evaluate=lambda step: -float(step))
    assert scores == {2: None, 4: None, 6: -6.0, 8: None, 9: -9.0}
    assert checkpoint.best(run.checkpoints).name == "step_00000006"


def test_evaluation_never_changes_training(tmp_path):
    """Promise P7: bit-equal weights, whatever the evaluation draws from global generators."""

    def disturb(step):
        torch.manual_seed(step)
        torch.rand(7)
        np.random.seed(step)
        random.seed(step)
        return float(torch.rand(()))

    plain, _, _ = carry_out(tmp_path / "plain", 12)
    watched, _, run = carry_out(tmp_path / "watched", 12, every=1, evaluate=disturb)
    assert same_weights(plain, watched)
    assert checkpoint.load(checkpoint.last(run.checkpoints)).score is not None


def test_global_random_state_does_not_matter_and_is_left_alone(tmp_path):
    torch.manual_seed(1)
    first, _, _ = carry_out(tmp_path / "first", 7)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    second, _, _ = carry_out(tmp_path / "second", 7)
    assert same_weights(first, second)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_intervals_do_not_change_training(tmp_path):
    first, _, _ = carry_out(tmp_path / "first", 13, log=1, save=1)
    second, _, _ = carry_out(tmp_path / "second", 13, log=100, save=100)
    assert same_weights(first, second)


@pytest.mark.parametrize("cut", [1, 4, 12])
def test_k_updates_are_j_and_a_resume_and_the_rest(cut, tmp_path):
    whole, _, run = carry_out(tmp_path / "whole", 13)
    carry_out(tmp_path / "cut", cut)
    found = checkpoint.load(checkpoint.last(RunDir(tmp_path / "cut").checkpoints))
    learner, source = Line(), Numbers()
    optimizers = Optimizers(learner, OptimConfig())
    checkpoint.load_into(learner, found.model, "cut")
    optimizers.load_state_tensors(found.optimizers)
    source.load_state_tensors(found.source)
    learner.calls["after"] = cut
    carry_out(tmp_path / "rest", 13, start=cut, learner=learner, source=source, optimizers=optimizers)
    assert same_weights(whole, learner)
    last = (
        checkpoint.load(checkpoint.last(run.checkpoints)),
        checkpoint.load(checkpoint.last(RunDir(tmp_path / "rest").checkpoints)),
    )
    for part in ("model", "optimizers", "source"):
        a, b = (getattr(found, part) for found in last)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    ("learner", "source", "named"),
    [
        (Line("loss", 7), None, "loss 'fit'"),
        (Line("gradient", 7), None, "gradient of 'fit'"),
        (None, Numbers(poison=7), "loss 'fit'"),
    ],
    ids=["loss", "gradient", "batch"],
)
def test_a_value_that_is_not_finite_stops_the_run(learner, source, named, tmp_path, monkeypatch):
    saved, original = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, step, **parts: saved.append(step) or original(folder, step, **parts)
    )
    with pytest.raises(NonFiniteError) as caught:
        carry_out(tmp_path / "run", 20, save=3, log=1, learner=learner, source=source)
    assert str(caught.value) == (
        f"{named} is not finite at update step 7; training stopped, the last good checkpoint stays"
    )
    assert saved == [3, 6]
    found = checkpoint.load(checkpoint.last(RunDir(tmp_path / "run").checkpoints))
    assert found.step == 6
    assert all(bool(torch.isfinite(value).all()) for value in (*found.model.values(), *found.optimizers.values()))
    assert [row["update_step"] for row in rows_of(RunDir(tmp_path / "run"))] == [1, 2, 3, 4, 5, 6, 7]


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on an accelerator: the guard must not look at it before `check`."""

    looks = 0

    @property
    def device(self):
        return SimpleNamespace(type="cuda")

    def __bool__(self):
        Elsewhere.looks += 1
        return super().__bool__()

    def __int__(self):
        Elsewhere.looks += 1
        return super().__int__()


def test_the_guard_waits_for_the_device_only_when_it_checks(tmp_path):
    def there(*values):
        return torch.tensor(values).as_subclass(Elsewhere)

    guard, Elsewhere.looks = FiniteGuard(), 0
    nan, inf = float("nan"), float("inf")
    for step in range(3):
        guard.watch("a", there(1.0, 2.0), step)
        guard.watch("b", there(0.0), step)
    assert Elsewhere.looks == 0
    guard.check()
    guard.watch("b", there(inf), 5)
    guard.watch("a", there(1.0, nan), 4)
    for step in (6, 7):
        guard.watch("a", there(nan), step)
        guard.watch("b", there(1.0), step)  # good again: the first bad step is not forgotten
    guard.watch("c", there(nan), 9)
    Elsewhere.looks = 0
    guard.watch("d", there(nan), 9)
    assert Elsewhere.looks == 0
    with pytest.raises(NonFiniteError, match=r"^a is not finite at update step 4; training stopped"):
        guard.check()


def test_the_guard_checks_before_a_checkpoint_on_a_device(tmp_path, monkeypatch):
    """Between two log points nothing is fetched, but no checkpoint may be written past a NaN."""
    original = FiniteGuard.watch
    monkeypatch.setattr(
        FiniteGuard, "watch", lambda self, name, value, step: original(self, name, value.as_subclass(Elsewhere), step)
    )
    with pytest.raises(NonFiniteError, match="loss 'fit' is not finite at update step 4"):
        carry_out(tmp_path / "run", 20, save=3, log=100, learner=Line("loss", 4))
    assert checkpoint.last(RunDir(tmp_path / "run").checkpoints).name == "step_00000003"


def test_require_finite_names_value_and_step():
    require_finite("action", torch.zeros(3), 4)
    with pytest.raises(NonFiniteError, match=r"^action is not finite at environment step 4$"):
        require_finite("action", torch.tensor([0.0, float("inf")]), 4)


# ---------------------------------------------------------------------------------------------- ctrl-C


def test_ctrl_c_finishes_the_update_and_leaves_a_checkpoint(tmp_path):
    def press(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    source = Numbers(press)
    with pytest.raises(Interrupted):
        carry_out(tmp_path / "run", 20, save=100, source=source)
    assert signal.getsignal(signal.SIGINT) is before
    assert source.asked == [0, 1, 2, 3, 4, 5]
    found = checkpoint.load(checkpoint.last(RunDir(tmp_path / "run").checkpoints))
    assert found.step == 6
    reference, _, _ = carry_out(tmp_path / "other", 6)
    assert torch.equal(found.model["slope"], reference.slope)


def test_ctrl_c_in_the_last_update_is_not_lost(tmp_path):
    source = Numbers(lambda step: step == 7 and signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        carry_out(tmp_path / "run", 8, source=source)
    assert checkpoint.last(RunDir(tmp_path / "run").checkpoints).name == "step_00000008"


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def press(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path / "run", 20, save=2, source=Numbers(press))
    assert checkpoint.load(checkpoint.last(RunDir(tmp_path / "run").checkpoints)).step == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_loop_runs_in_another_thread(tmp_path):
    """Signals cannot be caught there; training must go on all the same."""
    done = []
    thread = threading.Thread(target=lambda: done.append(carry_out(tmp_path / "run", 3)))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_disk_that_fails_stops_the_run(tmp_path, monkeypatch):
    original = checkpoint.write_files

    def fails(target, files, header):
        if header["step"] == 6:
            raise OSError(28, "No space left on device")
        original(target, files, header)

    monkeypatch.setattr(checkpoint, "write_files", fails)
    with pytest.raises(OSError, match="No space left"):
        carry_out(tmp_path / "run", 20, save=2)
    assert checkpoint.load(checkpoint.last(RunDir(tmp_path / "run").checkpoints)).step == 4


# ---------------------------------------------------------------------------------------------- gradients


def steps_taken(config, scale=1.0):
    """Return (gradient that reached Adam, norm that was reported) of one step on a loss with gradient (3, 4, 0)."""
    learner, seen = Line(), []
    optimizers = Optimizers(learner, config)
    adam = optimizers.adams["slope"]
    original = adam.step
    adam.step = lambda gradients: (seen.append(gradients[0].clone()), original(gradients))[1]
    loss = scale * (learner.slope * torch.tensor([3.0, 4.0, 0.0])).sum()
    norm = optimizers.step(Phase(("fit",), ("slope",)), loss)
    return seen[0], float(norm)


def test_gradients_are_clipped_to_the_norm():
    gradient, norm = steps_taken(OptimConfig(max_grad_norm=1.0))
    assert norm == pytest.approx(5.0)  # reported as it was
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8, 0.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [None, 6.0])
def test_small_gradients_are_left_alone(limit):
    gradient, norm = steps_taken(OptimConfig(max_grad_norm=limit))
    assert norm == pytest.approx(5.0)
    assert gradient.tolist() == [3.0, 4.0, 0.0]


def test_clipping_keeps_a_gradient_that_is_not_finite_visible():
    _, norm = steps_taken(OptimConfig(max_grad_norm=1.0), scale=float("inf"))
    assert not torch.isfinite(torch.tensor(norm))


def test_autocast_trains_float32_weights(tmp_path):
    plain, _, _ = carry_out(tmp_path / "plain", 30)
    mixed, _, run = carry_out(tmp_path / "mixed", 30, optim=OptimConfig(autocast="bf16"))
    assert mixed.slope.dtype == torch.float32
    assert not torch.equal(plain.slope, mixed.slope)  # it does something
    assert (plain.slope - mixed.slope).abs().max() < 0.1
    again, _, _ = carry_out(tmp_path / "again", 30, optim=OptimConfig(autocast="bf16"))
    assert same_weights(mixed, again)
    assert rows_of(run)[-1]["loss/fit"] < 1


def test_rows_move_as_one():
    assert len(Rows(torch.zeros(4, 3)).to("cpu")) == 4
