"""One training from start to end: what `train.py` runs.

The door is `stages.train(config, stage)`. Read `stages.py` first: what is trained, in which order,
and from what. Then `fit.py`, the loop around the core's `training_steps`, with `checkpoints.py` and
`log.py`. Beside the training stand `benchmark.py` (where a step's time goes), `inspect.py` (what
the data are) and `cli.py`, which all commands use: for their sake this file imports nothing.

README.md is the manual of training at full scale. Not here: the loss and the step
(`training.py`), the data (`data/`).
"""
