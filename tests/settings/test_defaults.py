"""Numbers of the papers in the defaults."""

from __future__ import annotations

from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.lengths import PROFILES


def test_length_profiles_are_those_of_the_paper():
    assert PROFILES == {
        "cos_e": (128, 96),
        "esnli": (512, 256),
        "movie_rationales": (2048, 512),
        "eraser_multi_rc": (1024, 512),
    }


def test_default_lengths_of_answers_reproduce_the_tables_of_unifiedqa():
    settings = EvaluationSettings()
    assert (settings.input_limit, settings.answer_limit, settings.num_beams) == (512, 19, 1)
