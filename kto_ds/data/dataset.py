"""The dataset artefact: tokenized examples and their mismatched partners, as flat arrays that are mapped, not loaded. assemble.py writes them.

Legend: E examples, P distinct prompts. Example i is (prompt_of[i], completion i, desirable[i]). A *pair* is what the model scores:
pair i < E is the matched pair of example i, pair E + i its mismatched one, the same completion after `mismatched_prompt_of[i]`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TokenizedSplit:
    prompt_tokens: np.ndarray  # [all prompt tokens] int32
    prompt_offsets: np.ndarray  # [P + 1] int64
    completion_tokens: np.ndarray  # [all completion tokens] int32
    completion_offsets: np.ndarray  # [E + 1] int64
    prompt_of: np.ndarray  # [E] int64
    mismatched_prompt_of: np.ndarray  # [E] int64
    matched_lengths: np.ndarray  # [E] int64, completion tokens that fit after the own prompt
    mismatched_lengths: np.ndarray  # [E] int64, completion tokens that fit after the mismatched prompt
    desirable: np.ndarray  # [E] bool
    kl_group_of: np.ndarray  # [E] int64
    pair_keys: np.ndarray  # [2E, 2] uint64, the name of every pair under which a reference log-prob is stored; see keys.py
    file_of: np.ndarray  # [E] int32, index into `files`
    row_of: np.ndarray  # [E] int64, line or row number in that file
    files: tuple[str, ...]  # what stands before a row's number in its name: "rows.jsonl:" or "rows.parquet:row "

    @property
    def num_examples(self) -> int:
        return len(self.prompt_of)

    @cached_property
    def pair_prompts(self) -> np.ndarray:
        """Prompt index of every pair, [2E]."""
        return np.concatenate([self.prompt_of, self.mismatched_prompt_of])

    @cached_property
    def pair_lengths(self) -> np.ndarray:
        """Completion tokens of every pair, [2E]."""
        return np.concatenate([self.matched_lengths, self.mismatched_lengths])

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        return np.diff(self.prompt_offsets)  # [P]

    @property
    def longest_pair_tokens(self) -> int:
        return int((self.prompt_lengths[self.pair_prompts] + self.pair_lengths).max())

    def mismatched_pairs(self, examples: np.ndarray) -> np.ndarray:
        return examples + self.num_examples

    def prompt(self, index: int) -> np.ndarray:
        return self.prompt_tokens[self.prompt_offsets[index] : self.prompt_offsets[index + 1]]

    def completion(self, pair: int) -> np.ndarray:
        start = self.completion_offsets[pair % self.num_examples]
        return self.completion_tokens[start : start + self.pair_lengths[pair]]

    def row_name(self, example: int) -> str:
        return f"{self.files[self.file_of[example]]}{self.row_of[example]}"

    @classmethod
    def load(cls, folder: Path) -> "TokenizedSplit":
        """Map the arrays of a saved split; nothing but the list of files is copied into memory."""
        # As plain views: slicing np.memmap itself costs three times as much.
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in ARRAYS}
        return cls(**arrays, files=tuple(json.loads((folder / FILES).read_text(encoding="utf-8"))))


FILES = "files.json"
REPORT = "data_report.json"  # of all splits, beside their folders
ARRAYS = tuple(name for name in TokenizedSplit.__annotations__ if name != "files")
