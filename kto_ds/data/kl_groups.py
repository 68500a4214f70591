"""Mismatched pairs for KTO's reference point, fixed once for the dataset.

A KL group is `kl_group_size` distinct prompts with all their completions. Inside a group the completions of each prompt are donated to
the next prompt, the last one's to the first. So no pair matches itself, no donor shares the prompt, and a step that takes whole groups
sees the same completions matched and mismatched (what the KTO authors ask for: huggingface/trl issues 1402 and 2153).
"""

import numpy as np

from kto_ds.errors import UserError

# A slice is some or all of one prompt's examples, in order: (prompt, [examples]).
Slice = tuple[int, list[int]]
Group = dict[int, list[int]]  # prompt -> examples, in donation order


def assign_kl_groups(
    prompt_of: np.ndarray,  # [E]
    desirable: np.ndarray,  # [E] bool
    *,
    kl_group_size: int,
    max_examples: int,
    shuffle: bool,
    seed: int,
    where: str = "data.train",
) -> tuple[np.ndarray, np.ndarray]:
    """Return (kl_group_of [E], mismatched_prompt_of [E]); no group holds more than `max_examples`, none fewer than two prompts."""
    slices = _slices(prompt_of, max_per_slice=max(1, max_examples // kl_group_size))
    if len({prompt for prompt, _ in slices}) < 2:
        raise UserError(
            f"the reference point needs at least two distinct prompts, found {len(slices and {slices[0][0]})} in {len(prompt_of)} examples",
            where=where,
            remedy="add rows with other prompts",
        )
    if shuffle:
        slices = _spread_labels(slices, desirable, np.random.default_rng(seed))
    groups = _settle_leftovers(_fill_groups(slices, kl_group_size), kl_group_size, max_examples)

    kl_group_of = np.empty(len(prompt_of), dtype=np.int64)
    mismatched_prompt_of = np.empty(len(prompt_of), dtype=np.int64)
    for number, group in enumerate(groups):
        prompts = list(group)
        for prompt, receiver in zip(prompts, prompts[1:] + prompts[:1]):
            kl_group_of[group[prompt]] = number
            mismatched_prompt_of[group[prompt]] = receiver
    return kl_group_of, mismatched_prompt_of


def _slices(prompt_of: np.ndarray, max_per_slice: int) -> list[Slice]:
    """Cut each prompt's examples into slices; prompts stand in the order of their first example."""
    examples_of: dict[int, list[int]] = {}
    for example, prompt in enumerate(prompt_of.tolist()):
        examples_of.setdefault(prompt, []).append(example)
    return [
        (prompt, examples[start : start + max_per_slice])
        for prompt, examples in examples_of.items()
        for start in range(0, len(examples), max_per_slice)
    ]


def _spread_labels(slices: list[Slice], desirable: np.ndarray, rng: np.random.Generator) -> list[Slice]:
    """Shuffle so that every stretch of the result has about the label mix of the whole.

    Slices of one mix of labels form a stratum; its members are dealt out at equal distances over the sequence.
    """
    mixes = [float(np.mean(desirable[examples])) for _, examples in slices]
    places = np.empty(len(slices))
    for mix in sorted(set(mixes)):
        members = rng.permutation([index for index, found in enumerate(mixes) if found == mix])
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return [slices[index] for index in np.argsort(places, kind="stable")]


def _fill_groups(slices: list[Slice], kl_group_size: int) -> list[Group]:
    """Put each slice into the first open group without its prompt; a group closes with `kl_group_size` prompts. Unfilled ones come last."""
    closed: list[Group] = []
    open_groups: list[Group] = []
    for prompt, examples in slices:
        group = next((candidate for candidate in open_groups if prompt not in candidate), None)
        if group is None:
            group = {}
            open_groups.append(group)
        group[prompt] = list(examples)
        if len(group) == kl_group_size:
            closed.append(group)
            open_groups.remove(group)
    return closed + open_groups


def _settle_leftovers(groups: list[Group], kl_group_size: int, max_examples: int) -> list[Group]:
    """Join what is left over to the last whole group that has room; without room, two prompts stand alone, one is dealt out with the last group."""
    num_whole = sum(len(group) == kl_group_size for group in groups)
    settled, leftovers = groups[:num_whole], groups[num_whole:]
    for leftover in leftovers:
        room = next((place for place in reversed(range(len(settled))) if _size(settled[place]) + _size(leftover) <= max_examples), None)
        if room is not None:
            settled[room] = _union(settled[room], leftover)
        elif len(leftover) >= 2 or not settled:
            settled.append(leftover)
        else:
            settled[-1:] = _deal_in_two(_union(settled[-1], leftover))
    if any(len(group) < 2 or _size(group) > max_examples for group in settled):
        raise UserError(
            f"the examples cannot be grouped into steps of at most {max_examples} with two distinct prompts each: too many share one prompt, or the batch is too small",
            where="batch.global_batch_size",
            remedy="raise batch.global_batch_size, lower data.kl_group_size, or add rows with other prompts",
        )
    return settled


def _union(first: Group, second: Group) -> Group:
    return {prompt: first.get(prompt, []) + second.get(prompt, []) for prompt in [*first, *(p for p in second if p not in first)]}


def _deal_in_two(group: Group) -> list[Group]:
    """Return two groups of about equal size; every prompt with two examples or more is in both."""
    halves: list[Group] = [{}, {}]
    for prompt, examples in group.items():
        halves.sort(key=_size)  # the smaller half gets the larger part
        middle = (len(examples) + 1) // 2
        for half, part in zip(halves, (examples[:middle], examples[middle:])):
            if part:
                half[prompt] = part
    return halves


def _size(group: Group) -> int:
    return sum(len(examples) for examples in group.values())
