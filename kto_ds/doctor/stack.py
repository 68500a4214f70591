"""Versions, kernels and configs: what is installed against what setup.cfg asks for, and the same on every rank."""

import configparser
import importlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import kto_ds
from kto_ds.doctor.facts import Facts
from kto_ds.doctor.findings import Finding, in_ranges, odd_ranks, worst

BEFORE = {"deepspeed": "earlier releases step into NaN in bfloat16 under ZeRO-3 without a word, and report a healthy gradient norm"}
OPTIONAL = ("flash-attn", "liger-kernel", "triton")  # that are looked for, and must be the same everywhere if they are there
PYTHON = ">=3.11"


def requirements() -> list[Requirement]:
    """Return what kto_ds needs to be installed: as setup.cfg of a checkout says, or of the installed package."""
    setup_file = Path(kto_ds.__file__).parents[1] / "setup.cfg"
    lines = []
    if setup_file.is_file():
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(setup_file, encoding="utf-8")
        lines = parser.get("options", "install_requires", fallback="").split("\n")
    else:
        with suppress(metadata.PackageNotFoundError):
            lines = [line for line in metadata.requires("kto-ds") or [] if "extra ==" not in line]
    return [Requirement(line) for line in lines if line.strip()]


def package_names() -> list[str]:
    return [*(requirement.name for requirement in requirements()), *OPTIONAL]


def check_versions(facts: Sequence[Facts]) -> Finding:
    """Compare what rank 0 has with what is needed, and all others with each other."""
    findings, own = [], facts[0].versions
    for requirement in requirements():
        version = own.get(requirement.name)
        if version is None:
            findings.append(Finding("versions", f"{requirement.name} is not installed", "wrong", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            why = f": {BEFORE[requirement.name]}" if requirement.name in BEFORE else ""
            findings.append(Finding("versions", f"{requirement.name} {version} does not fit {requirement.specifier}{why}", "wrong", f"pip install '{requirement}'"))
    if not SpecifierSet(PYTHON).contains(facts[0].python):
        findings.append(Finding("versions", f"Python {facts[0].python}", "wrong", f"use Python {PYTHON}"))
    seen = [{"kto_ds": fact.kto_ds, "python": fact.python, **fact.versions} for fact in facts]
    for name in sorted(set().union(*seen)):
        versions = [versions.get(name, "none") for versions in seen]
        if odd := odd_ranks(versions):
            usual = next(version for rank, version in enumerate(versions) if rank not in odd)
            hosts = ", ".join(sorted({facts[rank].host for rank in odd}))
            found = f"{name}: {versions[odd[0]]} on {in_ranges(odd)} (host {hosts}), {usual} on the others"
            findings.append(Finding("versions", found, "wrong", f"install one version of {name} on all hosts, best from one constraints file"))
    shown = ", ".join(f"{name} {own[name]}" for name in ("torch", "deepspeed", "transformers") if name in own)
    everywhere = " everywhere" if len(facts) > 1 else ""
    return worst("versions", findings, otherwise=f"kto_ds {facts[0].kto_ds}, Python {facts[0].python}, {shown}{everywhere}")


def check_driver(facts: Sequence[Facts], *, is_cpu_wanted: bool) -> Finding:
    """Look whether torch can use the GPUs that the driver has. `is_cpu_wanted`: the user has said so by DS_ACCELERATOR."""
    findings = []
    for fact in facts:
        if fact.driver and fact.device.kind == "cpu":
            built = f"built for CUDA {fact.torch_cuda}" if fact.torch_cuda else "built for CPUs"
            what = f"{fact.host} has NVIDIA's driver {fact.driver}, but torch ({built}) finds no GPU"
            remedy = "pip install a torch built for CUDA, not newer than the driver; see nvidia-smi" if not is_cpu_wanted else "unset DS_ACCELERATOR to use the GPUs"
            findings.append(Finding("driver", what if not is_cpu_wanted else f"{fact.host} has GPUs, and DS_ACCELERATOR=cpu leaves them alone", "warn" if is_cpu_wanted else "wrong", remedy))
    drivers = [fact.driver for fact in facts]
    if odd := odd_ranks(drivers):
        found = f"driver {drivers[odd[0]] or 'none'} on {in_ranges(odd)}, another on the others"
        findings.append(Finding("driver", found, "warn", "use one driver on all hosts: NCCL of two may not talk to each other"))
    cuda = f"torch for CUDA {facts[0].torch_cuda}, driver {facts[0].driver or 'unknown'}"
    return worst("driver", findings, otherwise=cuda if facts[0].device.kind == "cuda" else "no GPU, and none is used")


def check_configs(facts: Sequence[Facts]) -> Finding:
    """Compare what all ranks have read: each host may have a copy of its own."""
    for name in facts[0].configs:
        if others := [fact.rank for fact in facts if fact.configs[name] != facts[0].configs[name]]:
            found = f"{name} on {in_ranges(others)} (host {facts[others[0]].host}) is another than on rank 0"
            return Finding("configs", found, "wrong", "copy the files of rank 0's host to all others, or keep them on a file system that all share")
    return Finding("configs", "the same on all ranks" if len(facts) > 1 else "one rank")


def check_kernels(chosen: str, backend: str, kernels: str, *, notice: str, on_cuda: bool, is_free: bool) -> Finding:
    """Import what was chosen for attention and the rest: a build for another torch is only found out so. `chosen` says what it is; `is_free`: kernels were left to kto_ds."""
    name = "attention"
    for library, is_used in (("flash_attn", backend == "flash_attention_2"), ("liger_kernel.transformers", kernels == "liger")):
        if is_used:
            try:
                importlib.import_module(library)
            except (ImportError, OSError) as error:
                remedy = f"install {library.split('.')[0]} anew for this torch, or set model.attention: torch_varlen, or model.kernels: torch"
                return Finding(name, f"{chosen}, but {library} cannot be imported: {str(error).splitlines()[0]}", "wrong", remedy)
    if notice:
        return Finding(name, f"{chosen}; {notice}", "warn", "use another model, or bear with the padding")
    if on_cuda and backend == "sdpa":
        return Finding(name, f"{chosen}: one call a sequence, slow on a GPU", "warn", "pip install flash-attn, or use torch's own varlen_attn with model.dtype: bfloat16")
    if on_cuda and kernels == "torch" and is_free:
        return Finding(name, f"{chosen}: Liger's would be faster where the model is of their families", "warn", "pip install liger-kernel")
    return Finding(name, chosen)
