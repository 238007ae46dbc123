"""`python -m orchestrator` is the program `rollout`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main())
