"""The same as `kto-ds precompute-ref`, as a script: `deepspeed tools/precompute_ref.py --config RUN.yaml`."""

import sys

from kto_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["precompute-ref", *sys.argv[1:]]))
