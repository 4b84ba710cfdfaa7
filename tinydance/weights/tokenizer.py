"""CLIP's tokenizer in its three forms: vocab.json and merges.txt [hub format]; the tokenizer.json
that transformers 5 writes in their place; the one file of OpenAI and OpenCLIP. The pad token stands
in two files beside the first two. Not here: how a text becomes ids (`clip.py`)."""

import gzip
from pathlib import Path

from tinydance.weights.files import read_json, whole_file, write_json
from tinydance.weights.untrusted import MAX_TEXT, check_types, open_file, read_text, reading

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens per text, start and end included [CLIP]
ORIGINAL, MERGES = "bpe_simple_vocab_16e6.txt.gz", 49_152 - 2 * 256 - 2  # of its lines, the used


def make_byte_symbols() -> dict[int, str]:
    """The 256 characters that stand for the 256 bytes, in the order of their ids [CLIP].

    Printable bytes stand for themselves; the others borrow the characters from 256 on, so that no
    symbol is a space or a control character and a text file can hold the vocabulary.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_SYMBOLS = make_byte_symbols()


def read_tokenizer(path) -> dict:
    """Return the arguments of `clip.Tokenizer`: of a folder with any of the three forms, or of
    CLIP's own file. Raises ValueError naming the file at fault.
    SD 2.x names "!" (id 0) as its pad token. transformers then turns every "!" of a prompt into id
    0, which the tower never met there in training; here id 0 only pads."""
    folder = Path(path)
    original = folder / ORIGINAL if folder.is_dir() else folder
    if original.is_file():  # merges alone: CLIP's order gives the ids
        with reading(original), gzip.open(open_file(original)) as file:
            lines = file.read(MAX_TEXT).decode().split("\n")[1 : MERGES + 1]
            return {"merges": split_merges(lines)}
    if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists():
        with reading(folder / "tokenizer.json"):
            model = read_json(folder / "tokenizer.json")["model"]
            vocab, merges = model["vocab"], split_merges(model["merges"])
    else:
        vocab = read_json(folder / "vocab.json")
        with reading(folder / "merges.txt"):
            lines = read_text(folder / "merges.txt").split("\n")
            merges = split_merges(lines[lines[0].startswith("#version") :])
    with reading(folder):
        check_types(vocab, dict.fromkeys(vocab, int))
    pad, length = END, LENGTH
    files = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    for known in map(read_json, filter(Path.is_file, files)):  # the second one wins
        pad = known.get("pad_token") or pad
        length = min(known.get("model_max_length", length), LENGTH)
    pad = pad["content"] if isinstance(pad, dict) else pad
    if pad not in vocab or length < 3:
        needs = "the vocabulary needs the pad token, and model_max_length 3"
        raise ValueError(f"{folder}: {pad!r:.100}, {length!r:.20}: {needs}")
    return {"vocab": vocab, "merges": merges, "pad_id": vocab[pad], "length": length}


def split_merges(pairs: list) -> list[tuple[str, str]]:
    """Return [(left, right)] of lines "left right", as files have them, or of pairs."""
    pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs]
    return [(left, right) for left, right in filter(None, pairs)]


def write_tokenizer(folder, vocab: dict[str, int], merges, pad_id: int, length: int) -> None:
    """Write the folder that `read_tokenizer` and transformers read."""
    folder = Path(folder)
    pad = next(symbol for symbol, i in vocab.items() if i == pad_id)
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {**specials, "tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    config |= {"do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    write_json(folder / "vocab.json", vocab)
    write_json(folder / "special_tokens_map.json", specials)
    write_json(folder / "tokenizer_config.json", config)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    with whole_file(folder / "merges.txt") as file:
        file.write("\n".join(lines).encode())
