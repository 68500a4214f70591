"""What the package is made of, apart from its code: dependencies, wheel, scripts."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), *sorted((ROOT / "launch").rglob("*.sbatch")), *sorted((ROOT / "tests").rglob("*.sh")), ROOT / ".ci" / "run"]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def entries(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def pinned_versions() -> dict[str, str]:
    pins = [line.split("==") for line in entries((ROOT / "constraints.txt").read_text(encoding="utf-8"))]
    names = [canonicalize_name(name) for name, _ in pins]
    assert len(set(names)) == len(names)
    return dict(zip(names, (version for _, version in pins), strict=True))


def test_constraints_pin_what_setup_cfg_asks_for():
    parser, pins = setup_cfg(), pinned_versions()
    for line in entries(parser["options"]["install_requires"]) + entries(parser["options.extras_require"]["test"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), line


def test_constraints_serve_every_build_and_index():
    for name, version in pinned_versions().items():
        assert version and "+" not in version and "@" not in version and "/" not in version, f"{name}=={version}"


def test_setup_cfg_lists_every_package():
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "kto_ds").rglob("__init__.py")}
    assert set(entries(setup_cfg()["options"]["packages"])) == found | {"kto_ds.ds_configs"}


def test_wheel_holds_the_code_and_the_deepspeed_configs(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("kto_ds", "ds_configs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    [wheel] = tmp_path.glob("kto_ds-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"kto_ds/ds_configs/{file.name}" for file in (ROOT / "ds_configs").glob("*.json")}
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "kto_ds").rglob("*.py")}
    page = {f"kto_ds/report/page.{kind}" for kind in ("css", "js")}
    assert configs and configs | code | page <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kto_ds"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_shell_scripts_parse_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    if text.startswith("#!"):
        assert "\nset -euo pipefail\n" in text and os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    checked = subprocess.run(["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [f"launch/{name}" for name in ("pipeline.sh", "single_node.sh", "multi_node.sh", "multi_node_no_ssh.sh", "torchrun.sh", "slurm_pipeline.sbatch")])
def test_launchers_without_a_config_say_how_they_are_used(script):
    ended = subprocess.run(["bash", str(ROOT / script)], capture_output=True, text=True)
    assert ended.returncode == 2 and "RUN.yaml" in ended.stderr
