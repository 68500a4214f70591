"""What would go wrong with a run on these machines, found out within minutes and all at once: `kto-ds doctor`, alone or on all ranks of the job.

First what every rank sees of itself, told over plain TCP, as nothing may hang before it is known what would; then collectives, folders and files; last
a dry run. Nothing of the run's own is touched.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PretrainedConfig

from kto_ds.artifacts import canonical_json, digest_of
from kto_ds.config import ModelConfig, RunConfig
from kto_ds.doctor import environment, machine, network, services, stack, storage, transfers
from kto_ds.doctor.facts import Facts, facts_of
from kto_ds.doctor.findings import Finding, check_settings, in_words, refuse_what_is_wrong, show, worst, wrong_by
from kto_ds.errors import KtoError, UserError
from kto_ds.model.scoring import Serving, choose_serving
from kto_ds.model.sizes import without_weights
from kto_ds.model.support import DTYPES, read_model_config, require_trainable, weight_files
from kto_ds.redaction import redact
from kto_ds.runtime import probes
from kto_ds.runtime.collectives import World, gather_objects, limit_waits, on_main_rank, own_device, start
from kto_ds.runtime.deepspeed_config import check_zero_section, complete_deepspeed_config, offloads_parameters, read_deepspeed_config, zero_stage
from kto_ds.runtime.engine import saved_bytes
from kto_ds.runtime.peers import End
from kto_ds.runtime.retention import folder_bytes, list_checkpoints
from kto_ds.stages.advising import advice_lines
from kto_ds.stages.build import require_served
from kto_ds.stages.rehearsal import Rehearsal, rehearse
from kto_ds.stages.serving import require_same_weights

SIZES = (4 << 10, 1 << 20)  # bytes of the smaller collectives, whose results are compared too
RING_BYTES = 16 << 20
NOT_TRIED = "was not tried: mend what is wrong first"
BLOCKING = {"interfaces", "devices", "model"}  # with any of these wrong a process group would fail, or hang


class Settings(NamedTuple):
    """What the config asks of the machines."""

    model_config: PretrainedConfig
    deepspeed_config: dict  # complete
    serving: Serving
    num_parameters: int
    weights: Path | None  # the folder they lie in; None where they have not been fetched from the hub yet
    largest_shard_bytes: int

    @property
    def offloads_optimizer(self) -> bool:
        return self.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def main(config: RunConfig, quick: bool = False, timeout_seconds: int = 120) -> None:
    """Print a table of all that was looked at. UserError with everything that is wrong, if anything is."""
    findings = [network.check_launch(os.environ)]
    if findings[0].verdict == "wrong":
        _tell(findings)
    device = own_device()
    settings, own = _read_settings(config, device)
    facts, meeting = _meet(config, device, own, seconds=timeout_seconds, findings=findings)
    findings += _compare(config, facts, settings)
    if settings is None or _wrong(findings) & BLOCKING:
        _tell([*findings, Finding("the rest", NOT_TRIED, "warn")], all_have_it=True)

    name = network.INTERFACE_VARIABLES[device.type]
    interface = f"export {name}={facts[0].route}" if facts[0].route not in ("", "lo") else f"set {name} to the interface between the hosts"
    limits = {
        "remedy": f"{interface}, on every host (not one of a container); look for a firewall, and for a rank that was stopped",
        "tell": lambda error: _say([*findings, Finding(error.where, error.what, "wrong", error.remedy)]),
    }
    try:
        with probes.ending_within(timeout_seconds, "process group", **limits):
            world = start(timeout_seconds=timeout_seconds)
        for phase, look in _phases(config, world, facts, settings).items():
            with probes.ending_within(timeout_seconds, phase, **limits):
                findings += look()
    except UserError as error:
        _tell([*findings, Finding(error.where, error.what, "wrong", error.remedy)])
    del meeting  # its store had to stay until the process group had one
    limit_waits(config.train.setup_timeout_seconds)
    findings = on_main_rank(lambda: [*findings, check_settings(advice_lines(config)), services.check_wandb(config.report.wandb, config.output_dir)])  # all go on alike
    if not quick:
        findings = [*findings, Finding("dry run", NOT_TRIED, "warn") if _wrong(findings) else _dry_run(config, settings, world, findings)]
    _tell(findings, all_have_it=True)


def _wrong(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.verdict == "wrong"}


def _tell(findings: list[Finding], *, all_have_it: bool = False) -> None:
    """Print the table on rank 0, and raise what is wrong; where all ranks have the same findings, rank 0 speaks for them."""
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        show(findings)
    try:
        refuse_what_is_wrong(findings)
    except UserError as error:
        error.is_told = all_have_it and not is_main
        raise


def _say(findings: list[Finding]) -> None:
    """Tell the same from a thread, where an error would be lost."""
    try:
        _tell(findings)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(redact(f"{'' if rank == '0' else f'[rank {rank}] '}kto-ds: error: {error}"), file=sys.stderr, flush=True)


# before there is a process group


def _read_settings(config: RunConfig, device: torch.device) -> tuple[Settings | None, list[Finding]]:
    """Return what the config asks for, None where it cannot be told, and what this machine has to say to it."""
    folder = environment.extensions_folder(os.environ)
    on_cuda, several = device.type == "cuda", network.has_several_hosts(os.environ)
    try:
        model_config = read_model_config(config.model)
        require_trainable(config.model, model_config)
        raw = read_deepspeed_config(config.deepspeed.config)
        check_zero_section(raw.get("zero_optimization", {}), where=config.deepspeed.config)
        serving = choose_serving(config.model, model_config, device)
        weights = fetched_folder(config.model)
        names = weight_files(config.model.model_copy(update={"path": str(weights)}))[1] if weights else []
        largest = max(((weights / name).stat().st_size for name in names), default=0)
    except UserError as error:
        return None, [wrong_by("model", error), environment.check_operators(folder, is_needed=False, has_several_hosts=several)]
    complete = complete_deepspeed_config(raw, optim=config.optim, dtype=config.model.dtype, on_cuda=on_cuda)
    settings = Settings(model_config, complete, serving, count_parameters(model_config, trust_remote_code=config.model.trust_remote_code), weights, largest)
    model = f"{model_config.model_type}, {settings.num_parameters:,} parameters, {config.model.dtype}, ZeRO {zero_stage(raw)} ({config.deepspeed.config})"
    told = Finding("model", model)
    if weights is None:
        told = Finding("model", f"{model}; its weights are not here yet: each host would fetch them while all ranks wait", "warn", f"hf download {config.model.path} on every host")
    chosen = f"model.attention: {config.model.attention} takes {serving.backend}, model.kernels: {config.model.kernels} takes {serving.kernels}, {serving.layout} layout"
    kernels = stack.check_kernels(chosen, serving.backend, serving.kernels, notice=serving.notice, on_cuda=on_cuda, is_free=config.model.kernels == "auto")
    operators = environment.check_operators(folder, is_needed=on_cuda and settings.offloads_optimizer, has_several_hosts=several)
    return settings, [told, kernels, operators]


def fetched_folder(model: ModelConfig) -> Path | None:
    """Return the folder of a model, or that of what was fetched of it before; nothing is fetched."""
    if Path(model.path).is_dir():
        return Path(model.path)
    try:
        return Path(snapshot_download(model.path, revision=model.revision, local_files_only=True, allow_patterns=["*.safetensors*"]))
    except (OSError, LocalEntryNotFoundError):
        return None


def count_parameters(model_config: PretrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Return the number of parameters, tied ones once; no memory is taken for them."""
    return without_weights(model_config, trust_remote_code=trust_remote_code).num_parameters()


