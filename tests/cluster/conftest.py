"""Two hosts, a SLURM, and the run that is trained on them; what they need and this machine lacks is why a test is skipped."""

from pathlib import Path

import pytest

from tests.cluster.namespaces import TwoHosts, two_hosts, what_is_missing
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.state import final_state

# 60 steps, so that there is time to do something to it; saved every 10.
MEDIUM = dict(train__num_train_epochs=15, checkpoint__save_steps=10, eval__eval_steps=10_000)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> TwoHosts:
    if missing := what_is_missing():
        pytest.skip(missing)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="session")
def in_peace(tiny) -> dict:
    """How the medium run ends on two ranks of one machine, if nobody disturbs it."""
    run = tiny / "in_peace"
    with ranks.Ranks(["train", *config_of(tiny, output_dir=run, **MEDIUM)], log=tiny / "log") as started:
        assert started.wait(ranks.COMMANDS_SECONDS) == [0, 0], started.output()[-4000:]
    return final_state(run)


@pytest.fixture
def medium(tiny, tmp_path) -> tuple[Path, list[str]]:
    """The folder of a medium run, and the arguments of a launch script for it: RUN.yaml and overrides."""
    run = tmp_path / "run"
    return run, [str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, **MEDIUM)[2:]]
