"""CLIP: the byte-pair tokenizer, the text tower that turns ids into c_text, and the image tower.

The text instruction reaches PixelDance through a pretrained CLIP text encoder that stays frozen
[paper §3.1]. With Stable Diffusion 2.x and ModelScope that is OpenCLIP's ViT-H without its last
block, with 1.x OpenAI's ViT-L: the same code, told apart by config.json.

    list of str -> Tokenizer -> ids (n, 77) -> TextTower -> c_text (n, 77, d)

The image tower serves measures (`metrics/`). Not here: how a small text tower is trained.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.weights import build, load_into, read_part, reading, save_weights
from tinydance.weights.diffusers import write_text_config
from tinydance.weights.ldm import text_from_any
from tinydance.weights.tokenizer import (
    BYTE_SYMBOLS,
    END,
    LENGTH,
    START,
    read_tokenizer,
    write_tokenizer,
)

MAX_WORD = 1000  # bytes of a word that are read [ours]
CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")


# ------------------------------------------------------------------------------------ the tokenizer
def split_words(text: str) -> list[str]:
    r"""The words of a text: runs of letters, single digits, runs of other signs, 's and 'll [CLIP].

    transformers cleans (NFC, lower case) and then has CLIP's regular expression,
        's|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
    but Python's `re` does not know \p{L}, so this goes by the categories of `unicodedata`.
    """
    # One character at a time: lower() of a whole string treats a final Greek sigma apart.
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    # A letter for each character. Unicode's categories begin with L for letters, N for numbers and
    # Z for spaces; all other signs count as P. It calls tabs and line ends controls: here spaces.
    kinds = ["Z" if char in "\t\n\v\f\r\x85" else unicodedata.category(char)[0] for char in text]
    kinds = "".join(kind if kind in "LNZ" else "P" for kind in kinds)
    words, begin = [], 0
    while begin < len(text):
        kind, end = kinds[begin], begin + 1
        contraction = CONTRACTION.match(text, begin)
        if contraction:
            end = contraction.end()
        elif kind in "LP":  # a run of its kind; a digit stays alone
            while end < len(text) and kinds[end] == kind:
                end += 1
        if kind != "Z":
            words.append(text[begin:end])
        begin = end
    return words


def merge_symbols(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of a word: join the pair of lowest rank until no pair is known [CLIP]."""
    # Half a surrogate pair, as file names may hold, has no bytes; it becomes "?". What a word of
    # many thousand letters has beyond the first would never fit, and the loop below is quadratic.
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", "replace")[:MAX_WORD]]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        pair = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if pair not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            is_pair = tuple(symbols[i : i + 2]) == pair
            joined.append("".join(pair) if is_pair else symbols[i])
            i += 2 if is_pair else 1
        symbols = joined
    return symbols


class Tokenizer:
    """Text to ids as transformers' CLIPTokenizer has them, but for "!": see `read_tokenizer`.

    merges: [(left, right)], first merged first; vocab: {symbol: id}, by default in CLIP's order;
    pad_id: fills up to `length` tokens, by default the end token. Raises ValueError where these do
    not belong together.
    """

    def __init__(self, merges, vocab=None, pad_id: int | None = None, length: int = LENGTH):
        self.merges, self.length = [tuple(pair) for pair in merges], length
        # bytes, bytes that end a word, merges, the two specials [CLIP]; two pairs may join to one
        # symbol, which gets one id
        needed = [*BYTE_SYMBOLS.values(), *(symbol + "</w>" for symbol in BYTE_SYMBOLS.values())]
        needed += [left + right for left, right in self.merges] + [START, END]
        order = {symbol: i for i, symbol in enumerate(dict.fromkeys(needed))}
        self.vocab = order if vocab is None else dict(vocab)
        needed += [symbol for pair in self.merges for symbol in pair]
        missing = [symbol for symbol in needed if symbol not in self.vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} symbols, such as {missing[0]!r}")
        if set(self.vocab.values()) != set(range(len(self.vocab))):
            raise ValueError(f"the {len(self.vocab)} ids of the vocabulary are not 0, 1, 2, ...")
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.start_id, self.end_id = self.vocab[START], self.vocab[END]
        self.pad_id = self.end_id if pad_id is None else pad_id

    @classmethod
    def from_folder(cls, path) -> "Tokenizer":
        """Read the hub's folder or CLIP's own file. Raises ValueError naming what is wrong."""
        with reading(path):
            return cls(**read_tokenizer(path))

    def save(self, path) -> None:
        write_tokenizer(path, self.vocab, self.merges, self.pad_id, self.length)

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Yield (word, its ids) of a text, without the start and end that the call adds.

        START and END, written out in a text, are themselves, as in transformers.
        """
        for part in re.split(f"({re.escape(START)}|{re.escape(END)})", text):
            if part in (START, END):
                yield part, [self.vocab[part]]
                continue
            for word in split_words(part):
                yield word, [self.vocab[symbol] for symbol in merge_symbols(word, self.ranks)]

    def __call__(self, texts: list[str]) -> Tensor:
        """List of n strings -> ids (n, length): start, the text as far as it fits, end, padding."""
        rows = torch.full((len(texts), self.length), self.pad_id)
        for row, text in zip(rows, texts):
            ids = (i for _, word_ids in self.words(text) for i in word_ids)
            ids = [*islice(ids, self.length - 2)]  # what is behind is not even merged
            row[: len(ids) + 2] = torch.tensor([self.start_id, *ids, self.end_id])
        return rows

    def dropped_words(self, text: str) -> str:
        """The words of a text that the call cuts, whole or in part, or "" [ours]."""
        dropped, used = [], 0
        for word, ids in self.words(text):
            used += len(ids)
            if used > self.length - 2:
                dropped.append(word)
        return " ".join(dropped)


# ---------------------------------------------------------------------------------- the text tower
def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of gelu; OpenCLIP has the exact one [CLIP]."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class TextConfig:
    """The tower's shape, in the words of transformers' CLIPTextConfig, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = LENGTH
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406  # the three ids are only kept for the file: no code here reads them
    eos_token_id: int = 49407
    pad_token_id: int = 1

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be in {list(ACTIVATIONS)}, not {self.hidden_act!r}")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")


