"""The trainable policy on all ranks. The only caller of deepspeed.initialize."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor
from transformers import get_scheduler

from kto_ds.artifacts import digest_of
from kto_ds.config import OptimConfig
from kto_ds.data.batch import Batch
from kto_ds.errors import UserError
from kto_ds.model.attention import Memory
from kto_ds.model.policy import Policy
from kto_ds.model.routers import RouterLoad
from kto_ds.runtime.checkpoint_files import CheckpointFiles
from kto_ds.runtime.collectives import Group, sum_across_group
from kto_ds.runtime.deepspeed_config import gather_by_layer, zero_stage
from kto_ds.runtime.unpickling import weights_only
from kto_ds.runtime.watch import beat

STATE = "state"  # DeepSpeed's tag: the folder of its files below that of a checkpoint
# Of a parameter group, besides its learning rate, which is the scheduler's.
HYPERPARAMETERS = ("betas", "eps", "weight_decay")
DIGEST_NUMEL = 1 << 26  # elements that are copied to the host at a time


class Engine:
    """What the training loop needs of DeepSpeed: score a batch, accumulate a gradient, take a step."""

    def __init__(self, policy: Policy, deepspeed_config: dict, optim: OptimConfig, num_steps: int, group: Group | None = None):
        """`group`: the ranks that share each row with this one."""
        self.stage = zero_stage(deepspeed_config)
        self.zero_section = deepspeed_config.get("zero_optimization", {})
        self.deepspeed, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=[parameter for parameter in policy.parameters() if parameter.requires_grad],
            config=_prepared(policy, deepspeed_config),
            lr_scheduler=_scheduler(optim, num_steps),
        )
        self.device = self.deepspeed.device
        self.group = group
        self._files = self.deepspeed.checkpoint_engine = CheckpointFiles()
        self.deepspeed.module_state_dict = partial(_trained_state, self.deepspeed.module)
        # DeepSpeed would put executable copies of its conversion scripts beside every checkpoint; kto-ds export replaces them.
        self.deepspeed._copy_recovery_script = lambda save_path: None
        self._hyperparameters = [{name: group[name] for name in HYPERPARAMETERS} for group in self.deepspeed.basic_optimizer.param_groups]
        self._base_lrs = list(self.deepspeed.lr_scheduler.base_lrs)
        self._share_moments()

    def __call__(self, batch: Batch, with_load: bool = False, memory: Memory | None = None) -> Tensor | tuple[Tensor, RouterLoad]:
        """Return what Policy.forward does: the sequence log-probs [S] of a micro-batch. Every rank must call this equally often.

        With a memory, as generation has it, ranks that share rows otherwise do not: each has sequences of its own.
        """
        beat()
        if memory is not None:
            return self.deepspeed(batch, memory=memory)
        logps, load = self.deepspeed(batch, with_load=True) if with_load else (self.deepspeed(batch), None)
        if self.group is not None:
            logps = sum_across_group(logps, self.group)  # a load is of this rank's own tokens
        return (logps, load) if with_load else logps

    def warm_up(self, filler: Batch, *, balances_experts: bool = False) -> None:
        """Run one forward and backward whose gradient is zero; with `balances_experts`, one that goes through the routers' probabilities too, as a step's does.

        ZeRO-3 records the order of parameters in the first forward; a no-grad pass there would leave a trace without the backward,
        which every later step would invalidate, and lose prefetching for good.
        """
        if balances_experts:
            logps, load = self(filler, with_load=True)
            self.backward(logps.sum() + load.probabilities.sum(), is_last=False)
        else:
            self.backward(self(filler).sum(), is_last=False)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of this rank's `loss`, averaged over the ranks; `is_last` marks the step's last micro-batch."""
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss)
        if not is_last:
            self.deepspeed.step()

    def step(self) -> float:
        """Update the weights and the learning rate; return the gradient norm before clipping. Not finite: the gradient is dropped and nothing changes."""
        norm = self._plain_grad_norm() if self.stage == 0 else None
        if norm is not None and not torch.isfinite(norm):
            return self.discard_gradients()
        self._share_hyperparameters()
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return float(norm) if self.deepspeed.was_step_applied() else math.nan

    def discard_gradients(self) -> float:
        """Drop what the step's backward passes have added up, as if they had not been, and return NaN. All ranks call this in place of `step`.

        ZeRO keeps gradients in buffers of its own, on the device or the host. DeepSpeed clears them where it finds an overflow, and leaves
        weights, moments and learning rate alone then; so it is told that it found one.
        """
        optimizer = self.deepspeed.optimizer
        if self.stage == 0:
            self.deepspeed.zero_grad()
        elif isinstance(optimizer, BF16_Optimizer):  # stage 1 in bfloat16
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            norm_method, invalid = ("_get_norm_groups", [math.inf]) if self.stage == 3 else ("scaled_global_norm", math.inf)
            with _replaced(optimizer, norm_method, lambda: invalid):
                self.deepspeed.step()
            assert not self.deepspeed.was_step_applied(), "DeepSpeed has applied a gradient that was to be dropped"
        return math.nan

    def _plain_grad_norm(self) -> Tensor:
        # Stage 0 reports no norm unless it clips, and in float32 would apply a NaN.
        grads = [parameter.grad.float() for parameter in self.deepspeed.module.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @property
    def learning_rate(self) -> float:
        return self.deepspeed.get_lr()[0]

    @property
    def state_bytes(self) -> int:
        """About the bytes that all ranks together save of what is trained; see saved_bytes."""
        parameters = [parameter for parameter in self.deepspeed.module.parameters() if parameter.requires_grad]
        return saved_bytes(sum(map(_numel, parameters)), stage=self.stage, weight_bytes=parameters[0].element_size())

    def state_digest(self) -> str:
        """Digest of all that this rank holds of a run, or has put back by `load`: weights, master weights, moments, learning rate, steps done."""
        # A partitioned parameter has its part beside it. Which order the optimizer keeps its states in means nothing.
        tensors = [vars(parameter).get("ds_tensor", parameter) for parameter in self.deepspeed.module.parameters()]
        for master, state in self.deepspeed.basic_optimizer.state.items():
            tensors += [master, *(value for value in state.values() if torch.is_tensor(value))]
        return digest_of(repr((self.deepspeed.get_lr(), self.deepspeed.global_steps)), *sorted(map(_tensor_digest, tensors)))

    def save(self, folder: Path) -> tuple[list[Path], str]:
        """Write the state below `folder`, each rank its part; return (what this rank wrote, what went wrong here or an empty text)."""
        self._files.begin()
        self.deepspeed.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
        return self._files.written, self._files.problem

    def load(self, folder: Path, *, is_universal: bool) -> None:
        """Put back what `save` wrote, or what world_size.py made of it; the hyper-parameters stay those that the engine was made with."""
        self.deepspeed._config.load_universal_checkpoint = is_universal
        with weights_only():
            loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=STATE, custom_load_fn=_load_trained)
        self.deepspeed._config.load_universal_checkpoint = False
        assert loaded is not None, f"{folder} did not load"
        if is_universal:
            _separate_steps(self.deepspeed.basic_optimizer)
        self._set_hyperparameters()
        self._share_moments()

    def close(self) -> None:
        """Let go of the model and of what is trained: the hooks by which DeepSpeed holds on to both. There is no other call after this one."""
        self.deepspeed.destroy()

    # With offload_optimizer.ratio below 1, what stays on the device has an optimizer of its own. DeepSpeed never tells it of a new learning rate, and saves nothing of it.

    @property
    def _resident_optimizer(self) -> torch.optim.Optimizer | None:
        return vars(self.deepspeed.optimizer).get("backup_optimizer")

    def _share_moments(self) -> None:
        """Have both optimizers keep their moments in one place, that of the one whose state is saved and loaded."""
        if self._resident_optimizer:
            self._resident_optimizer.state = self.deepspeed.basic_optimizer.state

    def _share_hyperparameters(self) -> None:
        if self._resident_optimizer:
            for own, group in zip(self._resident_optimizer.param_groups, self.deepspeed.basic_optimizer.param_groups):
                own.update({name: group[name] for name in ("lr", *HYPERPARAMETERS)})

    def _set_hyperparameters(self) -> None:
        """Give every parameter group the hyper-parameters that the engine was made with, and the learning rate that these make of the present step."""
        optimizer, scheduler = self.deepspeed.basic_optimizer, self.deepspeed.lr_scheduler
        scheduler.base_lrs = list(self._base_lrs)
        scheduler._last_lr = [base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(self._base_lrs, scheduler.lr_lambdas)]
        for group, hyperparameters, base_lr, lr in zip(optimizer.param_groups, self._hyperparameters, self._base_lrs, scheduler._last_lr):
            group.update(hyperparameters, lr=lr, initial_lr=base_lr)


