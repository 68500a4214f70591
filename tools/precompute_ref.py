"""The same as `kto-ds precompute-ref`, as a script: `deepspeed tools/precompute_ref.py --config RUN.yaml`."""

import sys

from kto_ds.cli import program

if __name__ == "__main__":
    sys.argv.insert(1, "precompute-ref")
    program()