class SelfAttention(nn.Module):
    """Multi-head self-attention; is_causal: a token sees itself and the tokens before it."""

    def __init__(self, width: int, heads: int, is_causal: bool):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # n l (heads d) -> n heads l d

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # n heads l d -> n l (heads d)


class MLP(nn.Module):
    def __init__(self, width: int, inner_width: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention, then two linear layers, each after a norm and added to its input [CLIP]."""

    def __init__(self, config: "TextConfig | ImageConfig", is_causal: bool):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads, is_causal)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTower(nn.Module):
    """CLIP's text transformer. Parameters are named as in the hub's files, `text_model.` included:
    the dicts of modules are there for these names."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config, width = config, config.hidden_size
        embeddings = {
            "token_embedding": nn.Embedding(config.vocab_size, width),
            "position_embedding": nn.Embedding(config.max_position_embeddings, width),
        }
        # Causal, as CLIP was trained: a token's vector never depends on the padding behind it.
        blocks = nn.ModuleList(Block(config, True) for _ in range(config.num_hidden_layers))
        parts = {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict({"layers": blocks}),
            "final_layer_norm": nn.LayerNorm(width, config.layer_norm_eps),
        }
        self.text_model = nn.ModuleDict(parts)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, l) -> c_text (n, l, d), after the final layer norm. ValueError: l too large."""
        embeddings = self.text_model["embeddings"]
        positions = embeddings["position_embedding"].weight
        if ids.shape[1] > len(positions):
            raise ValueError(f"{ids.shape[1]} tokens are above this tower's {len(positions)}")
        x = embeddings["token_embedding"](ids) + positions[: ids.shape[1]]  # n l -> n l d
        for block in self.text_model["encoder"]["layers"]:
            x = block(x)
        # Every position, and not only the end token's, which CLIP compares with images: the UNet's
        # cross-attention reads words, no summary. Padding is read as well [SD].
        return self.text_model["final_layer_norm"](x)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors of the hub's files, of OpenCLIP, or of a whole LDM checkpoint with either.
        Raises ValueError listing what does not fit."""
        load_into(self, text_from_any(tensors, self.config.num_hidden_layers))

    @classmethod
    def from_folder(cls, path) -> "TextTower":
        """Read the tower of a folder in the hub's layout, in float32 [hub format].

        Raises ValueError where files are missing or weights do not fit the config.
        """
        file = f"{path}/config.json"
        return read_part(path, lambda config: cls(build(TextConfig, config, file)))

    def save(self, path, dtype: torch.dtype | None = None) -> None:
        """Write the folder as transformers has it [hub format]; dtype: of the weights on disk."""
        config = write_text_config(asdict(self.config))
        save_weights(path, config, self.state_dict(), dtype, name="model")


# --------------------------------------------------------------------------------- the image tower
@dataclass(frozen=True)
class ImageConfig:
    """The tower's shape, in the words of transformers' CLIPVisionConfig, with its defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    __post_init__ = TextConfig.__post_init__  # the same checks


class ImageTower(nn.Module):
    """CLIP's image transformer: a token for each patch, behind one for the whole picture [CLIP]."""

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config, width, patch = config, config.hidden_size, config.patch_size
        embeddings = nn.Module()
        embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        embeddings.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        blocks = nn.ModuleList(Block(config, False) for _ in range(config.num_hidden_layers))
        norms = (nn.LayerNorm(width, config.layer_norm_eps) for _ in range(2))
        parts = {"embeddings": embeddings, "encoder": nn.ModuleDict({"layers": blocks})}
        parts |= zip(("pre_layrnorm", "post_layernorm"), norms)  # misspelt in every published file
        self.vision_model = nn.ModuleDict(parts)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1], resized to the tower's size -> tokens (n, 1 + p, d)."""
        size, model = 2 * (self.config.image_size,), self.vision_model
        x = F.interpolate((pixels + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - x.new_tensor(self.MEAN)[:, None, None]) / x.new_tensor(self.STD)[:, None, None]
        parts = model["embeddings"]
        patches = parts.patch_embedding(x).flatten(2).transpose(1, 2)  # n p d
        x = torch.cat([parts.class_embedding.expand(len(x), 1, -1), patches], 1)
        x = x + parts.position_embedding.weight
        x = model["pre_layrnorm"](x)
        for block in model["encoder"]["layers"]:
            x = block(x)
        return x

    def summarise(self, tokens: Tensor) -> Tensor:
        """Tokens (n, 1 + p, d) -> a vector for each picture (n, d)."""
        return self.vision_model["post_layernorm"](tokens[:, 0])
