"""The memory of a training, calculated: beside what autograd keeps, and what the manual says."""

import functools
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretend import pretend
from reference import TINY, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinydance.conditioning import ask
from tinydance.config import make_config
from tinydance.run import memory
from tinydance.run.benchmark import make_random_model

GIB = 2**30
COUNT = functools.cache(memory.count_activations)


def test_what_is_counted_is_what_autograd_keeps():
    """Of the same forward pass, on pretended CUDA: it takes the fused attention, as CUDA does."""
    unet, kept = tiny_unet().train(), {}
    with pretend("cuda"):
        unet.to("cuda")
        own = {p.host.untyped_storage()._cdata for p in unet.parameters()}

        def keep(x):
            kept[x.host.untyped_storage()._cdata] = x.host.untyped_storage()
            return x

        shape, text = (2, 4, 16, 16), (2, 24, 16)
        given = (
            torch.randn(2, 4, 8, 16, 16, device="cuda"),
            torch.zeros(2, dtype=int, device="cuda"),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            unet(*given, torch.randn(text, device="cuda"))
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    counted, copies = memory.count_activations(TINY["unet"], shape, text, torch.float32, False)
    assert counted == pytest.approx(real, rel=0.02) and copies == 0


def test_half_precision_and_checkpoints_keep_less():
    def count(dtype, again, clips=4):
        shape, text = (clips, 4, 16, 16), (clips, 24, 16)
        return memory.count_activations(TINY["unet"], shape, text, dtype, again)

    (full, _), (half, copies) = count(torch.float32, False), count(torch.bfloat16, False)
    assert 0.5 * full < half < 0.8 * full  # norms, and what autocast copies for them, stay whole
    weights = sum(p.numel() for p in tiny_unet().parameters())
    assert 1.6 * weights < copies < 2 * weights
    assert count(torch.float32, True)[0] < 0.6 * full
    assert count(torch.float32, False, 8)[0] == pytest.approx(2 * full, rel=0.01)


def describe(free, ranks, preset, **given):
    """The head of a run of this preset, on a GPU with that many GiB free for more than weights."""
    config = make_config(preset, **given)
    with torch.device("meta"):
        model = make_random_model(config)
    there = {"world_size": ranks, "device": torch.device("cuda", 0), "dtype": torch.bfloat16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, free * GIB))
        patch.setattr(memory, "count_activations", COUNT)  # once for all these tests
        return memory.describe_memory(model, config, SimpleNamespace(**there))


FITS = {  # GiB free: of 141, 80, 40 and 24 GB, without CUDA itself and the weights
    "8 x 141 GB": (122, 8, "paper", {"micro_batch": 8}),
    "8 x 80 GB": (66, 8, "paper", {"micro_batch": 3}),
    "32 x 80 GB": (66, 32, "paper", {"micro_batch": 3}),
    "8 x 40 GB": (29, 8, "paper", {"micro_batch": 4, "gradient_checkpointing": True}),
    "1 x 24 GB": (18, 1, "small", {}),
}


@pytest.mark.parametrize("machine", FITS)
def test_the_manual_names_commands_that_fit(machine):
    free, ranks, preset, flags = FITS[machine]
    line = describe(free, ranks, preset, **flags)
    more = int(re.search(r"(\d+) GiB more than the weights", line)[1])
    assert more <= free
    words = " ".join(f"--{name} {str(value).lower()}" for name, value in flags.items())
    manual = memory.__file__.removesuffix("memory.py") + "README.md"
    rows = [row for row in open(manual, encoding="utf-8") if machine in row]
    assert rows and (words or "nothing") in rows[0]


def test_a_clip_of_the_paper_takes_what_the_manual_says():
    assert "11.11 for the activations of each clip" in describe(500, 8, "paper")
    assert "2.12 for" in describe(500, 8, "paper", gradient_checkpointing=True)


def test_what_cannot_fit_is_refused_with_flags_that_make_it_fit():
    with pytest.raises(ValueError, match="for 24 clips at once, and the GPU has 66") as refusal:
        describe(66, 8, "paper")
    flags = re.findall(r"--(\w+) (\w+)", str(refusal.value))
    assert [name for name, _ in flags] == ["micro_batch", "gradient_checkpointing"]
    describe(66, 8, "paper", **dict(flags[:1]))
    with pytest.raises(ValueError, match="try --gradient_checkpointing true$"):
        describe(18, 1, "paper", gradient_checkpointing=False)
    with pytest.raises(ValueError, match="try a smaller clip or network"):
        describe(1, 1, "small", gradient_checkpointing=True, micro_batch=1)


class Alive(TorchDispatchMode):
    """The most bytes of tensors that are alive at once inside the block, beside those given."""

    def __init__(self, but):
        super().__init__()
        self.known, self.now, self.most = {x.untyped_storage()._cdata for x in but}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in {
            x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        }:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                weakref.finalize(storage, self.free, key, size)
                self.now += size
                self.most = max(self.most, self.now)
        return out

    def free(self, key, size):
        self.known.remove(key)
        self.now -= size


def test_alive_counts_what_is_there_at_once():
    weight = torch.randn(1000, device="meta")
    with Alive([weight]) as alive:
        a = weight * 2  # 4,000 bytes
        a = a + 1  # and 4,000 more, while both are there
        b = a.view(10, 100)  # the same storage
        del a
        c = b.sum()
    assert (alive.most, alive.now) == (8000, 4004) and c.numel() == 1


@functools.cache
def count_sampling(size, dtype):
    """-> GiB of the paper's network's weights, of a guided step beside them, of decoding a clip."""
    f, h, w = 16, size[0] // 8, size[1] // 8
    with torch.device("meta"):
        model = make_random_model(make_config("paper")).to("meta", dtype)
        z_t, t, c_text = torch.empty(2, f, 4, h, w), torch.zeros(2).long(), torch.empty(2, 77, 1024)
        weights = [
            p for part in (model.unet, model.vae, model.text_tower) for p in part.parameters()
        ]
        with torch.no_grad(), memory.Autocast(dtype):
            with Alive(weights) as step:
                ask(model.unet.eval(), z_t, t, c_text, {"c_image": torch.empty_like(z_t)})
            with Alive(weights) as decoding:
                model.vae.decode_video(z_t[:1])
    return [n / GIB for n in (sum(p.nbytes for p in weights), step.most, decoding.most)]


SAMPLED = {"256x256": (256, 256), "320x512": (320, 512)}
HALVES = {"float32": [torch.float32], "half": [torch.bfloat16, torch.float16]}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("size", SAMPLED)
def test_sampling_takes_what_the_manual_says(size, precision):
    manual = Path(memory.__file__).parent.parent / "video" / "README.md"
    [row] = [x for x in manual.read_text().splitlines() if size in x and f"| {precision}" in x]
    said = [float(cell) for cell in row.split("|")[3:7]]
    for dtype in HALVES[precision]:
        weights, step, decoding = count_sampling(SAMPLED[size], dtype)
        counted = [weights, step, decoding, weights + max(step, decoding) + 0.5]
        assert said == pytest.approx(counted, abs=0.006)
