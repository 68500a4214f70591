import sys

from kto_ds.cli import main

sys.exit(main())
