"""What the data report says about a split: counts, lengths, and everything that a user should look at before training."""

import numpy as np

from kto_ds.data.assemble import Rows, SplitIndex
from kto_ds.data.balance import recommended_weights
from kto_ds.data.keys import distinct

PERCENTILES = (50, 90, 99, 100)


def split_report(rows: Rows, split: SplitIndex, train_prompt_keys: np.ndarray | None) -> dict:
    """Return the counts of a split; `rows` are its rows once each, `split` its examples with sources repeated by their weights.

    `train_prompt_keys` are those of the training rows when the split is for evaluation.
    """
    arrays = split.arrays
    prompts, completions = split.rows.prompt_lengths.astype(np.int64), arrays["matched_lengths"]
    num_desirable = int(arrays["desirable"].sum())
    num_undesirable = len(arrays["desirable"]) - num_desirable
    desirable_weight, undesirable_weight = recommended_weights(num_desirable, num_undesirable, "auto", "auto")
    group_sizes = np.bincount(arrays["kl_group_of"])
    duplicates, contradictions = _repeats(rows)
    return {
        "examples": len(completions),
        "desirable": num_desirable,
        "undesirable": num_undesirable,
        "recommended_weights": {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight},
        "distinct_prompts": len(split.prompt_rows),
        "kl_groups": len(group_sizes),
        "kl_group_examples": {"smallest": int(group_sizes.min()), "mean": round(float(group_sizes.mean()), 2), "largest": int(group_sizes.max())},
        "tokens": int((prompts + completions).sum()),
        "prompt_tokens": _lengths(prompts),
        "completion_tokens": _lengths(completions),
        "example_tokens": _lengths(prompts + completions),
        "longest_tokens": split.longest_tokens,
        "truncated_prompts": int((split.rows.prompt_lengths < split.rows.full_prompt_lengths).sum()),
        "truncated_completions": int((completions < split.rows.full_completion_lengths).sum()),
        "boundary_merges": int(rows.boundary_merged.sum()),
        "special_token_text": int(rows.has_special_text.sum()),
        "control_characters": int(rows.has_control_characters.sum()),
        "duplicates": duplicates,
        "contradictions": contradictions,
        **({} if train_prompt_keys is None else {"examples_with_training_prompts": int(_contained(rows.prompt_keys, train_prompt_keys).sum())}),
    }


def source_reports(rows: Rows, split: SplitIndex, source_of_file: np.ndarray, num_sources: int) -> list[dict]:
    """Return, for each source, what its rows came to."""
    source_of_row, source_of_example = source_of_file[rows.file_of], source_of_file[split.rows.file_of]
    prompts, completions = split.rows.prompt_lengths, split.arrays["matched_lengths"]
    reports = []
    for source in range(num_sources):
        mine = source_of_example == source
        counts = {"usable_examples": int((source_of_row == source).sum()), "examples": int(mine.sum()), "desirable": int(split.rows.desirable[mine].sum())}
        means = {"mean_prompt_tokens": prompts[mine], "mean_completion_tokens": completions[mine]}
        means = {name: round(float(values.mean()), 1) for name, values in means.items() if len(values)}
        reports.append({**counts, "undesirable": counts["examples"] - counts["desirable"], **means})
    return reports


def _lengths(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    return {"mean": round(float(values.mean()), 1), **{f"p{percent}" if percent < 100 else "max": int(value) for percent, value in zip(PERCENTILES, found)}}


def _repeats(rows: Rows) -> tuple[int, int]:
    """Return (rows that repeat an earlier one with the same label, rows whose prompt and completion occur with the other label too)."""
    prompt_of, _ = distinct(rows.prompt_keys)
    completion_of, first = distinct(rows.completion_keys)
    _, pair_of = np.unique(prompt_of * len(first) + completion_of, return_inverse=True)
    counts = [np.bincount(pair_of, weights=rows.desirable == label, minlength=pair_of.max() + 1) for label in (True, False)]
    duplicates = sum(np.maximum(count - 1, 0).sum() for count in counts)
    is_contradicted = (counts[0] > 0) & (counts[1] > 0)
    return int(duplicates), int(is_contradicted[pair_of].sum())


def _contained(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Tell which keys are among `others`, [N] bool."""
    of, _ = distinct(np.concatenate([others, keys]))
    return np.isin(of[len(others) :], of[: len(others)])
