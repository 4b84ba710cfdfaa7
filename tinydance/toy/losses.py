"""How the toy world's borrowed organs are trained: a small VAE, and a small text tower.

The paper freezes a published VAE and text encoder [paper §4.1]. A laptop has no room for such, so
the toy preset trains its own in minutes, by simplified versions of their recipes. Each objective
takes a `Batch` and returns named numbers, of which "loss" is lowered.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance import clip
from tinydance.model import Batch
from tinydance.noise import draw, generator
from tinydance.vae import VAE, to_pixels


class ReconstructionLoss(nn.Module):
    """How a small VAE is trained from nothing [ours]: square error, and a slight pull to N(0, 1).
    SD's recipe has the absolute error with a perceptual and an adversarial loss. Without these two,
    the square error learns small objects far sooner: 32 dB against 24 after 1,600 toy steps."""

    KL_WEIGHT = 1e-6

    def __init__(self, vae: VAE, seed: int):
        super().__init__()
        self.vae, self.seed = vae, seed

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """frames (b, 1, 3, H, W), single frames -> "loss"; and "kl", the distance from N(0, 1)."""
        x = to_pixels(batch.frames).flatten(0, 1)  # b 1 3 H W -> b 3 H W
        mean, logvar = (moment.float() for moment in self.vae.encode(x))
        generators = [generator("vae", self.seed, n) for n in batch.sample_ids]
        eps = draw(generators, *mean.shape[1:], device=x.device)
        y = self.vae.decode(mean + (0.5 * logvar).exp() * eps).float()
        # KL(N(mean, var) || N(0, 1)) = (mean^2 + var - 1 - log var) / 2
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {"loss": F.mse_loss(y, x) + self.KL_WEIGHT * kl, "kl": kl.detach()}


@torch.no_grad()
def whiten(vae: VAE, x: Tensor) -> None:
    """Make the latents of pixels x (n, 3, H, W) of zero mean, unit variance, uncorrelated.

    Stable Diffusion scales its latents by one number [LDM]; but a small VAE's channels can differ
    tenfold in variance, and noise then drowns the small ones first. The map and its inverse go
    into the two 1x1 convolutions: the same pictures come out, and the file keeps its format. The
    posterior becomes its mean: its noise was most of two channels of eight, and half of the UNet's
    loss, and nobody can predict it. [ours: measured]
    """
    mean = vae.encode(x)[0].transpose(0, 1).flatten(1).double()  # n c h w -> c (n h w)
    centre = mean.mean(1)
    variances, axes = torch.linalg.eigh(mean.cov())
    forth, back = (axes / variances.sqrt()).T, axes * variances.sqrt()  # whiten, and undo it

    c, quant, post = len(centre), vae.quant_conv, vae.post_quant_conv
    # The decoder sees W (back z + centre) + b: what it saw before.
    weight, bias = post.weight.double(), post.bias.double()
    post.weight.copy_(torch.einsum("oi...,ij->oj...", weight, back))
    post.bias.copy_(bias + weight[:, :, 0, 0] @ centre)
    # The encoder gives forth (W h + b - centre), and no variance.
    weight, bias = quant.weight[:c].double(), quant.bias[:c].double()
    quant.weight[:c] = torch.einsum("oi,ij...->oj...", forth, weight).to(quant.weight)
    quant.bias[:c] = (forth @ (bias - centre)).to(quant.bias)
    quant.weight[c:] = 0
    quant.bias[c:] = -30  # its logarithm; the least that `VAE.encode` gives
    vae.config = replace(vae.config, scaling_factor=1.0)


def build_vocabulary(words, length: int = clip.LENGTH) -> clip.Tokenizer:
    """Make a Tokenizer with each of the words as one token; it spells all else by bytes [ours]."""
    ranks = {}
    for word in (part for word in words for part in clip.split_words(word)):
        # new merges rank last, so they cannot change a word that is one token already
        while len(pieces := clip.merge_symbols(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return clip.Tokenizer(ranks, length=length)


def init_clip(tower: clip.TextTower) -> None:
    """Draw a new tower's weights as CLIP does; those of the norms are right already [CLIP]."""
    width, depth = tower.config.hidden_size, tower.config.num_hidden_layers
    residual = (2 * depth * width) ** -0.5  # 2 * depth branches are summed
    stds = {"token_embedding": 0.02, "position_embedding": 0.01}
    stds |= {"out_proj": residual, "fc1": (2 * width) ** -0.5, "fc2": residual}
    for name, parameter in tower.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=stds.get(name.split(".")[-2], width**-0.5))


class ContrastiveLoss(nn.Module):
    """CLIP's own training in miniature [CLIP]: a caption shall be more like its clip than others.

    CLIP pairs texts with pictures; a toy tower must also tell "left" from "right", so it is paired
    with clips: four frames, stacked as channels. The video tower is thrown away afterwards. [ours]
    """

    def __init__(self, tower: clip.TextTower, tokenizer: clip.Tokenizer, width: int = 64):
        super().__init__()
        self.tower, self.tokenizer, self.frames = tower, tokenizer, 4  # seen of each clip
        layers, channels = [], 3 * self.frames
        for wider, kernel in ((width, 5), (2 * width, 5), (2 * width, 3)):
            layers += [nn.Conv2d(channels, wider, kernel, 2, padding=kernel // 2), nn.GELU()]
            channels = wider
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, width, bias=False)
        self.video_tower = nn.Sequential(*layers, *pool)
        self.projection = nn.Linear(tower.config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """frames (b, f, 3, H, W) -> "loss"; "accuracy": of clips most like a caption of theirs."""
        pixels = to_pixels(batch.frames)
        picks = torch.linspace(0, pixels.shape[1] - 1, self.frames).long()
        video = self.video_tower(pixels[:, picks].flatten(1, 2)).float()  # b (4 3) H W -> b d
        ids = self.tokenizer(batch.captions).to(pixels.device)  # b l
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)  # the first; the rest is padding
        text = self.projection(self.tower(ids)[torch.arange(len(ids)), ends]).float()  # b d
        video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * video @ text.T  # b b
        same = torch.tensor([[a == b for b in batch.captions] for a in batch.captions]).to(logits)
        truth = same / same.sum(dim=1, keepdim=True)  # the same caption is equally right
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        chosen = logits.argmax(dim=1, keepdim=True)
        return {"loss": loss, "accuracy": same.gather(1, chosen).mean()}
