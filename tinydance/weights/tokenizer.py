"""A CLIP tokenizer's folder, as transformers' CLIPTokenizer has it [hub format]: vocab.json,
merges.txt, and the pad token in two files beside them. Not here: `tokenizer.json`, the one file
that newer libraries write in place of these; how a text becomes ids (`clip.py`)."""

from pathlib import Path

from tinydance.weights.files import read_json, whole_file, write_json
from tinydance.weights.untrusted import check_types, read_text, reading

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens per text, start and end included [CLIP]


def read_tokenizer(folder) -> dict:
    """Return the arguments of `clip.Tokenizer`. Raises ValueError naming the file at fault.
    SD 2.x names "!" (id 0) as its pad token. transformers then turns every "!" of a prompt into id
    0, which the tower never met there in training; here id 0 only pads."""
    folder = Path(folder)
    vocab = read_json(folder / "vocab.json")
    with reading(folder / "vocab.json"):
        check_types(vocab, dict.fromkeys(vocab, int))
    with reading(folder / "merges.txt"):
        lines = read_text(folder / "merges.txt").split("\n")
        lines = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
        merges = [(left, right) for left, right in map(str.split, lines)]
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
