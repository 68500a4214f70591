"""Print the output folder of a run and, on a second line, how far it is: python launch/progress.py RUN.yaml [--section.key value ...]

Two starts between which nothing was done print the same.
"""

from pathlib import Path

from kto_ds.artifacts import incomplete_path
from kto_ds.cli import read_config
from kto_ds.errors import run_script


def files_below(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


def main(config_file: str, *overrides: str) -> None:
    config, _ = read_config("train", ["--config", config_file, *overrides])
    steps = [int(path.name.removeprefix("step-")) for path in (config.output_dir / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    files = sum(files_below(folder) for final in (config.dataset_dir, config.reference_dir) for folder in (final, incomplete_path(final)))
    print(config.output_dir.absolute(), f"saved step {max(steps, default=0)}, {files} files of artefacts", sep="\n")


if __name__ == "__main__":
    run_script(main)
