"""``opsd convert megatron-to-hf`` as a script: ``--megatron DIR --hf DIR [--verify]``."""

import sys

from megatron_opsd.cli import main

main(["convert", "megatron-to-hf", *sys.argv[1:]])
