"""How the views of a run are closed."""

import pytest

from kto_ds.report.sinks import Sinks


class View:
    def __init__(self, error: str = ""):
        self.error, self.is_open = error, True

    def close(self) -> None:
        self.is_open = False
        if self.error:
            raise OSError(self.error)


def test_all_are_closed_and_the_first_error_stays():
    views = [View(), View("first"), View("second"), View()]
    with pytest.raises(OSError, match="first"), Sinks(views):
        pass
    assert not any(view.is_open for view in views)
    with pytest.raises(ValueError, match="of the run"), Sinks(views):
        raise ValueError("of the run")
