"""What others change, a page each. README.md is the manual.

A page converts a finished network, so that the core stays as it is, and is imported by its name:
`lora.py` trains thin matrices beside the attentions' own; `videocrafter1.py` shows pictures as
tokens among the words; `make_your_video.py` takes a depth map for every frame.
"""
