"""The breaks of breaks.py can still be made and, in the long form, each is seen by the tests that it names."""

import os

import breaks
import pytest

PARTS = {"ops", "attention", "moe", "data", "checkpoint", "training", "generation", "serving"}


def test_every_break_can_be_made(tmp_path):
    assert {one.file for one in breaks.BREAKS} >= PARTS
    for number, one in enumerate(breaks.BREAKS):
        package = breaks.copy(str(tmp_path / str(number)))
        one.apply(package)
        compile((package / f"{one.file}.py").read_text(encoding="utf-8"), one.file, "exec")


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("DSL_SOAK") != "1", reason="minutes: make soak")
def test_every_break_is_seen_and_what_no_test_sees_is_told():
    harmless = breaks.Break(
        "config", "another word", '"be positive")', '"be more")', "test_ops anchor_computed_by_hand"
    )
    assert breaks.unseen(breaks.BREAKS) == []
    [said] = breaks.unseen([harmless])
    assert "config: another word" in said and "exit code 0" in said
