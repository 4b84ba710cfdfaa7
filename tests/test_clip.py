"""CLIP's tokenizer and text tower against transformers' answers and their own promises.

`golden/clip_text_*.npz` hold the answers of a small tower whose weights are a formula of their
names; `golden/tokenizer/` holds a small vocabulary and the ids of texts that are easy to get wrong.
"""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from reference import HERE, difference, formula_weight, golden

from tinydance.clip import (
    END,
    LENGTH,
    START,
    TextConfig,
    TextTower,
    Tokenizer,
    split_words,
)
from tinydance.weights import pick
from tinydance.weights.files import read_config
from tinydance.weights.safetensors import load_safetensors, save_safetensors

GOLDEN = HERE / "golden"
CASES = json.loads((GOLDEN / "tokenizer" / "expected.json").read_text(encoding="utf-8"))["cases"]
SMALL = TextConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
)


def golden_tower(activation, prefix=""):
    """(the tower, the reference's arrays)"""
    config, keys, arrays = golden(f"clip_text_{activation}")
    tower = TextTower(TextConfig(**pick(config, TextConfig)))
    weights = {name: torch.from_numpy(formula_weight(name, keys[name])) for name in keys}
    tower.load({prefix + name: tensor for name, tensor in weights.items()})
    return tower.eval(), arrays


def small_tower(**changes):
    torch.manual_seed(0)
    return TextTower(replace(SMALL, **changes)).eval()


@pytest.fixture
def tokenizer():
    return Tokenizer.from_folder(GOLDEN / "tokenizer")


# ---- text tower ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_every_layer_answers_as_the_reference(activation):
    tower, golden = golden_tower(activation)
    layers = []
    for block in tower.text_model["encoder"]["layers"]:
        block.register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))
    tower.text_model["final_layer_norm"].register_forward_pre_hook(
        lambda module, inputs: layers.append(inputs[0])
    )
    c_text = tower(golden["ids"])
    assert difference(c_text, golden["last_hidden_state"]) < 1e-4
    assert len(layers) == len(golden["hidden_states"])
    for ours, theirs in zip(layers, golden["hidden_states"]):
        assert difference(ours, theirs) < 1e-4


@torch.no_grad()
def test_the_two_activations_are_not_the_same():
    assert (
        difference(
            golden_tower("gelu")[1]["last_hidden_state"],
            golden_tower("quick_gelu")[1]["last_hidden_state"],
        )
        > 1e-3
    )


def test_files_with_and_without_the_prefix_and_whole_checkpoints_load_alike():
    bare, _ = golden_tower("gelu")
    for prefix in ("text_model.", "cond_stage_model.transformer.text_model."):
        other, _ = golden_tower("gelu", prefix)
        for name, tensor in bare.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])


def test_the_position_ids_of_old_files_are_dropped():
    tower = small_tower()
    tower.load({**tower.state_dict(), "text_model.embeddings.position_ids": torch.arange(12)[None]})


def test_a_tower_of_another_size_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="of another shape"):
        small_tower().load(small_tower(hidden_size=32).state_dict())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model."])
