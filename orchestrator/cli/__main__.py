"""`python -m orchestrator.cli` is the program `rollout`, as `python -m orchestrator` is."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main())
