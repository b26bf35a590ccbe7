"""``python -m streamx``, the form that ``torchrun -m`` starts."""

import sys

from streamx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
