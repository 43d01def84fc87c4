import pytest

from relabel_datasets.demo import DemoResult
from relabel_datasets.demo.results import _listed
from relabel_datasets.demo.scoring import Score

SINGLE = [Score(0.50, 0.60, 0.40), Score(0.52, 0.62, 0.42), Score(0.51, 0.61, 0.41)]
STRONG = Score(0.9, 0.9, 0.9)


def shifted(*points):
    """Scores whose differences from SINGLE are (mean, spread) points: mean - spread, mean and mean + spread."""
    return [
        Score(*(value + (mean + turn * spread) / 100 for value, (mean, spread) in zip(score, points, strict=True)))
        for score, turn in zip(SINGLE, (-1, 0, 1), strict=True)
    ]


def result(tmp_path, single, relabel, annotator=STRONG):
    scores = {"single label": single, "label smoothing": single, "ReLabel": relabel}
    return DemoResult(scores, annotator, tmp_path, [], tmp_path, 1.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (
            [(5, 1), (7, 2), (9, 0.5)],
            "Compared with single label, ReLabel gains 5.0 ± 1.0 points on the main object, 7.0 ± 2.0 points on any object and "
            "9.0 ± 0.5 points on random crops",
        ),
        (
            [(-5, 1), (-7, 2), (-9, 0.5)],
            "Compared with single label, ReLabel loses 5.0 ± 1.0 points on the main object, 7.0 ± 2.0 points on any object and "
            "9.0 ± 0.5 points on random crops",
        ),
        (
            [(1, 3), (-1, 2), (0, 0)],
            "Compared with single label, ReLabel makes no difference beyond two standard deviations on the main object (+1.0 ± "
            "3.0 points), any object (-1.0 ± 2.0 points) and random crops (+0.0 ± 0.0 points)",
        ),
        (
            [(-5, 1), (2, 1.5), (9, 1)],
            "Compared with single label, ReLabel gains 9.0 ± 1.0 points on random crops, loses 5.0 ± 1.0 points on the main "
            "object and makes no difference beyond two standard deviations on any object (+2.0 ± 1.5 points)",
        ),
    ],
    ids=["gains", "losses", "undecided", "mixed"],
)
def test_the_conclusion_has_sign_size_and_spread_of_each_difference(points, expected, tmp_path):
    conclusion = result(tmp_path, SINGLE, shifted(*points)).conclusion()
    assert conclusion.partition(";")[0] == expected


def test_one_seed_is_not_a_conclusion(tmp_path):
    conclusion = result(tmp_path, SINGLE[:1], [Score(0.6, 0.55, 0.4)]).conclusion()
    assert conclusion.startswith(
        "ReLabel differs from single label by +10.0 points on the main object, -5.0 points on any object and +0.0 points on "
        "random crops, but one seed cannot tell a difference from chance;"
    )


@pytest.mark.parametrize(
    ("annotator", "expected"),
    [
        (
            Score(0.53, 0.63, 0.43),
            "the annotator is above every student on the main object, any object and random crops.",
        ),
        (
            Score(0.9, 0.9, 0.42),
            "the annotator is above every student on the main object and any object, but not on random crops, where its label "
            "maps are a weak teacher.",
        ),
        (
            Score(0.51, 0.62, 0.1),  # above the mean of the students, but not above the best
            "the annotator is not above every student on the main object, any object or random crops, where its label maps "
            "are a weak teacher.",
        ),
    ],
    ids=["above", "partly", "below"],
)
def test_the_conclusion_says_whether_the_annotator_is_better_than_every_student(annotator, expected, tmp_path):
    assert result(tmp_path, SINGLE, SINGLE, annotator).conclusion().rpartition("; ")[2] == expected


def test_the_table_has_means_and_standard_deviations_and_ends_with_the_conclusion(tmp_path):
    demo = result(tmp_path, SINGLE[:2], [Score(0.4, 0.5, 0.6), Score(0.5, 0.5, 0.7)], Score(0.7, 0.8, 0.9))
    lines = demo.to_markdown().splitlines()
    assert lines[2] == "| single label | 51.0% ± 1.4 | 61.0% ± 1.4 | 41.0% ± 1.4 |"
    assert lines[4] == "| ReLabel | 45.0% ± 7.1 | 50.0% ± 0.0 | 65.0% ± 7.1 |"
    assert lines[5] == "| the annotator | 70.0% | 80.0% | 90.0% |"
    assert {line.count("|") for line in lines[:6]} == {5}
    assert lines[6:] == ["", demo.conclusion()]


def test_a_list_reads_as_english():
    assert [_listed("abc"[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
