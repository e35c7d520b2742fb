import sys

from nlae_jax.cli import entry

sys.exit(entry())
