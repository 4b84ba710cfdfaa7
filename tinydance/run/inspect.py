"""What a training would see of its data, before it is started: `train.py --stage inspect`.

A table from the headers of some rows (lengths, sizes, rates, what is wrong and how often), what
became of the first samples when they were read as a training reads them, and these as a sheet.

Read after `data.py`. [ours]
"""

from collections import Counter

import numpy as np
import torch
from PIL import Image

from tinydance.data.cache import Latents
from tinydance.data.index import open_row
from tinydance.data.order import FIRST_IMAGE, Files, Mixture, WithPictures, said
from tinydance.run.cli import progress
from tinydance.video.read import BadSample, picture_size, pictures_in, read_header
from tinydance.video.strips import film_strip

HEADERS = 1000  # rows of each source whose headers are read


SAMPLES = 64    # clips that are read whole


SHOWN = 16      # of them on the sheet, and as many pictures of image steps


def inspect(source) -> tuple[str, Image.Image | None]:
    """-> the text, and the contact sheet; a cache has no pixels to show, and so no sheet."""
    lines = source.about()
    for files in files_of(source):
        lines += headers(files)
    clips, counts = [], Counter()
    for n in progress(range(SAMPLES), "reading", "clip"):
        clip = source.clip(n)
        counts += clip.counts
        clips = [*clips, clip][:SHOWN]
    lines += [f"{SAMPLES} clips read as trained on: {said(counts) or 'nothing wrong'}"]
    lines += [f"  {clip.name}: {clip.caption[:100] or '(no caption)'}" for clip in clips]
    if clips[0].frames.dtype != torch.uint8:
        return "\n".join(lines), None
    every = max(1, source.frames // 4)
    rows, titles = [clip.frames[::every] for clip in clips], [clip.caption for clip in clips]
    images = [source.frame(FIRST_IMAGE + n) for n in range(SHOWN)]
    for some in (images[:SHOWN // 2], images[SHOWN // 2:]):
        rows.append(torch.cat([image.frames for image in some]))
        titles.append("image steps: " + " | ".join(image.caption for image in some))
    return "\n".join(lines), film_strip(rows, titles)


def files_of(source) -> list[Files]:
    if isinstance(source, (Mixture, WithPictures)):
        parts = source.sources if isinstance(source, Mixture) else [source.clips, source.pictures]
        return [files for part in parts for files in files_of(part)]
    return [source] if isinstance(source, Files) and not isinstance(source, Latents) else []


def headers(files: Files) -> list[str]:
    """What the headers of HEADERS rows, evenly chosen, say."""
    chosen = np.unique(np.linspace(0, len(files) - 1, HEADERS).astype(int))
    seen, bad, kinds, examples = [], Counter(), Counter(), {}
    for i in progress(chosen.tolist(), "headers", "file"):
        try:
            name = f"row {i}"
            row = files.rows[i]
            name = row.name
            with open_row(row) as file:
                if files.pictures:
                    width, height, kind = picture_size(file)
                    seen.append((width, height))
                else:
                    header = read_header(file)
                    seconds = min(header.seconds, row.end) - row.start
                    if pictures_in(seconds, files.fps) < files.frames:
                        kinds["shorter than a clip"] += 1
                    seen.append((header.width, header.height, seconds, header.fps))
                    kind = header.codec
                kinds[kind] += 1
        except BadSample as error:
            bad[error.reason] += 1
            examples.setdefault(error.reason, f"{name}: {error.message}")
    told = said(kinds) or "none can be read"
    lines = [f"  the headers of {len(chosen):,} of {len(files):,}: {told}"]
    for name, values in zip(("width", "height", "seconds", "fps"), np.array(seen).T):
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        lines.append(f"    {name:<8}{low:>9.6g} to {high:<9.6g} half below {middle:.6g}")
    lines += [f"    {count} {reason}, such as {examples[reason]:.200}"
              for reason, count in bad.most_common()]
    return lines
