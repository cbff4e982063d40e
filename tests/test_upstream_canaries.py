"""DeepSpeed's faults that this code works around, shown without any of our code.

A test that turns red here is good news: the fault was mended upstream. Then see whether the way
around it, named in the test's docstring, is still worth having.
"""

import pytest
import torch

from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("canaries")
    return run_on_ranks("tests.workers.canaries", 2, out, {})[0]


def test_a_universal_checkpoint_loses_frozen_weights_and_buffers_without_a_word(seen):
    """Why resharding is our own: `checkpoint/reshard.py`, `engine/zero_state.py`."""
    found = seen["checkpoints"]["universal"]
    assert found["as_saved"] == {"student.weight": True, "teacher.weight": False, "scale": False}
    assert found["as_before"] == {"student.weight": False, "teacher.weight": True, "scale": True}


def test_a_universal_checkpoint_gives_every_group_the_settings_of_the_first(seen):
    """Why `engine/resume.py` sets and compares the parameter groups."""
    first, second = seen["checkpoints"]["universal"]["groups"]
    assert first == [1e-2, 0.4]
    assert second == first, "it was made with 5e-3 and no decay"


def test_loading_the_module_only_leaves_trained_weights_at_random(seen):
    """Why evaluators are given safetensors: `checkpoint/load.py`."""
    found = seen["checkpoints"]["module_only"]
    assert found["path"] == "newer", "it reports success"
    assert found["as_before"]["student.weight"]
    assert found["as_saved"]["teacher.weight"]


def test_loading_without_the_optimiser_gives_the_weights_of_another_tag(seen):
    """Why a step is asked for by folder and verified: `checkpoint/load.py`."""
    found = seen["checkpoints"]["asked_for_older"]
    assert found == {"path": "older", "is_older": False, "is_newer": True}


def test_no_checkpoint_is_no_error_and_a_wrong_tag_one_without_words(seen):
    """Why `jepa resume` looks for a commit by itself and never starts afresh."""
    assert seen["checkpoints"]["missing"] == {"nothing": [None, None], "wrong_tag": ""}


def test_latest_names_a_checkpoint_of_which_a_rank_wrote_nothing(seen):
    """Why the manifest is written when all ranks have reported: `checkpoint/save.py`."""
    assert seen["torn"]["latest"] == "half"
    ranks = {
        name.split("zero_pp_rank_")[1][0] for name in seen["torn"]["files"] if "_rank_" in name
    }
    assert ranks == {"0"}


def test_a_checkpoint_inside_accumulation_forgets_that_it_was(seen):
    """Why checkpoints are taken between steps alone: `engine/loop.py`."""
    assert seen["accumulation"] == {"saved_at": 1, "resumed_at": 0}


def test_writing_to_a_gathered_parameter_is_discarded_without_a_word(seen):
    """Why the teacher's average is kept on shards: `models/teacher.py`."""
    assert seen["writes"]["gathered_write_is_discarded"]


def test_the_live_copy_of_a_small_parameter_does_not_follow_its_shard(seen):
    """Why `engine/zero_state.refresh_gathered` exists."""
    assert seen["writes"]["small_parameter_stays_stale"]


def test_an_average_in_bf16_stands_still():
    """Why the teacher's average is fp32 whatever it computes in: `models/teacher.py`."""
    teacher, student = torch.full((1000,), 1.0), torch.full((1000,), 1.5)
    half, full = teacher.bfloat16(), teacher.clone()
    for _ in range(100):
        half.lerp_(student.bfloat16(), 1 - 0.99925)
        full.lerp_(student, 1 - 0.99925)
    assert half.equal(teacher.bfloat16())
    assert full.min() > 1.03
