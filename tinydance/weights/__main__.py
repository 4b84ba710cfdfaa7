"""`python -m tinydance.weights PATH`: what a checkpoint is, and a model folder of it. The command
must know the networks, which nothing in this room does: so its code is `run/convert.py`."""

import sys

from tinydance.run import cli, convert

if __name__ == "__main__":
    sys.argv[0] = "tinydance.weights"  # errors name it, and not __main__.py
    cli.run_main(convert.main)
