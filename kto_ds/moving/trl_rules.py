"""What an option of TRL's becomes: rules that the table of trl_options.py is made of. Each takes all values and says what one of them sets, and why."""

import math
from collections.abc import Callable
from typing import NamedTuple

Values = dict[str, object]


class Given(NamedTuple):
    """All that a rule may look at."""

    value: object  # of the option
    values: Values  # of all options, TRL's defaults where they are not given
    is_given: bool
    num_gpus: int
    sharding: tuple[str, str]  # deepspeed.config of kto_ds, and where it is from


class Verdict(NamedTuple):
    settings: Values  # by dotted key of ours
    why: str = ""
    has_counterpart: bool = True  # or it changes nothing that counts


Rule = Callable[[Given], Verdict]


# simple rules


def same(key: str, why: str = "") -> Rule:
    """The option has a key of ours with the same meaning."""
    return lambda given: Verdict({key: given.value}, why)


def always(value: object, why: str) -> Rule:
    """kto_ds is as if the option had this value; for another one `why` is the reason that there is no counterpart."""
    return lambda given: Verdict({}, why, has_counterpart=given.value == value)


def without(why: str, neutral: object = None) -> Rule:
    """There is no counterpart, for this reason; the neutral value, None and False switch off what there is no counterpart of."""
    return lambda given: Verdict({}, why, has_counterpart=given.value is None or given.value is False or given.value == neutral)


def idle(why: str) -> Rule:
    """Whatever its value, what is learned does not depend on it."""
    return lambda given: Verdict({}, why)


def part_of(other: str) -> Rule:
    """The rule of another option takes it in, where that one is not off."""
    return lambda given: Verdict({}, f"see --{other}" if given.values[other] is not False else f"has no effect without --{other}")


def replaced(key: str, values: Values, otherwise: str) -> Rule:
    """The option is a key of ours whose values have other names; one that is not in `values` has no counterpart."""

    def rule(given: Given) -> Verdict:
        return Verdict({key: values[given.value]}) if given.value in values else Verdict({}, otherwise, has_counterpart=False)

    return rule


# numbers of steps


def steps(key: str, why: str = "") -> Rule:
    """A number of steps, or below 1 a share of those of the run, which must be known then."""

    def rule(given: Given) -> Verdict:
        value, max_steps = given.value, _max_steps(given.values)
        if value is None or value >= 1:
            return Verdict({key: value if value is None else int(value)}, why)
        if max_steps:
            return Verdict({key: max(1, math.ceil(value * max_steps))}, f"{value:g} of {max_steps} steps")
        return Verdict({}, f"a share of the steps, whose number only the data tells: set {key} once kto-ds plan has told it", has_counterpart=False)

    return rule


def _max_steps(values: Values) -> int | None:
    return values["max_steps"] if isinstance(values["max_steps"], int) and values["max_steps"] > 0 else None


def warmup(given: Given) -> Verdict:
    value, max_steps = given.value, _max_steps(given.values)
    if value < 1:
        ratio = value or given.values["warmup_ratio"] or 0.0  # the latter an earlier release had instead
        return Verdict({"optim.warmup_ratio": ratio}, "below 1 it is a share of the steps" if value else "")
    if max_steps:
        # The shortest share that is so many steps when it is rounded up, as train rounds it.
        shares = (round(value / max_steps, digits) for digits in range(1, 17))
        ratio = next((share for share in shares if math.ceil(share * max_steps) == value and share <= 1), min(1.0, value / max_steps))
        return Verdict({"optim.warmup_ratio": ratio}, f"{value} of {max_steps} steps")
    why = f"a share of the steps here, whose number only the data tells: set optim.warmup_ratio to {value} / steps once kto-ds plan has told them; until then 0.1"
    return Verdict({"optim.warmup_ratio": 0.1}, why, has_counterpart=False)


def warmup_ratio(given: Given) -> Verdict:
    if given.values["warmup_steps"]:
        return Verdict({}, "--warmup_steps goes before it")
    return Verdict({} if given.value is None else {"optim.warmup_ratio": given.value}, "a share of the steps")


def eval_steps(given: Given) -> Verdict:
    values = given.values
    strategy = values["eval_strategy"]
    if strategy == "steps":
        value = given.value if given.value is not None else values["logging_steps"]
        return steps("eval.eval_steps", "" if given.value is not None else "--logging_steps, as none is given")(given._replace(value=value))
    return Verdict({}, "counts with --eval_strategy steps only")


def eval_strategy(given: Given) -> Verdict:
    if given.value == "no":
        return Verdict({}, "without data.eval there is no evaluation")
    return Verdict({}, "the split is evaluated at eval.eval_steps, and at the end" if given.value == "steps" else "evaluated at the end: for each epoch set eval.eval_steps to its steps",
                   has_counterpart=given.value == "steps")  # fmt: skip


def is_share(size: float | None) -> bool:
    """Whether a test_split_size is a share of the rows; from 1 on it is a number of them."""
    return size is not None and size < 1


def evaluated_split(values: Values) -> str | None:
    """Return the split of ours that TRL's evaluations are of; None where there are none."""
    if values["eval_strategy"] == "no":
        return None
    if values["datasets"]:
        return "eval/held_out" if is_share(values["test_split_size"]) else None
    return "eval"


