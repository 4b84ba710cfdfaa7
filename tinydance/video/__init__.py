"""Pixels in files: clips and pictures in and out, film strips, and stories. Read `read.py` first.

Frames are uint8 (f, 3, H, W); `vae.to_pixels` and `vae.to_frames` lead to the network's pixels in
[-1, 1] and back. The manual, with a list of the files, is README.md.
"""

from tinydance.video.read import BadSample, read_clip, read_image, read_seconds
from tinydance.video.strips import film_strip, psnr
from tinydance.video.write import read_metadata, save_video

__all__ = ["BadSample", "film_strip", "psnr", "read_clip", "read_image"]
__all__ += ["read_seconds", "read_metadata", "save_video"]
