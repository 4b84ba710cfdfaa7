"""CLIP's two text parts: the byte-pair tokenizer, and the text tower that turns ids into c_text.

The text instruction reaches PixelDance through a pretrained CLIP text encoder that stays frozen
[paper section 3.1]. With Stable Diffusion 2.x and ModelScope that is OpenCLIP's ViT-H without its
last block, with 1.x OpenAI's ViT-L: the same code, told apart by config.json.

    list of str -> Tokenizer -> ids (n, 77) -> TextTower -> c_text (n, 77, d)

Read `vae.py` before this file and `weights.py` after it. Not here: the image tower, and the
projection into the space that text and images share, neither of which PixelDance uses.
"""

import inspect
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.weights.files import read_config, read_json, whole_file, write_config, write_json
from tinydance.weights.ldm import text_from_openclip
from tinydance.weights.load import load_into, load_weights
from tinydance.weights.safetensors import save_safetensors

# ---- tokenizer -----------------------------------------------------------------------------------

LENGTH = 77  # tokens per text, the two specials included [CLIP]


START, END = "<|startoftext|>", "<|endoftext|>"


CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")


def byte_symbols() -> dict[int, str]:
    """The 256 characters that stand for the 256 bytes, in the order of their ids [CLIP].

    Printable bytes stand for themselves; the others borrow the characters from 256 on, so that no
    symbol is a space or a control character and a text file can hold the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


BYTE_SYMBOLS = byte_symbols()


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters, single digits, runs of other signs, 's and 'll [CLIP].

    transformers cleans (NFC, lower case) and then has CLIP's regular expression,
        's|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+
    but Python's `re` does not know \\p{L}, so this goes by the categories of `unicodedata`."""
    # one character at a time: lower() of a whole string treats a final Greek sigma apart
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    kinds = ["Z" if char in "\t\n\v\f\r\x85" else unicodedata.category(char)[0] for char in text]
    kinds = "".join(kind if kind in "LNZ" else "P" for kind in kinds)
    words, begin = [], 0
    while begin < len(text):
        kind, end = kinds[begin], begin + 1
        contraction = CONTRACTION.match(text, begin)
        if contraction:
            end = contraction.end()
        elif kind in "LP":
            while end < len(text) and kinds[end] == kind:
                end += 1
        if kind != "Z":
            words.append(text[begin:end])
        begin = end
    return words