def save_steps(given: Given) -> Verdict:
    return steps("checkpoint.save_steps")(given) if given.values["save_strategy"] == "steps" else Verdict({}, "counts with --save_strategy steps only")


def save_total_limit(given: Given) -> Verdict:
    if given.value is None:
        return Verdict({}, "TRL keeps all; the newest 3 are kept here, as they hold masters and moments: raise checkpoint.save_total_limit", has_counterpart=False)
    return Verdict({"checkpoint.save_total_limit": max(2, given.value)}, "at least 2, as the newest may turn out damaged" if given.value < 2 else "")


def best_metric(given: Given) -> Verdict:
    split = evaluated_split(given.values)
    if split is None or not (given.values["load_best_model_at_end"] or given.values["save_strategy"] == "best"):
        return Verdict({}, "counts with --load_best_model_at_end and evaluation rows only")
    name = str(given.value or "loss").removeprefix("eval_")
    return Verdict({"checkpoint.metric_for_best_model": f"{split}/{name}"}, "then kto-ds export --checkpoint best")


def greater_is_better(given: Given) -> Verdict:
    settings = best_metric(given._replace(value=given.values["metric_for_best_model"])).settings
    return Verdict({"checkpoint.greater_is_better": given.value} if settings and given.value is not None else {}, "" if settings else "counts with --load_best_model_at_end and evaluation rows only")


# batch, length, precision


def batch_size(given: Given) -> Verdict:
    accumulated = given.values["gradient_accumulation_steps"]
    total = given.value * accumulated * given.num_gpus
    why = f"{given.value} a GPU x {accumulated} accumulated x {given.num_gpus} GPU{'s' * (given.num_gpus > 1)}, on any number of GPUs now; how it is split has no part in the result"
    return Verdict({"batch.global_batch_size": max(total, 2)} | ({"data.kl_group_size": max(total, 2)} if total < 4 else {}), why)


def max_length(given: Given) -> Verdict:
    if given.value is None:
        return Verdict({}, "a length is needed here: set data.max_length to what the model and the memory allow; until then 2048", has_counterpart=False)
    budget = {"batch.max_tokens_per_microbatch": given.value, "reference.max_tokens_per_microbatch": max(given.value, 16384)} if given.value > 8192 else {}
    return Verdict({"data.max_length": given.value} | budget, "the end of a completion is cut, and a prompt that leaves no room is left out, as there")


def order(given: Given) -> Verdict:
    """TRL has no choice, as its pairs are neighbours in the file: file order is taken over only where it is asked for."""
    if given.value != "sequential":
        return Verdict({}, "the order is seeded; lengths are balanced over ranks and micro-batches in any case")
    group = max(2, given.values["per_device_train_batch_size"])
    if given.is_given:
        return Verdict({"data.shuffle": False, "data.kl_group_size": group}, "file order, and pairs of neighbours in the batch of a GPU as there")
    why = f"TRL reads in file order, as its mismatched pairs are made there; here the order is seeded. For TRL's own set data.shuffle: false and data.kl_group_size: {group}"
    return Verdict({}, why, has_counterpart=False)


def precision(given: Given) -> Verdict:
    """Weights of float32 under bfloat16 autocast are what model.dtype bfloat16 is: bfloat16 in forward and backward, float32 masters."""
    values = given.values
    is_half = given.value if given.value is not None else not values["fp16"]
    if values["fp16"]:
        return Verdict({"model.dtype": "bfloat16"}, "bfloat16 in place of float16")
    if is_half or values["dtype"] in ("bfloat16", "float16"):
        return Verdict({"model.dtype": "bfloat16"}, "weights in forward and backward; masters, moments and reductions are float32 always")
    return Verdict({"model.dtype": "float32"})


def weights_dtype(given: Given) -> Verdict:
    if given.value == "float16":
        return Verdict({}, "weights of float16 are not offered; see --bf16", has_counterpart=False)
    return Verdict({}, "see --bf16: model.dtype is that of forward and backward, masters are float32 always")


def checkpointing(given: Given) -> Verdict:
    newer = given.values["activation_checkpointing"]
    return Verdict({"model.gradient_checkpointing": given.value if newer is None else newer})


def activation_offloading(given: Given) -> Verdict:
    if given.value and not checkpointing(given._replace(value=given.values["gradient_checkpointing"])).settings["model.gradient_checkpointing"]:
        return Verdict({}, "only inputs of checkpointed layers are offloaded: needs model.gradient_checkpointing", has_counterpart=False)
    return Verdict({"model.gradient_checkpointing_offload": given.value}, "inputs of checkpointed layers wait in host memory" if given.value else "")


def weight_decay(given: Given) -> Verdict:
    return Verdict({"optim.weight_decay": given.value}, "on all weights; TRL leaves out biases and norms" if given.value else "")


def optimizer(given: Given) -> Verdict:
    is_adamw = str(given.value).startswith("adamw_torch") or given.value in ("adamw_hf", "adamw_apex_fused")
    return Verdict({}, "the optimizer is AdamW with float32 masters and moments" + ("" if is_adamw else "; for less memory see ds_configs/ and model.lora"), has_counterpart=is_adamw)
