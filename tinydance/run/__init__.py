"""One training from start to end: what `train.py` runs. README.md is the manual.

Read `stages.py` first, then `fit.py`, the loop around the core's `training_steps`. All commands use
`cli.py`: for their sake this file imports nothing.
Not here: the loss and the step (`training.py`), the data (`data/`).
"""
