"""`python -m vlmteacher` is `vlmteacher`."""

from vlmteacher.cli import main

raise SystemExit(main())
