"""`python -m cnnrnn` is the `cnnrnn` command."""

from cnnrnn.cli import run

run()
