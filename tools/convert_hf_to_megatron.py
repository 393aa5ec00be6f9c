"""``opsd convert hf-to-megatron`` as a script: ``--hf DIR --megatron DIR [--dtype bf16] [--verify]``."""

import sys

from megatron_opsd.cli import main

main(["convert", "hf-to-megatron", *sys.argv[1:]])
