"""What a training would see of its data, before it is started: `train.py --stage inspect`.

What becomes of rows of each source when they are read as a training reads them, and the first clips
as a sheet. [ours] Not here: how rows are read. They read themselves (`data/rows.py`).
"""

from collections import Counter
from pathlib import Path
from time import process_time

import numpy as np
import torch

from tinydance.config import Config
from tinydance.data import Files
from tinydance.data.open import Source
from tinydance.data.order import FIRST_IMAGE, format_counts
from tinydance.noise import rng
from tinydance.run.cli import progress
from tinydance.training import Machine
from tinydance.vae import holds_moments
from tinydance.video.read import BadSample, printable
from tinydance.video.strips import film_strip

ROWS = 200  # of each source that are read
SLOW = 0.1  # seconds to decode a sample, from which on there is a hint
SHOWN = 16  # clips on the sheet, and half as many pictures of image steps


def inspect(config: Config, machine: Machine, source: Source) -> None:
    """Print the text and save the sheet; a cache has no pixels to show, and so no sheet."""
    if machine.rank > 0:
        return
    for leaf in source.leaves():
        if isinstance(leaf, Files):
            read_rows(leaf)
    clips = [source.sample(n) for n in progress(range(SHOWN), "reading", "clip")]
    lines = (f"  {clip.name}: {clip.caption[:100] or '(no caption)'}" for clip in clips)
    print("the first clips:", *map(printable, lines), sep="\n", flush=True)
    if holds_moments(clips[0].frames):
        return
    every = max(1, source.frames // 4)
    rows, titles = [clip.frames[::every] for clip in clips], [clip.caption for clip in clips]
    images = [source.sample(FIRST_IMAGE + n, "first") for n in range(SHOWN // 2)]
    rows.append(torch.cat([image.frames for image in images]))
    titles.append("image steps: " + " | ".join(image.caption for image in images))
    path = Path(config.out) / "inspect.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    film_strip(rows, titles).save(path)
    print(f"the sheet is {path}", flush=True)


def read_rows(files: Files) -> None:
    """Print what becomes of ROWS rows, evenly chosen, when they are read as a training reads them,
    and for each reason why some cannot be read an example."""
    chosen = np.unique(np.linspace(0, len(files.rows) - 1, ROWS).astype(int)).tolist()
    counts, examples, begun = Counter(), {}, process_time()
    for i in progress(chosen, "reading", "row"):
        try:
            counts += files.read(i, files.frames, rng("inspect", files.seed, i)).counts
        except BadSample as error:
            counts[error.reason] += 1
            examples.setdefault(error.reason, f"  {error.reason}, such as {error.message:.200}")
    seconds = (process_time() - begun) / len(chosen)
    found = format_counts(counts) or "nothing wrong"
    lines = [f"{files.rows.where}: {len(chosen):,} of {len(files.rows):,} rows read: {found}"]
    lines += examples.values()
    if seconds > SLOW:
        height = 2 * min(files.size)  # enough for an upright video, too
        shrink = f"ffmpeg -i large.mp4 -vf scale=-2:{height} small.mp4"
        lines += [f"  {seconds:.2f} s each to decode: shrink the files once, such as by {shrink}"]
        lines += ["  or, for the stages image and video, cache latents: --stage latents"]
    print(*lines, sep="\n", flush=True)