def merge_symbols(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of a word: joins the pair of lowest rank until no pair is known [CLIP]."""
    # half a surrogate pair, as file names may hold, has no bytes; it becomes "?"
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", "replace")]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        pair = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if pair not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            here = tuple(symbols[i:i + 2]) == pair
            joined.append("".join(pair) if here else symbols[i])
            i += 2 if here else 1
        symbols = joined
    return symbols


class Tokenizer:
    """Text to ids as transformers' CLIPTokenizer has them, but for "!": see `from_folder` [CLIP].

    vocab: {symbol: id}; merges: [(left, right)], first merged first; pad_id: fills up to `length`
    tokens, by default the end token. ValueError where these do not belong together."""

    def __init__(self, vocab: dict[str, int], merges, pad_id: int | None = None,
                 length: int = LENGTH):
        self.vocab, self.merges = dict(vocab), [tuple(pair) for pair in merges]
        self.length = length
        needed = [START, END, *BYTE_SYMBOLS.values(), *(s + "</w>" for s in BYTE_SYMBOLS.values())]
        needed += [symbol for left, right in self.merges for symbol in (left, right, left + right)]
        lacking = [symbol for symbol in needed if symbol not in self.vocab]
        if lacking:
            raise ValueError(f"the vocabulary lacks {len(lacking)} symbols, such as {lacking[0]!r}")
        if set(self.vocab.values()) != set(range(len(self.vocab))):
            raise ValueError(f"the {len(self.vocab)} ids of the vocabulary are not 0, 1, 2, ...")
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.start_id, self.end_id = self.vocab[START], self.vocab[END]
        self.pad_id = self.end_id if pad_id is None else pad_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads vocab.json, merges.txt, and the pad token from the files beside them [hub format].

        SD 2.x names "!" (id 0) as its pad token. transformers then turns every "!" of a prompt
        into id 0, which the tower never met there in training; here id 0 only pads.
        ValueError names the file at fault."""
        folder = Path(folder)
        vocab = read_json(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / 'merges.txt'}: cannot read: {error}") from error
        lines = [line for line in lines[lines[0].startswith("#version"):] if line.strip()]
        merges = [tuple(line.split()) for line in lines]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{folder / 'merges.txt'}: a line is not two symbols")
        pad, length = END, LENGTH
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second one wins
            if (folder / name).is_file():
                known = read_json(folder / name)
                pad = known.get("pad_token") or pad
                length = min(known.get("model_max_length", length), LENGTH)
        pad = pad["content"] if isinstance(pad, dict) else pad
        if pad not in vocab:
            raise ValueError(f"{folder}: the pad token {pad!r} is not in vocab.json")
        try:
            return cls(vocab, merges, vocab[pad], length)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `from_folder` and transformers read [hub format]."""
        folder = Path(folder)
        specials = {"bos_token": START, "eos_token": END, "unk_token": END,
                    "pad_token": next(s for s, i in self.vocab.items() if i == self.pad_id)}
        write_json(folder / "vocab.json", self.vocab)
        write_json(folder / "special_tokens_map.json", specials)
        write_json(folder / "tokenizer_config.json", {
            **specials, "tokenizer_class": "CLIPTokenizer", "model_max_length": self.length,
            "do_lower_case": True, "add_prefix_space": False, "errors": "replace"})
        with whole_file(folder / "merges.txt") as file:
            lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges), ""]
            file.write("\n".join(lines).encode())

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """[(word, its ids)] of a text, without the start and end that the call adds.

        The two specials, written out in a text, are themselves, as in transformers."""
        pairs = []
        for part in re.split(f"({re.escape(START)}|{re.escape(END)})", text):
            if part in (START, END):
                pairs.append((part, [self.vocab[part]]))
                continue
            for word in split_words(part):
                symbols = merge_symbols(word, self.ranks)
                pairs.append((word, [self.vocab[symbol] for symbol in symbols]))
        return pairs

    def __call__(self, texts: list[str]) -> Tensor:
        """List of n strings -> ids (n, length): start, the text as far as it fits, end, padding."""
        rows = torch.full((len(texts), self.length), self.pad_id)
        for row, text in zip(rows, texts):
            ids = [i for _, word_ids in self.words(text) for i in word_ids][:self.length - 2]
            row[:len(ids) + 2] = torch.tensor([self.start_id, *ids, self.end_id])
        return rows

    def dropped_words(self, text: str) -> str:
        """The words of a text that the call cuts, whole or in part, or "" [ours]."""
        dropped, used = [], 0
        for word, ids in self.words(text):
            used += len(ids)
            if used > self.length - 2:
                dropped.append(word)
        return " ".join(dropped)


# ---- text tower ----------------------------------------------------------------------------------

def quick_gelu(x):
    """OpenAI's approximation of gelu; OpenCLIP has the exact one [CLIP]."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class TextBlock(nn.Module):
    """Causal attention, then two linear layers, each after a norm and added to its input [CLIP]."""

    def __init__(self, width: int, inner_width: int, heads: int, activation: str, eps: float):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width)
                                        for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner_width),
                                  "fc2": nn.Linear(inner_width, width)})

    def forward(self, x):
        attn, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))  # n l d -> n heads l d/heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn["out_proj"](y.transpose(1, 2).flatten(2))  # n heads l d/heads -> n l d
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class TextTower(nn.Module):
    """CLIP's text transformer. Parameters are named as in the hub's files, `text_model.` included.

    The arguments are the keys of transformers' CLIPTextConfig, with its defaults; `self.config` has
    them. The token ids are only kept: c_text is every position, padding is not masked [CLIP]."""

    def __init__(self, vocab_size: int = 49408, hidden_size: int = 512,
                 intermediate_size: int = 2048, num_hidden_layers: int = 12,
                 num_attention_heads: int = 8, max_position_embeddings: int = LENGTH,
                 hidden_act: str = "quick_gelu",
                 layer_norm_eps: float = 1e-5, bos_token_id: int = 49406,
                 eos_token_id: int = 49407, pad_token_id: int = 1):
        super().__init__()
        self.config = dict(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
            max_position_embeddings=max_position_embeddings, hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            pad_token_id=pad_token_id)
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be in {list(ACTIVATIONS)}, not {hidden_act!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of "
                             f"num_attention_heads {num_attention_heads}")
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(vocab_size, hidden_size),
                "position_embedding": nn.Embedding(max_position_embeddings, hidden_size)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                TextBlock(hidden_size, intermediate_size, num_attention_heads, hidden_act,
                          layer_norm_eps)
                for _ in range(num_hidden_layers))}),
            "final_layer_norm": nn.LayerNorm(hidden_size, layer_norm_eps)})
        self.reset_parameters()

    def reset_parameters(self):
        """CLIP's initialisation, for a tower trained from nothing, like the toy's [CLIP]."""
        width, depth = self.config["hidden_size"], self.config["num_hidden_layers"]
        nn.init.normal_(self.text_model["embeddings"]["token_embedding"].weight, std=0.02)
        nn.init.normal_(self.text_model["embeddings"]["position_embedding"].weight, std=0.01)
        for block in self.text_model["encoder"]["layers"]:
            residual = (2 * depth * width) ** -0.5  # 2 * depth branches are summed
            for linear, std in ((block.self_attn["q_proj"], width ** -0.5),
                                (block.self_attn["k_proj"], width ** -0.5),
                                (block.self_attn["v_proj"], width ** -0.5),
                                (block.self_attn["out_proj"], residual),
                                (block.mlp["fc1"], (2 * width) ** -0.5),
                                (block.mlp["fc2"], residual)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, l) -> c_text (n, l, d), after the final layer norm. ValueError: l too large."""
        embeddings = self.text_model["embeddings"]
        positions = embeddings["position_embedding"].weight
        if ids.shape[1] > len(positions):
            raise ValueError(f"{ids.shape[1]} tokens are above this tower's {len(positions)}")
        x = embeddings["token_embedding"](ids) + positions[:ids.shape[1]]
        for block in self.text_model["encoder"]["layers"]:
            x = block(x)
        return self.text_model["final_layer_norm"](x)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors of the hub's files, with or without `text_model.`, of OpenCLIP, or of a
        whole LDM checkpoint with either. ValueError tells what does not fit."""
        if any(name.endswith("transformer.resblocks.0.ln_1.weight") for name in tensors):
            tensors = text_from_openclip(tensors, self.config["num_hidden_layers"])
        ldm = "cond_stage_model.transformer."
        if any(name.startswith(ldm) for name in tensors):
            tensors = {n.removeprefix(ldm): t for n, t in tensors.items() if n.startswith(ldm)}
        # `position_ids` is 0 ... 76, kept by old files; transformers 5 writes no prefix
        load_into(self, {"text_model." + name.removeprefix("text_model."): tensor
                         for name, tensor in tensors.items() if not name.endswith("position_ids")})

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TextTower":
        """The tower in a folder of the hub's layout, in float32 [hub format]. ValueError: files are
        missing, weights do not fit the config, or its `hidden_act` is not one of ours."""
        config, ours = read_config(folder), inspect.signature(cls).parameters
        tower = cls(**{key: value for key, value in config.items() if key in ours})
        tower.load(load_weights(folder))
        return tower

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors as transformers has them [hub format]; `dtype`,
        such as torch.float16, is that on the disk alone."""
        write_config(folder, {**self.config, "architectures": ["CLIPTextModel"],
                              "model_type": "clip_text_model"})
        tensors = {name: t.to(dtype or t.dtype) for name, t in self.state_dict().items()}
        save_safetensors(tensors, Path(folder) / "model.safetensors")
