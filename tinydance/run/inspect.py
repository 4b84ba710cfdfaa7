"""What a training would see of its data, before it is started: `train.py --stage inspect`.

A table from the headers of some rows, what became of the first samples when they were read as a
training reads them, and these as a sheet. [ours]
Not here: how rows are read. They read themselves (`data/rows.py`).
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from tinydance.config import Config
from tinydance.data import Files, open_source
from tinydance.data.cache import find_caches
from tinydance.data.order import FIRST_IMAGE, describe_source, format_counts
from tinydance.run.cli import progress
from tinydance.training import Machine
from tinydance.vae import holds_moments
from tinydance.video.read import BadSample, pictures_in
from tinydance.video.strips import film_strip

HEADERS = 1000  # rows of each source whose headers are read
SAMPLES = 64  # clips that are read whole
SHOWN = 16  # of them on the sheet, and as many pictures of image steps


def inspect(config: Config, machine: Machine) -> None:
    """Print the text and save the sheet; a cache has no pixels to show, and so no sheet."""
    if machine.rank > 0:
        return
    source, clips, counts = open_source(config, progress), [], Counter()
    lines = describe_source(source)
    for leaf in source.leaves():
        if isinstance(leaf, Files) and not find_caches(leaf):
            lines += describe_headers(leaf)
    for n in progress(range(SAMPLES), "reading", "clip"):
        clip = source.sample(n)
        counts += clip.counts
        clips = [*clips, clip][:SHOWN]
    lines += [f"{SAMPLES} clips read as trained on: {format_counts(counts) or 'nothing wrong'}"]
    lines += [f"  {clip.name}: {clip.caption[:100] or '(no caption)'}" for clip in clips]
    print("\n".join(lines), flush=True)
    if holds_moments(clips[0].frames):
        return
    every = max(1, source.frames // 4)
    rows, titles = [clip.frames[::every] for clip in clips], [clip.caption for clip in clips]
    images = [source.sample(FIRST_IMAGE + n, "first") for n in range(SHOWN)]
    for half in (images[: SHOWN // 2], images[SHOWN // 2 :]):
        rows.append(torch.cat([image.frames for image in half]))
        titles.append("image steps: " + " | ".join(image.caption for image in half))
    path = Path(config.out) / "inspect.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    film_strip(rows, titles).save(path)
    print(f"the sheet is {path}", flush=True)


def describe_headers(files: Files) -> list[str]:
    """What the headers of HEADERS rows, evenly chosen, say."""
    chosen = np.unique(np.linspace(0, len(files) - 1, HEADERS).astype(int)).tolist()
    headers, kinds, bad, examples = [], Counter(), Counter(), {}
    for i in progress(chosen, "headers", "file"):
        name = f"row {i}"
        try:
            row = files.rows[i]  # may be bad already, by its caption
            name, header = row.name, row.header()
        except BadSample as error:
            bad[error.reason] += 1
            examples.setdefault(error.reason, f"{name}: {error.message}")
            continue
        headers.append(header)
        kinds[header["codec"]] += 1
        if "seconds" in header and pictures_in(header["seconds"], files.fps) < files.frames:
            kinds["shorter than a clip"] += 1
    found = format_counts(kinds) or "none can be read"
    lines = [f"  the headers of {len(chosen):,} of {len(files):,}: {found}"]
    for name in ("width", "height", "seconds", "fps"):
        if values := [header[name] for header in headers if name in header]:
            low, middle, high = np.quantile(values, (0, 0.5, 1))
            lines.append(f"    {name:<8}{low:>9.6g} to {high:<9.6g} half below {middle:.6g}")
    for reason, count in bad.most_common():
        lines.append(f"    {count} {reason}, such as {examples[reason]:.200}")
    return lines
