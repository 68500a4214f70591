"""Sums of two two-digit numbers: a task that a tiny model can learn and that a program can check.

A prompt is "47+85=", its right answer is "231": the sum in three digits, last digit first, so that a carry is known before it is needed.
"""

import random
from itertools import combinations_with_replacement
from typing import NamedTuple

ALPHABET = "0123456789+="
ANSWER_LENGTH = 3
NUM_TEST_PAIRS = 300
NUM_VALIDATION_PAIRS = 250
WRONG_OFFSETS = (-10, 10)  # a carry forgotten, a carry too many


class PromptSplit(NamedTuple):
    """Prompts that share no pair of numbers, in either order; each list is shuffled."""

    training: list[str]
    validation: list[str]
    test: list[str]


def make_prompt(left: int, right: int) -> str:
    return f"{left:02d}+{right:02d}="


def write_answer(total: int) -> str:
    return f"{total:0{ANSWER_LENGTH}d}"[::-1]


def sum_of(prompt: str) -> int:
    left, right = prompt.removesuffix("=").split("+")
    return int(left) + int(right)


def right_answer(prompt: str) -> str:
    return write_answer(sum_of(prompt))


def wrong_answer(prompt: str, rng: random.Random) -> str:
    """Return what a careless pupil would answer, who gets the tens wrong by one."""
    total = sum_of(prompt)
    return write_answer(rng.choice([total + offset for offset in WRONG_OFFSETS if total + offset >= 0]))


def is_right(prompt: str, completion: str) -> bool:
    return completion == right_answer(prompt)


def split_prompts(seed: int) -> PromptSplit:
    """Divide all 10,000 prompts; "47+85=" and "85+47=" always stay together, or a held-out sum would be known by its twin."""
    rng = random.Random(seed)
    pairs = list(combinations_with_replacement(range(100), 2))
    rng.shuffle(pairs)
    first_training = NUM_TEST_PAIRS + NUM_VALIDATION_PAIRS

    def prompts_of(chosen: list[tuple[int, int]]) -> list[str]:
        prompts = sorted({make_prompt(*numbers) for left, right in chosen for numbers in ((left, right), (right, left))})
        rng.shuffle(prompts)
        return prompts

    return PromptSplit(
        test=prompts_of(pairs[:NUM_TEST_PAIRS]),
        validation=prompts_of(pairs[NUM_TEST_PAIRS:first_training]),
        training=prompts_of(pairs[first_training:]),
    )
