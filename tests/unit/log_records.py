"""Records as metrics.jsonl has them, with a few metrics each."""


def train_record(step: int, **more: float) -> dict:
    return {"split": "train", "step": step, "epoch": step / 50, "loss": 0.4831, "kl": 0.12, "rewards/margins": 0.31, "seconds": 1.5, **more}


def eval_record(step: int) -> dict:
    return {"split": "eval", "step": step, "loss": 0.5, "kl": 0.1, "rewards/auc": 0.75}
