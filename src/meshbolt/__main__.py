"""`python -m meshbolt` is the command line `meshbolt`."""

from __future__ import annotations

import sys

from meshbolt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