def _meet(config: RunConfig, device: torch.device, own: list[Finding], *, seconds: float, findings: list[Finding]) -> tuple[list[Facts], probes.Meeting]:
    """Tell all ranks what this one sees, and return what each of them does. What each finds wrong with its own machine goes to `findings`."""
    deepspeed = digest_of(canonical_json(_config_file(config)))
    # Where they lie may differ: the launcher hands the same command to all, and each host has a disk of its own.
    configs = {"RUN.yaml": digest_of(canonical_json(config.model_dump(mode="json"))), "deepspeed.config": deepspeed}
    mine = facts_of(int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")), device, packages=stack.package_names(), configs=configs)
    try:
        meeting = probes.meet(json.dumps([mine.to_text(), own]), seconds=seconds)
    except UserError as error:
        _tell([*findings, *own, wrong_by("meeting", error)])
    words = [json.loads(word) for word in meeting.words]
    of_ranks = [[Finding(*fields) for fields in listed] for _, listed in words]
    for place in of_ranks[0]:
        others = [(rank, finding) for rank, listed in enumerate(of_ranks) for finding in listed if finding.name == place.name]
        named = [finding._replace(found=f"{finding.found} (rank {rank})") if finding.found != place.found else finding for rank, finding in others]
        findings.append(worst(place.name, named, otherwise=place.found))
    return [Facts.from_text(text) for text, _ in words], meeting


def _config_file(config: RunConfig) -> dict:
    try:
        return read_deepspeed_config(config.deepspeed.config)
    except UserError:  # which the check of the model tells
        return {}


def _compare(config: RunConfig, facts: list[Facts], settings: Settings | None) -> list[Finding]:
    """Check what all ranks have told one another."""
    on_cuda = facts[0].device.kind == "cuda"
    findings = [
        network.check_ranks(facts),
        network.check_interfaces(facts),
        stack.check_versions(facts),
        stack.check_driver(facts, is_cpu_wanted=os.environ.get("DS_ACCELERATOR") == "cpu"),
        machine.check_devices(facts, dtype=config.model.dtype),
        environment.check_variables(
            [fact.variables for fact in facts], on_cuda=on_cuda, names_hub_model=not os.path.isdir(config.model.path), num_local=network.ranks_here(facts[0].variables)
        ),
        stack.check_configs(facts),
    ]
    if settings is None:
        return findings
    needed, why = _host_bytes(settings, config.model.dtype, on_cuda=on_cuda, num_ranks=len(facts))
    pins = on_cuda and (settings.offloads_optimizer or machine.uses_infiniband())
    return [*findings, machine.check_host_memory(facts, needed_per_rank=needed, why=why), machine.check_limits(facts, pins_memory=pins), _space(config, settings)]


def _host_bytes(settings: Settings, dtype: str, *, on_cuda: bool, num_ranks: int) -> tuple[int, str]:
    """Return about what a rank takes of its host's memory, in bytes, and what for."""
    reading = 2 * settings.largest_shard_bytes
    stage, weight_bytes = zero_stage(settings.deepspeed_config), DTYPES[dtype].itemsize
    weights = settings.num_parameters * weight_bytes // (num_ranks if stage == 3 else 1)
    gradients = 4 * settings.num_parameters // (num_ranks if stage >= 2 else 1)
    optimizer = (12 if stage > 0 or weight_bytes < 4 else 8) * settings.num_parameters // (num_ranks if stage >= 1 else 1)
    if not on_cuda:
        return reading + weights + gradients + optimizer, "weights, gradients and optimizer, and reading the weights"
    offloaded = (optimizer + gradients) * settings.offloads_optimizer + weights * offloads_parameters(settings.deepspeed_config)
    return reading + offloaded, "reading the weights, and what is offloaded" if offloaded else "reading the weights"


def _space(config: RunConfig, settings: Settings) -> Finding:
    weight_bytes = DTYPES[config.model.dtype].itemsize
    checkpoint = saved_bytes(settings.num_parameters, stage=zero_stage(settings.deepspeed_config), weight_bytes=weight_bytes)
    try:
        present = sum(folder_bytes(folder) for _, folder in list_checkpoints(config.output_dir / "checkpoints"))
    except KtoError:  # cannot be read; the check of the folder tells
        present = 0
    return storage.check_space(
        config.output_dir, checkpoint_bytes=checkpoint, export_bytes=weight_bytes * settings.num_parameters, kept=config.checkpoint.save_total_limit, present_bytes=present
    )


# in the process group


def _phases(config: RunConfig, world: World, facts: list[Facts], settings: Settings) -> dict[str, Callable[[], list[Finding]]]:
    """Return what is looked at in a process group, by name: each may hang, and is ended then."""
    sizes = (*SIZES, probes.LARGEST_BYTES[world.device.type])
    share = (world.num_ranks - 1) / world.num_ranks
    collectives = {
        "all-reduce": lambda: [transfers.check_transfers("all-reduce", [probes.probe_all_reduce(world, size) for size in sizes], facts, bus_factor=2 * share)],
        "all-gather": lambda: [transfers.check_transfers("all-gather", [probes.probe_all_gather(world, size) for size in sizes], facts, bus_factor=share)],
        "links": lambda: [transfers.check_links(probes.probe_ring(world, RING_BYTES), facts, num_bytes=RING_BYTES)],
        "speed": lambda: [transfers.check_speeds(probes.probe_arithmetic(world), facts)],
        "clocks": lambda: [network.check_clocks(probes.clocks(), facts)],
    }
    others = {"job": lambda: [_check_job(config, settings, world)], "folders": lambda: _look_at_folders(config, world, facts, settings)}
    return {**(collectives if world.num_ranks > 1 else {}), **others}


def _check_job(config: RunConfig, settings: Settings, world: World) -> Finding:
    try:
        require_served(config, settings.model_config, settings.deepspeed_config, settings.serving, world)
    except UserError as error:
        return wrong_by("job", error)
    return Finding("job", f"{world.num_ranks} rank{'s' * (world.num_ranks > 1)} can share out the model and its states")


def _look_at_folders(config: RunConfig, world: World, facts: list[Facts], settings: Settings) -> list[Finding]:
    folder, hosts = config.output_dir, [fact.host for fact in facts]
    findings = [storage.check_writing(folder, gather_objects(storage.probe_writing(folder, world.rank)), hosts)]
    if findings[0].verdict != "wrong":
        token = on_main_rank(lambda: secrets.token_hex(4))
        on_main_rank(lambda: storage.place_mark(folder, token))
        seen = gather_objects((storage.sees_mark(folder, token), str(folder.absolute())))
        on_main_rank(lambda: storage.remove_mark(folder, token))
        findings.append(storage.check_sharing(folder, [sees for sees, _ in seen], [place for _, place in seen], hosts))
    if all(gather_objects(settings.weights is not None)):
        try:
            require_same_weights(config.model)
            findings.append(Finding("weights", "the same files on all ranks" if world.num_ranks > 1 else "one rank"))
        except UserError as error:
            findings.append(wrong_by("weights", error))
    return findings


def _dry_run(config: RunConfig, settings: Settings, world: World, findings: list[Finding]) -> Finding:
    def on_end(end: End) -> None:
        show([*findings, Finding("dry run", end.message, "wrong")])

    try:
        found = rehearse(config, settings.model_config, settings.deepspeed_config, settings.serving, world, on_end=on_end)
    except KtoError as error:
        return wrong_by("dry run", error) if isinstance(error, UserError) else Finding("dry run", str(error), "wrong", "this is what the run would end with")
    if found.problem:
        return Finding("dry run", found.problem, "wrong", "doubt this machine, its disk or the versions: a run that resumes from such a checkpoint is another one")
    return Finding("dry run", _in_words(found), "warn" if found.notice else "ok", "run kto-ds prepare and kto-ds precompute-ref again" if found.notice else "")


def _in_words(found: Rehearsal) -> str:
    rate = found.saved_bytes / max(found.save_seconds, 1e-9) / 1e6
    return (
        f"{found.rows}: engine ready in {found.ready_seconds:.1f} s, a step {found.step_seconds:.2f} s, saved {in_words(found.saved_bytes)} in {found.save_seconds:.1f} s "
        f"({rate:,.0f} MB/s), resumed to the bit in {found.resume_seconds:.1f} s, {found.peak_memory_gib:.2f} GiB at the peak" + (f"; {found.notice}" if found.notice else "")
    )
