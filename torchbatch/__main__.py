"""``python -m torchbatch``: the same as the command ``torchbatch``."""

from __future__ import annotations

import sys

from torchbatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
