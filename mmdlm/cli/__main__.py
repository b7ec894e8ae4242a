"""The command `mmdlm` as a module: `python -m mmdlm.cli`."""

import sys

from mmdlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
