"""The random generators of a rank as tensors: torch on the host and on the GPU, Python, NumPy."""

import random

import numpy as np
import torch
from torch import Tensor

GENERATORS = ("torch", "cuda", "python", "python_gauss", "numpy", "numpy_rest")


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every generator, by its name of GENERATORS; `cuda` is there on a GPU only."""
    _, words, gauss = random.getstate()
    _, numpy_words, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_words.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Put every generator back as it was when `rng_state` was called."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate((3, tuple(state["python"].tolist()), *(state["python_gauss"].tolist() or [None])))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))


def derive_rng(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed every generator for what comes after `step` on this rank: at the start of a run, and where the ranks are not those that saved."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3).tolist()
    torch.default_generator.manual_seed(words[0])
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[2])
