"""`python -m vlmteacher.planning ...` is `vlmteacher plan ...`."""

import sys

from vlmteacher.cli import main

sys.exit(main(["plan", *sys.argv[1:]]))
