"""`python -m cnnrnn` is the `cnnrnn` command."""

import sys

from cnnrnn.cli import main

sys.exit(main())
