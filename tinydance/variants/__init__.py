"""What others change, a page each. README.md is the manual.

A page converts a finished network, so that the core stays as it is.

`lora.py` trains thin matrices beside the attentions' own.
"""

from tinydance.variants.lora import add_lora, merge_lora

__all__ = ["add_lora", "merge_lora"]