def test_openclips_names_load_and_the_last_block_is_left_out(prefix):
    # the same weights written the way of OpenCLIP, from a tower with one more block
    tower, file = small_tower(num_hidden_layers=3), {}
    own = {name.removeprefix("text_model."): t for name, t in tower.state_dict().items()}
    file["token_embedding.weight"] = own["embeddings.token_embedding.weight"]
    file["positional_embedding"] = own["embeddings.position_embedding.weight"]
    for i in range(3):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            file[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                [own[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
            for a, b in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("attn.out_proj", "self_attn.out_proj"),
            ):
                file[f"{theirs}.{a}.{kind}"] = own[f"{ours}.{b}.{kind}"]
            file[f"ln_final.{kind}"] = own[f"final_layer_norm.{kind}"]
    file["text_projection"], file["logit_scale"] = torch.zeros(16, 8), torch.tensor(1.0)

    shorter = small_tower()
    shorter.load({prefix + name: tensor for name, tensor in file.items()})
    tower.text_model["encoder"]["layers"] = tower.text_model["encoder"]["layers"][:2]
    ids = torch.randint(50, (2, 12))
    assert difference(shorter(ids), tower(ids)) == 0


@torch.no_grad()
def test_a_later_token_does_not_change_what_comes_before_it():
    tower, ids = small_tower(), torch.randint(50, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 50
    before, after = tower(ids), tower(changed)
    assert difference(before[:, :7], after[:, :7]) == 0
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 0


@torch.no_grad()
def test_a_saved_tower_answers_as_before(tmp_path):
    tower, ids = small_tower(hidden_act="gelu"), torch.randint(50, (2, 12))
    tower.save(tmp_path)
    loaded = TextTower.from_folder(tmp_path)
    assert loaded.config == tower.config
    assert difference(loaded(ids), tower(ids)) == 0


@torch.no_grad()
def test_half_precision_is_for_the_disk_only(tmp_path):
    tower, ids = small_tower(), torch.randint(50, (2, 12))
    tower.save(tmp_path, torch.float16)
    on_disk = load_safetensors(tmp_path / "model.safetensors")
    assert {t.dtype for t in on_disk.values()} == {torch.float16}
    loaded = TextTower.from_folder(tmp_path)
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    assert 0 < difference(loaded(ids), tower(ids)) < 1e-2
    assert {t.dtype for t in tower.parameters()} == {torch.float32}


def test_the_files_on_the_disk_are_named_as_the_hub_names_them(tmp_path):
    small_tower().save(tmp_path)
    names = load_safetensors(tmp_path / "model.safetensors").keys()
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    assert "text_model.embeddings.position_embedding.weight" in names
    assert len(names) == 2 + 2 * 16 + 2
    assert read_config(tmp_path)["architectures"] == ["CLIPTextModel"]
    assert read_config(tmp_path)["model_type"] == "clip_text_model"


def test_unknown_keys_of_a_config_are_ignored_but_not_a_strange_activation(tmp_path):
    tower = small_tower()
    config = asdict(tower.config) | {"projection_dim": 512, "torch_dtype": "float16"}
    save_safetensors(tower.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TextTower.from_folder(tmp_path).config == tower.config
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="relu"):
        TextTower.from_folder(tmp_path)


def test_a_text_that_is_longer_than_the_positions_is_an_error():
    with pytest.raises(ValueError, match="13 tokens"):
        small_tower()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    "sizes, count",
    [
        (
            dict(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            ),
            123_060_480,
        ),
        (
            dict(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
            ),
            340_387_840,
        ),
    ],
)
def test_the_towers_of_stable_diffusion_1_and_2_have_their_published_size(sizes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in TextTower(TextConfig(**sizes)).parameters()) == count


# ---- tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"][:20]))
def test_a_text_has_the_ids_that_the_reference_gives_it(case, tokenizer):
    ids = tokenizer([case["text"]])
    assert ids.shape == (1, LENGTH) and ids.dtype == torch.int64
    assert ids[0].tolist() == case["ids"]


def test_a_list_of_texts_is_the_rows_of_each(tokenizer):
    texts = [case["text"] for case in CASES]
    assert torch.equal(tokenizer(texts), torch.cat([tokenizer([text]) for text in texts]))
    assert tokenizer([]).shape == (0, LENGTH)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A polar bear's ears!", ["a", "polar", "bear", "'s", "ears", "!"]),
        ("42 x2", ["4", "2", "x", "2"]),
        ("they'll; don't", ["they", "'ll", ";", "don", "'t"]),
        ("wow!'s", ["wow", "!'", "s"]),
        ("a\u2003b\x85c\u200bd", ["a", "b", "c", "\u200b", "d"]),
        ("e\u0301 \u0391\u03a3", ["\u00e9", "\u03b1\u03c3"]),
        (" \n\t", []),
    ],
)
def test_words_are_cut_where_clips_pattern_cuts_them(text, words):
    assert split_words(text) == words


