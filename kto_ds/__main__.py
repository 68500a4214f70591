from kto_ds.early import leave_on_signals

leave_on_signals()  # ahead of the next import, which takes a moment

from kto_ds.cli import program  # noqa: E402

program()
