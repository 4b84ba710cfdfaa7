"""Stable Diffusion's autoencoder: pictures (n, 3, H, W) to latents (n, 4, H/8, W/8) and back.

A borrowed organ: PixelDance encodes the frames of a clip, and with them both image instructions,
by "a pre-trained VAE encoder" that stays frozen [paper §3.1, §4.1]. The parameters are named as
diffusers' `AutoencoderKL` names them; files with the older attention names or in the original
LDM layout load too (`weights.py`). The toy preset trains a small one of its own.

Read before: `training.py`. Read after: `clip.py`.
Not here: the adversarial and perceptual losses that Stable Diffusion's was trained with.
"""


import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.clip import BYTE_SYMBOLS, END, LENGTH, START, Tokenizer, merge_symbols, split_words
from tinydance.noise import draw, generator
from tinydance.vae import VAE


class ReconstructionLoss(nn.Module):
    """How a small VAE is trained from nothing [ours]: square error, and a slight pull to N(0, 1).

    SD's recipe has the absolute error with a perceptual and an adversarial loss. Without these two,
    the square error learns small objects far sooner: 32 dB against 24 after 1,600 toy steps.
    """

    KL_WEIGHT = 1e-6

    def __init__(self, vae: VAE, seed: int):
        super().__init__()
        self.vae, self.seed = vae, seed

    def forward(self, pixels: Tensor, captions: list[str], numbers: list[int]) -> Tensor:
        """pixels (b, 1, 3, H, W), numbers the samples': single frames -> the loss."""
        x = pixels.flatten(0, 1)
        mean, logvar = (moment.float() for moment in self.vae.encode(x))
        generators = [generator("vae", self.seed, n) for n in numbers]
        eps = draw(generators, *mean.shape[1:], device=x.device)
        y = self.vae.decode(mean + (0.5 * logvar).exp() * eps).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(y, x) + self.KL_WEIGHT * kl


def build_vocabulary(words, pad_id: int | None = None, length: int = LENGTH) -> Tokenizer:
    """A Tokenizer with each of the words as one token; it spells all other text by bytes [ours].

    In CLIP's own file format and order: bytes, bytes that end a word, merges, the two specials."""
    symbols = [*BYTE_SYMBOLS.values(), *(symbol + "</w>" for symbol in BYTE_SYMBOLS.values())]
    ranks = {}
    for word in (part for word in words for part in split_words(word)):
        # new merges rank last, so they cannot change a word that is one token already
        while len(pieces := merge_symbols(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    symbols += [left + right for left, right in ranks] + [START, END]
    # two pairs may join to one symbol, which gets one id
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return Tokenizer(vocab, ranks, pad_id, length)


# ---- how the toy's tower learns words ------------------------------------------------------------


class ContrastiveLoss(nn.Module):
    """CLIP's own training in miniature [CLIP]: captions are to be like their own clips.

    CLIP pairs texts with pictures; a toy text tower must also tell "left" from "right", so it is
    paired with clips. [ours] The video tower, four frames as one picture of 12 channels through
    three convolutions, is thrown away afterwards."""

    FRAMES = 4

    def __init__(self, tower, tokenizer, width=64):
        super().__init__()
        self.tower, self.tokenizer = tower, tokenizer
        self.video_tower = nn.Sequential(
            nn.Conv2d(3 * self.FRAMES, width, 5, stride=2, padding=2), nn.GELU(),
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2), nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, width, bias=False))
        self.projection = nn.Linear(tower.config["hidden_size"], width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, pixels, captions, numbers):
        """pixels (b, f, 3, H, W) and their captions -> the loss."""
        picks = torch.linspace(0, pixels.shape[1] - 1, self.FRAMES).long()
        video = F.normalize(self.video_tower(pixels[:, picks].flatten(1, 2)).float(), dim=-1)
        ids = self.tokenizer(captions).to(pixels.device)
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)  # the first; the rest is padding
        at_end = self.tower(ids)[torch.arange(len(ids)), ends]
        text = F.normalize(self.projection(at_end).float(), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * video @ text.T
        # clips with the same caption are equally right
        same = torch.tensor([[float(a == b) for b in captions] for a in captions]).to(logits)
        truth = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
