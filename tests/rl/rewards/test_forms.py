r"""Answers, tags and boxes: as d1's rewards where those are right, and right where they are not."""

from __future__ import annotations

import re

import pytest

from mmdlm.rl.rewards.answers import d1
from mmdlm.rl.rewards.answers.exact_match import ExactMatch, WholeNumber
from mmdlm.rl.rewards.answers.form import BoxedAnswer, TagCount, Tagged

WELL = "<reasoning>\n6 x 12 = 72\n</reasoning>\n<answer>\n72\n</answer>\n"
LINES = "<reasoning>\n6 x 12\n\n= 72\n</reasoning>\n<answer>\n72\n</answer>\n"


# ---- the published ones, in our own words, of the code of 2025-05-04


def published_gsm8k(text: str, answer: str) -> dict[str, float]:
    """d1's five rewards for GSM8K; `.` stops at the end of a line."""
    given = text.split("<answer>")[-1].split("</answer>")[0].strip()
    strict = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    soft = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    count = 0.125 * (text.count("<reasoning>\n") == 1)
    count += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return {
        "xmlcount": count,
        "soft_format": 0.5 * bool(re.match(soft, text)),
        "strict_format": 0.5 * bool(re.match(strict, text)),
        "int": 0.5 * given.isdigit(),
        "correctness": 2.0 * (given == answer),
    }


def ours_gsm8k(text: str, answer: str) -> dict[str, float]:
    rubric = d1.gsm8k()
    found = rubric(["?"], [text], columns={"answer": [answer]})
    return {name: rubric.weights[name] * float(one[0]) for name, one in found.rewards.items()}


@pytest.mark.parametrize(
    "text",
    [
        WELL,
        WELL.replace("72\n</answer>", "71\n</answer>"),
        WELL.replace("72\n</answer>", "seventy\n</answer>"),
        WELL + "and more",
        WELL.replace("</reasoning>\n", "", 1),
        WELL.replace("<answer>\n", "", 1),
        "nothing of this kind\n",
    ],
)
def test_single_line_reasoning_is_scored_as_published(text: str) -> None:
    theirs, ours = published_gsm8k(text, "72"), ours_gsm8k(text, "72")
    # theirs wants tags and text on one line, and so is never given together with the strict one
    assert theirs.pop("soft_format") == 0
    assert ours.pop("soft_format") == 0.5 * text.startswith(WELL[:42])
    assert ours == pytest.approx(theirs)


def test_soft_format_on_one_line_is_as_published() -> None:
    text = "<reasoning>6 x 12 = 72</reasoning> <answer>72</answer>"
    assert (
        ours_gsm8k(text, "72")["soft_format"] == published_gsm8k(text, "72")["soft_format"] == 0.5
    )


def test_reasoning_of_many_lines_has_the_form_that_the_published_rewards_miss() -> None:
    theirs, ours = published_gsm8k(LINES, "72"), ours_gsm8k(LINES, "72")
    assert theirs["soft_format"] == theirs["strict_format"] == 0
    assert ours == pytest.approx(ours_gsm8k(WELL, "72"))


def test_text_that_ends_at_its_last_tag_is_not_all_trailing() -> None:
    text = WELL.rstrip("\n")
    assert published_gsm8k(text, "72")["xmlcount"] < 0.46
    assert ours_gsm8k(text, "72")["xmlcount"] == pytest.approx(0.5)
    assert ours_gsm8k(text, "72")["strict_format"] == 0.5


def published_boxed(text: str) -> float:
    reward = 0.0
    if "<answer>" in text:
        text = text.split("<answer>")[1].split("</answer>")[0]
        reward += 1.0
    return 0.5 * (reward + (1.0 if "\boxed" in text else 0.5))


@pytest.mark.parametrize("text", [WELL, "no tags", "<answer>\n1\n</answer>"])
def test_without_a_box_the_format_of_math_is_as_published(text: str) -> None:
    assert BoxedAnswer()([""], [text]) == [published_boxed(text)]


def test_a_box_is_seen_where_the_published_reward_sees_a_backspace() -> None:
    text = "<answer>\n\\boxed{\\frac{1}{2}}\n</answer>"
    assert published_boxed(text) == 0.75
    assert BoxedAnswer()([""], [text]) == [1.0]
    assert BoxedAnswer()([""], ["so \\boxed{2}"]) == [0.5]


# ---- tags


@pytest.mark.parametrize(
    "text, soft, strict",
    [
        ("<answer>1</answer><reasoning>r</reasoning>", 0, 0),
        ("<reasoning>r</reasoning>\n<answer>1</answer>", 1, 0),
        ("<reasoning>\nr\n</reasoning>\n<answer>\n1\n</answer>", 1, 1),
        ("x <reasoning>\nr\n</reasoning>\n<answer>\n1\n</answer>", 0, 0),
        (WELL + WELL, 0, 0),
        ("<reasoning>\nr\n</reasoning>\n<answer>\n1", 0, 0),
        ("", 0, 0),
    ],
)
def test_tags_stand_once_and_in_order(text: str, soft: float, strict: float) -> None:
    assert Tagged()([""], [text]) == [soft]
    assert Tagged(strict=True)([""], [text]) == [strict]


def test_thinking_needs_an_answer_after_it() -> None:
    think = Tagged(tags=("think",))
    texts = ["<think>a\nb</think>\n7", "<think>a</think>\n", "7", "<think>a", "<think></think>x"]
    assert think([""] * 5, texts) == [1, 0, 0, 0, 1]


def test_the_prompt_may_have_opened_the_first_tag() -> None:
    text = WELL.removeprefix("<reasoning>")
    assert Tagged()([""], [text]) == [0]
    assert Tagged(opened=True, strict=True)([""], [text]) == [1]


def test_trailing_text_costs_more_than_it_can_gain() -> None:
    assert TagCount()([""], [WELL + "x" * 1000])[0] < 0


def test_tags_are_names() -> None:
    with pytest.raises(ValueError, match="without < and >"):
        Tagged(tags=("<answer>",))


# ---- answers


@pytest.mark.parametrize(
    "completion, right, score",
    [
        ("<answer>\n1,072\n</answer>", "#### 1072", 1),
        ("<answer>$18</answer>", "18", 1),
        ("<answer>18.</answer>", "18", 1),
        ("<answer>18.0</answer>", "18", 0),
        ("18", "18", 0),
        ("\\boxed{18}", "18", 1),
        ("<answer>18</answer></answer>", "18", 1),
        ("<answer></answer>", "", 0),
    ],
)
def test_exact_match(completion: str, right: str, score: float) -> None:
    assert ExactMatch()([""], [completion], answer=[right]) == [score]


def test_the_last_number_may_be_the_answer() -> None:
    match = ExactMatch(where="last_number")
    texts = ["so it is 18 dollars.", "<answer>18 dollars</answer>", "17"]
    assert match([""] * 3, texts, answer=["#### 18"] * 3) == [1, 1, 0]


def test_whole_numbers() -> None:
    texts = ["<answer>7</answer>", "<answer>7.0</answer>", "<answer>\u0667</answer>", "7"]
    assert WholeNumber()([""] * 4, texts) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "right", "score"),
    [
        ("<answer>yes</answer>", "yes", 1.0),
        ("\\boxed{B}", "B", 1.0),
        ("<answer>no</answer>", "yes", 0.0),
        ("it is 18", "18", 1.0),
    ],
)
def test_an_answer_that_is_no_number_is_compared_as_text(
    completion: str, right: str, score: float
) -> None:
    assert ExactMatch(where="last_number")([""], [completion], answer=[right]) == [score]