def saved_bytes(numel: int, *, stage: int, weight_bytes: int) -> int:
    """Return about the bytes of a checkpoint of `numel` trained elements: weights, where a rank has them whole, float32 master weights, two moments."""
    saves_weights, saves_masters = stage < 3, stage > 0 or weight_bytes < 4
    return numel * (saves_weights * weight_bytes + 4 * saves_masters + 8)


def _tensor_digest(tensor: Tensor) -> str:
    parts = tensor.detach().flatten().split(DIGEST_NUMEL)
    return digest_of(*(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts))


def _frozen_names(module: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that are not trained, a tied one under both of its names."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def _trained_state(module: torch.nn.Module, *, exclude_frozen_parameters: bool) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the module. DeepSpeed's own keeps a frozen parameter under the second of its names, such as a tied head."""
    assert exclude_frozen_parameters
    state = module.state_dict()
    for name in _frozen_names(module) & state.keys():
        del state[name]
    return state


def _load_trained(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    """Put back what _trained_state gave."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    assert not unexpected and set(missing) <= _frozen_names(dst), f"the checkpoint is of another model: {[*missing, *unexpected][:3]}"


def _separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter an Adam step counter of its own: DeepSpeed hands one tensor to all of them, and each would count it on."""
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            # Fused kernels want it on the device of the parameter, where one that is loaded from a file is not.
            state["step"] = state["step"].clone().to(parameter.device)


@contextmanager
def _replaced(target: object, method: str, replacement: Callable) -> Iterator[None]:
    """Give one object another method inside the block."""
    vars(target)[method] = replacement
    try:
        yield
    finally:
        del vars(target)[method]


def shard_for_reading(policy: Policy, deepspeed_config: dict) -> Callable[..., Tensor]:
    """Return a policy that ZeRO-3 has partitioned, as something that scores batches without gradients. Every rank must call it equally often."""
    engine, *_ = deepspeed.initialize(model=policy, config=_prepared(policy, deepspeed_config))
    engine.eval()
    return engine


def _prepared(policy: Policy, deepspeed_config: dict) -> dict:
    """Return the config with the sizes of this model in it; under ZeRO-3 a decoder layer becomes the unit that is gathered, prefetched and released."""
    layers = policy.decoder_layers
    if zero_stage(deepspeed_config) != 3:
        return deepspeed_config
    if policy.router_meter and not {module for layer in layers for module in layer.modules()}.issuperset(policy.router_meter.routers):
        what = f"{type(policy.lm).__name__} has experts outside of the layers that are gathered whole: ranks that route to different ones would wait for each other"
        raise UserError(what, where="deepspeed.config", remedy="use a DeepSpeed config of stage 2, or another release of transformers")
    if not layers:
        return deepspeed_config
    deepspeed.utils.set_z3_leaf_modules(policy, list({type(layer) for layer in layers}))
    layers[0].register_forward_pre_hook(_require_gradient)
    sizes = [sum(map(_numel, layer.parameters())) for layer in layers]
    return gather_by_layer(deepspeed_config, layer_numel=max(sizes))


def _require_gradient(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Ask for the gradient of a layer's hidden state, which frozen embeddings give none: torch would call the hook that releases the layer's weights ahead of its backward."""
    if torch.is_grad_enabled():
        for hidden in inputs[:1]:
            hidden.requires_grad_()


def _numel(parameter: Tensor) -> int:
    # A partitioned parameter has no elements of its own; DeepSpeed notes how many there are.
    return vars(parameter).get("ds_numel", parameter.numel())


def _scheduler(optim: OptimConfig, num_steps: int) -> Callable:
    return partial(get_scheduler, optim.lr_scheduler_type, num_warmup_steps=math.ceil(optim.warmup_ratio * num_steps), num_training_steps=num_steps)