def folder_with_pad(tmp_path, tokenizer, **pads):
    """The golden vocabulary with pad tokens named in the two small files."""
    tokenizer.save(tmp_path)
    for name in ("tokenizer_config", "special_tokens_map"):
        (tmp_path / f"{name}.json").unlink()
        if name in pads:
            (tmp_path / f"{name}.json").write_text(json.dumps({"pad_token": pads[name]}))
    return Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "pads, symbol",
    [
        ({}, END),
        ({"special_tokens_map": END}, END),
        ({"special_tokens_map": {"content": "!"}}, "!"),
        ({"tokenizer_config": "!"}, "!"),
        ({"tokenizer_config": None}, END),
        ({"tokenizer_config": END, "special_tokens_map": "!"}, "!"),
    ],
)  # as in Stable Diffusion 2.x
def test_the_folder_says_what_pads_and_else_it_is_the_end_token(pads, symbol, tmp_path, tokenizer):
    ids = folder_with_pad(tmp_path, tokenizer, **pads)(["red"])[0].tolist()
    vocab = tokenizer.vocab
    assert ids == [vocab[START], vocab["red</w>"], vocab[END], *[vocab[symbol]] * 74]


def test_an_exclamation_mark_keeps_its_own_id_where_it_is_also_the_padding(tmp_path, tokenizer):
    padded = folder_with_pad(tmp_path, tokenizer, special_tokens_map="!")
    vocab = tokenizer.vocab
    assert padded.pad_id == 0 == vocab["!"]
    assert padded(["red!"])[0, 1:4].tolist() == [vocab["red</w>"], vocab["!</w>"], vocab[END]]


def test_a_pad_token_that_is_not_in_the_vocabulary_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="<pad>"):
        folder_with_pad(tmp_path, tokenizer, special_tokens_map="<pad>")


def test_a_long_text_keeps_its_end_token_and_says_what_it_lost(tokenizer):
    text = "red " * 75 + "Circle, bounces"
    ids = tokenizer([text])[0].tolist()
    assert ids[0] == tokenizer.start_id and ids[-1] == tokenizer.end_id
    assert ids[1:-1] == [tokenizer.vocab["red</w>"]] * 75
    assert tokenizer.dropped_words(text) == "circle , bounces"
    assert tokenizer.dropped_words("red " * 75) == tokenizer.dropped_words("") == ""


def test_a_word_that_is_cut_in_its_middle_counts_as_dropped(tokenizer):
    assert tokenizer.dropped_words("red " * 74 + "xyz") == "xyz"


def test_any_unicode_is_encoded_and_never_an_error(tokenizer):
    rng = random.Random(0)
    texts = [
        "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30))) for _ in range(500)
    ]  # half surrogates and unassigned characters included
    ids = tokenizer(texts + ["\x00", "\ud800", "x" * 10_000, "red " * 2_500])
    assert ids.shape == (504, LENGTH)
    assert 0 <= ids.min() and ids.max() < len(tokenizer.vocab)
    assert ((ids == tokenizer.end_id).sum(1) >= 1).all()


def test_a_saved_tokenizer_is_read_back_equal(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert (loaded.vocab, loaded.merges, loaded.pad_id) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.pad_id,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (tmp_path / "merges.txt").read_text().split() == (
        GOLDEN / "tokenizer" / "merges.txt"
    ).read_text().split()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [None, '{"a": 0}', "a b c\n", "q zz\n"])
def test_a_folder_that_lacks_a_file_or_contradicts_itself_is_an_error(
    name, content, tmp_path, tokenizer
):
    tokenizer.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=tmp_path.name):
        Tokenizer.from_folder(tmp_path)


def test_ids_that_leave_a_gap_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="not 0, 1, 2"):
        Tokenizer(tokenizer.merges, {**tokenizer.vocab, "zzz": 10_000})
