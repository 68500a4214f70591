"""Mismatched pairs for KTO's reference point, fixed once for the dataset.

A KL group is `kl_group_size` distinct prompts with all their completions. Inside a group the completions of each prompt are donated to
the next prompt, the last one's to the first. So no pair matches itself, no donor shares the prompt, and a step that takes whole groups
sees the same completions matched and mismatched (what the KTO authors ask for: huggingface/trl issues 1402 and 2153).

Legend: E examples, S slices, a slice being some or all of one prompt's examples, in order. Whole groups stay index arrays; only the few
that take up leftovers are spelled out as `Group`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kto_ds.errors import UserError

Group = dict[int, list[int]]  # prompt -> examples, in donation order


class Slices(NamedTuple):
    """Slices one after another, prompts in the order of their first example."""

    examples: np.ndarray  # [E]
    offsets: np.ndarray  # [S + 1], into `examples`
    prompts: np.ndarray  # [S]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)  # [S]


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
    if (slices.prompts == slices.prompts[:1]).all():
        raise UserError(
            f"the reference point needs at least two distinct prompts, found {len(slices.prompts[:1])} in {len(prompt_of)} examples",
            where=where,
            remedy="add rows with other prompts",
        )
    sequence = _spread_labels(slices, desirable, np.random.default_rng(seed)) if shuffle else np.arange(len(slices.prompts))
    group_of, num_whole = _fill_groups(slices.prompts[sequence], kl_group_size)
    members = sequence[np.argsort(group_of, kind="stable")]  # slices, group by group, in donation order
    group_offsets = np.concatenate([[0], np.cumsum(np.bincount(group_of))])  # into `members`

    def spelled_out(number: int) -> Group:
        return {
            int(slices.prompts[index]): slices.examples[slices.offsets[index] : slices.offsets[index + 1]].tolist()
            for index in members[group_offsets[number] : group_offsets[number + 1]]
        }

    sizes = np.add.reduceat(slices.lengths[members], group_offsets[:-1])
    leftovers = (spelled_out(number) for number in range(num_whole, len(sizes)))
    settled = _settle_leftovers(sizes[:num_whole].tolist(), leftovers, spelled_out, max_examples)

    kl_group_of, mismatched_prompt_of = _donate(slices, members, group_offsets)
    for number, group in settled.items():
        prompts = list(group)
        for prompt, receiver in zip(prompts, prompts[1:] + prompts[:1]):
            kl_group_of[group[prompt]] = number
            mismatched_prompt_of[group[prompt]] = receiver
    return kl_group_of, mismatched_prompt_of


def _slices(prompt_of: np.ndarray, max_per_slice: int) -> Slices:
    """Cut each prompt's examples into slices of `max_per_slice`, the last one smaller."""
    by_prompt = np.argsort(prompt_of, kind="stable")
    starts = np.flatnonzero(np.diff(prompt_of[by_prompt], prepend=-1))  # [prompts], into `by_prompt`
    order = np.argsort(by_prompt[starts])
    copies = np.diff(starts, append=len(prompt_of))[order]
    slices_of = -(-copies // max_per_slice)
    starts, ends = np.repeat(starts[order], slices_of), np.repeat(starts[order] + copies, slices_of)  # [S], of each slice's prompt
    starts += max_per_slice * _counted(slices_of)
    lengths = np.minimum(ends - starts, max_per_slice)
    return Slices(
        examples=by_prompt[np.repeat(starts, lengths) + _counted(lengths)],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompts=prompt_of[by_prompt[starts]],
    )


def _counted(lengths: np.ndarray) -> np.ndarray:
    """Count from 0 inside each of the stretches: 2, 3 gives 0, 1, 0, 1, 2."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _spread_labels(slices: Slices, desirable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the slices [S] in an order of which every stretch has about the label mix of the whole.

    Slices of one mix of labels form a stratum; its members are dealt out at equal distances over the sequence.
    """
    mixes = np.add.reduceat(desirable[slices.examples].astype(np.int64), slices.offsets[:-1]) / slices.lengths
    by_mix = np.argsort(mixes, kind="stable")
    places = np.empty(len(mixes))
    for stratum in np.split(by_mix, np.flatnonzero(np.diff(mixes[by_mix])) + 1):
        members = rng.permutation(stratum)
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(places, kind="stable")


def _fill_groups(prompts: np.ndarray, kl_group_size: int) -> tuple[np.ndarray, int]:
    """Put each slice into the first open group without its prompt; a group closes with `kl_group_size` prompts.

    `prompts` [S] are those of the slices in sequence. Return (group of each slice [S], number of whole groups); unfilled groups come last.
    """
    # A prompt is in every open group before its last one. So it never looks back, and each open group has all the prompts of those after
    # it: they close in the order they were opened, and the open ones are those from `num_whole` on.
    group_of: list[int] = []
    num_prompts: list[int] = []  # of each group
    num_whole = 0
    after_last = [0] * (int(prompts.max()) + 1)
    for prompt in prompts.tolist():
        group = max(after_last[prompt], num_whole)
        if group == len(num_prompts):
            num_prompts.append(0)
        num_prompts[group] += 1
        num_whole += num_prompts[group] == kl_group_size
        group_of.append(group)
        after_last[prompt] = group + 1
    return np.array(group_of), num_whole


def _settle_leftovers(sizes: list[int], leftovers: Iterator[Group], whole_group: Callable[[int], Group], max_examples: int) -> dict[int, Group]:
    """Join what is left over to the last whole group that has room; without room, two prompts stand alone, one is dealt out with the last group.

    `sizes` are the examples of the whole groups. Return the groups that are new or other than before, by number.
    """
    settled: dict[int, Group] = {}
    room = [max_examples - size for size in sizes]
    with_room: dict[int, list[int]] = {}  # size of a leftover -> groups, ascending, among them all with room for it
    for leftover in leftovers:
        size = _size(leftover)
        if size not in with_room:
            with_room[size] = [number for number, free in enumerate(room) if free >= size]
        places = with_room[size]
        while places and room[places[-1]] < size:
            places.pop()
        if places:
            place = places[-1]
            settled[place] = _union(settled.get(place) or whole_group(place), leftover)
            room[place] -= size
            continue
        if len(leftover) >= 2:
            new = {len(room): leftover}
        else:
            last = len(room) - 1
            new = dict(enumerate(_deal_in_two(_union(settled.get(last) or whole_group(last), leftover)), start=last))
        settled |= new
        room[min(new) :] = [max_examples - _size(group) for group in new.values()]
        for places in with_room.values():
            places += [number for number in new if number not in places[-1:]]
        # After a lone prompt only the same one is left over (see _fill_groups), and joins its like in vain.
        if any(group.keys() == leftover.keys() for group in new.values() if len(group) < 2):
            break
    if min(room) < 0 or any(len(group) < 2 for group in settled.values()):
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


def _donate(slices: Slices, members: np.ndarray, group_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (group [E], receiving prompt [E]) when every slice in `members` [S] goes to the next one of its group."""
    num_members = np.diff(group_offsets)
    receivers = np.arange(1, len(members) + 1)
    receivers[group_offsets[1:] - 1] = group_offsets[:-1]
    group_of, received_by = np.empty_like(members), np.empty_like(slices.prompts)  # [S]
    group_of[members] = np.repeat(np.arange(len(num_members)), num_members)
    received_by[members] = slices.prompts[members[receivers]]
    kl_group_of, mismatched_prompt_of = np.empty_like(slices.examples), np.empty_like(slices.examples)  # [E]
    kl_group_of[slices.examples] = np.repeat(group_of, slices.lengths)
    mismatched_prompt_of[slices.examples] = np.repeat(received_by, slices.lengths)
    return kl_group_of, mismatched_prompt_of
