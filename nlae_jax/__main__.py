import sys

from nlae_jax.cli import main

sys.exit(main())
