"""The verdict on made-up runs of every shape, and the step that it says to keep."""

import math
import random
from dataclasses import replace

import pytest

from pipeline.track.folder import ProbeScore
from pipeline.track.loss_shape import loss_shape
from pipeline.track.probe_trend import best_steps, probe_trend
from pipeline.track.verdict import Checkpoints, judge
from tests.test_track_metrics import REPORT

N = 200
SAVES = tuple(range(0, N + 1, 20))
RNG_SEEDS = range(5)


def curve(level, *, noise=0.01, seed=0):
    """Losses of N steps around a level given as a function of the share of the run."""
    source = random.Random(seed)
    return [level(step / N) + source.gauss(0, noise) for step in range(N)]


SHAPES = {
    "falling": lambda t: 0.4 + 0.6 * math.exp(-4 * t),
    "rising": lambda t: 0.4 + 0.4 * t,
    "turned": lambda t: 0.5 + 1.2 * (t - 0.4) ** 2,
    "flat": lambda t: 0.5 + 0 * t,
    "jumped": lambda t: 0.4 if t < 0.6 else 0.8,
}


@pytest.mark.parametrize("seed", RNG_SEEDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_is_called_by_its_name_under_noise(kind, seed):
    assert loss_shape(history(curve(SHAPES[kind], seed=seed))).kind == kind


@pytest.mark.parametrize("seed", RNG_SEEDS)
def test_a_jump_is_dated_to_within_a_few_steps_and_a_turn_to_within_a_tenth(seed):
    assert loss_shape(history(curve(SHAPES["jumped"], seed=seed))).turn_step == pytest.approx(
        0.6 * N + 1, abs=4
    )
    turn = loss_shape(history(curve(SHAPES["turned"], seed=seed))).turn_step
    assert turn == pytest.approx(0.4 * N, abs=0.1 * N)


def test_a_spike_that_comes_back_is_no_jump_and_a_few_steps_say_nothing():
    losses = curve(SHAPES["falling"])
    losses[100:104] = [9.0] * 4
    assert loss_shape(history(losses)).kind == "falling"
    assert loss_shape(history(losses[:8])).kind == "unknown"
    assert loss_shape(history([*losses[:50], *[math.nan] * 5])).kind == "not finite"


def test_another_level_of_a_new_stage_is_no_jump():
    losses = curve(SHAPES["jumped"])
    reports = history(losses)
    staged = [replace(r, stage=0 if r.step <= 120 else 1) for r in reports]
    assert loss_shape(reports).kind == "jumped"
    assert loss_shape(staged).kind == "flat"


def history(losses, ranks=lambda t: 10 + 20 * t, *, std=0.5):
    """Steps with the given losses; features measured at every tenth."""
    reports = []
    for index, loss in enumerate(losses):
        share = index / len(losses)
        health = {"feature_std": std, "effective_rank": ranks(share)}
        reports.append(
            replace(
                REPORT,
                step=index + 1,
                stage=0,
                loss=loss,
                health=health if index % 10 == 0 else None,
            )
        )
    return reports


def score(step, top1, *, head="linear", task="ssv2", num_val=1000):
    name = f"{task}-{step}-{head}"
    values = {"name": name, "task": task, "head": head, "step": step, "trained": step > 0}
    values |= {"top1": top1, "top5": None, "interval": None, "chance": 0.1}
    return ProbeScore(**values, num_val=num_val, seed=0, written=0.0)


def there(**changes):
    return Checkpoints(steps=SAVES, **changes)


def test_rising_loss_with_a_growing_rank_is_healthy_and_the_newest_is_kept():
    found = judge(history(curve(SHAPES["rising"])), checkpoints=there())
    assert found.state == "healthy"
    assert "rose" in found.text
    assert "while the rank grew" in found.text
    assert found.keep.step == 200
    assert "no probe has compared checkpoints" in found.keep.sentence
    assert found.todo == "Go on."


def test_a_collapse_keeps_the_last_step_before_it_and_says_what_to_change():
    found = judge(
        history(curve(SHAPES["falling"]), lambda t: 25 if t < 0.5 else 1.1), checkpoints=there()
    )
    assert found.state == "collapsed"
    assert found.keep.step == 100
    assert "since step 101 effective_rank is no longer above 3" in found.keep.sentence
    assert "higher teacher momentum" in found.todo


def test_a_rank_that_halves_keeps_the_step_of_its_best():
    def ranks(t):
        return 10 + 40 * t if t <= 0.5 else 30 - 44 * (t - 0.5)

    found = judge(history(curve(SHAPES["falling"]), ranks), checkpoints=there())
    assert found.state == "watch"
    assert "highest at step" in found.keep.sentence
    assert found.keep.step in (80, 100, 120)


def test_a_jump_with_bad_features_keeps_the_step_before_it_and_with_good_ones_the_newest():
    losses = curve(SHAPES["jumped"])
    good = judge(history(losses), checkpoints=there())
    assert good.keep.step == 200
    assert "jumped to" in good.text
    bad = [replace(r, skipped=r.step > 150 and r.step % 3 == 0) for r in history(losses)]
    found = judge(bad, checkpoints=there())
    assert found.state == "watch"
    assert found.keep.step in (100, 120)
    assert "the loss jumped at step 12" in found.keep.sentence


def test_probes_decide_and_the_newest_wins_only_within_luck():
    healthy = history(curve(SHAPES["falling"]))
    rising = [score(0, 0.2), score(40, 0.3), score(100, 0.4), score(200, 0.5)]
    found = judge(healthy, rising, there())
    assert found.keep.step == 200
    assert "score best, 50.0%" in found.keep.sentence
    assert "Probe scores rise" in found.text
    fallen = [score(40, 0.3), score(100, 0.5), score(200, 0.4)]
    found = judge(healthy, fallen, there())
    assert (found.state, found.keep.step) == ("watch", 100)
    assert "Probe scores fell: 40.0% at step 200 after 50.0% at step 100" in found.text
    level = [score(40, 0.3), score(100, 0.50), score(180, 0.495)]
    found = judge(healthy, level, there())
    assert found.keep.step == 180
    assert "within luck" in found.keep.sentence
    assert "not probed yet: 200" in found.keep.sentence


def test_the_best_step_is_named_even_if_its_checkpoint_is_gone_or_damaged():
    healthy = history(curve(SHAPES["falling"]))
    scores = [score(50, 0.6), score(100, 0.5), score(200, 0.4)]
    found = judge(healthy, scores, there(damaged={100: "file x is missing"}))
    assert found.keep.step == 200
    assert "step 50 scored 60.0% but is no longer there" in found.keep.sentence
    assert "Damaged checkpoints, step 100: file x is missing." in found.text
    assert judge(healthy, scores).keep.step is None


def test_means_over_other_tasks_do_not_compare_and_a_half_done_step_waits():
    scores = [score(20, 0.9, task="easy"), score(40, 0.3), score(40, 0.2, head="knn")]
    scores += [score(60, 0.4), score(60, 0.3, head="knn"), score(80, 0.99)]
    trend = probe_trend(scores)
    assert [point.step for point in trend.points] == [40, 60]
    assert trend.points[0].score == pytest.approx(0.25)
    assert [step for step, _ in best_steps(scores, None, SAVES)] == [60, 40]
    assert [step for step, _ in best_steps(scores, "ssv2/linear", SAVES)] == [80, 60, 40]
    assert best_steps(scores, "nothing", SAVES) == []


def test_a_checkpoint_that_alone_was_given_more_heads_ends_no_comparison():
    scores = [score(20, 0.5), score(40, 0.8), score(60, 0.4), score(60, 0.1, head="attentive")]
    trend = probe_trend(scores)
    assert [(point.step, point.score) for point in trend.points] == [
        (20, 0.5),
        (40, 0.8),
        (60, 0.4),
    ]
    alone = judge(history(curve(SHAPES["falling"])), scores[2:], there())
    assert "it is the only one with probe scores, 25.0%" in alone.keep.sentence


def test_the_teacher_that_follows_runs_behind_or_is_the_student_is_told():
    healthy = history(curve(SHAPES["falling"]))

    def words(distances):
        found = judge(healthy, checkpoints=there(teacher_distances=distances))
        return found.state, found.text

    state, text = words({0: 0.0, 20: 0.01, 40: 0.012})
    assert state == "healthy"
    assert "follows the student: 1.20% of the student's size away at step 40" in text
    state, text = words({20: 0.01, 40: 0.012, 60: 0.2})
    assert state == "watch"
    assert "runs away from its teacher: 20.00%" in text
    state, text = words({20: 0.0})
    assert state == "watch"
    assert "no average" in text


def test_a_run_that_has_hardly_begun_is_to_be_watched_and_keeps_what_there_is():
    found = judge([], checkpoints=Checkpoints(steps=(0,)))
    assert (found.state, found.keep.step) == ("watch", 0)
    assert judge([]).keep.sentence == "No step to keep: there is no whole checkpoint."
