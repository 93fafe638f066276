"""Tokenizers of others: ids as AutoTokenizer's, from text to samples and back into a tokenizer.json."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import TINY, lines
from test_layouts import SIZES, D, random_hf, refused, save_run, source
from test_tokenizer import train_by_hand
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import prepare_data
import sample
import train
from configurator import UserError
from lab import convert
from lab.page import make_page
from lab.run import open_run
from lab.tokenizer_json import for_transformers, read_tokenizer
from lab.words import token_text, word_id
from model import Backpack, BackpackConfig, load_checkpoint
from tokenizer import END, byte_characters, learn_bpe, load_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = "the in ship river Captain said feet naïve is of and sea was born it's 12 345, .".split()
ENGLISH = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(300)]
ODD = [
    "",
    " ",
    "  two  spaces ",
    "a\nb\n\n c\t",
    "日本語 🙂",
    "The [SEP] river</s> <s> <|end|> x",
    "Ünïcode É",
]


def word_piece():
    codec = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    codec.normalizer = normalizers.BertNormalizer()
    codec.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    codec.decoder = decoders.WordPiece()
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    codec.train_from_iterator(ENGLISH, trainers.WordPieceTrainer(vocab_size=400, special_tokens=names))
    codec.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    codec.enable_truncation(8)
    return codec


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(character, -9.0) for character in sorted(set("▁".join(WORDS)))]
    codec = Tokenizer(models.Unigram(pieces, unk_id=0))
    codec.normalizer = normalizers.NFKC()
    codec.pre_tokenizer = pre_tokenizers.Metaspace()
    codec.decoder = decoders.Metaspace()
    codec.add_special_tokens(["<unk>", "</s>"])
    return codec


def byte_bpe():
    """With words of its own, its end last, and tokens that somebody added."""
    codec = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+")
    words = pre_tokenizers.Split(pattern, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    codec.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    codec.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator(ENGLISH, trainer)
    codec.add_tokens(["river was"])
    codec.add_special_tokens(["<|end|>"])
    return codec


MADE = {"word_piece": (word_piece, "[SEP]"), "unigram": (unigram, "</s>"), "byte_bpe": (byte_bpe, "<|end|>")}


@pytest.fixture(params=MADE)
def theirs(request, tmp_path):
    """(a folder with a tokenizer of others, AutoTokenizer's of it, the token that ends a document)."""
    make, end = MADE[request.param]
    folder = tmp_path / "theirs"
    folder.mkdir()
    make().save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder, transformers.AutoTokenizer.from_pretrained(folder), end


def test_ids_are_those_of_auto_tokenizer(theirs):
    folder, auto, end = theirs
    ours = load_tokenizer(read_tokenizer(folder))
    assert ours.end == auto.convert_tokens_to_ids(end)
    assert ours.vocab_size == len(auto)
    for text in [*ENGLISH, *ODD]:
        ids = ours.encode(text)
        assert ids.dtype == np.int64
        assert ids.tolist() == auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == auto.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    documents = [*ENGLISH[:3], ""]
    expected = []
    for text in documents:
        expected += [*ours.encode(text).tolist(), ours.end]
    assert ours.encode(END.join(documents), special=True).tolist() == expected[:-1]
    word = word_id(ours, "said")
    assert token_text(ours, word) == "·said"
    assert word in ours.encode("The ship said")


def test_from_text_to_samples_and_back(theirs, tmp_path, capsys):
    folder, auto, end = theirs
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
    data = [f"--data_dir={tmp_path}", "--dataset=mine"]
    more = [f"--input={tmp_path / 't.jsonl'}", f"--tokenizer={folder}", "--num_proc=2"]
    prepare_data.main([*data, *more, "--val_fraction=0.1"])
    ids = np.fromfile(tmp_path / "mine/val.bin", "<u2").tolist()
    documents = auto.decode(ids, clean_up_tokenization_spaces=False).split(end)
    assert len(documents) > 10 and documents[-1] == ""
    train.main([*TINY, *data, f"--out_dir={tmp_path / 'run'}", "--max_iters=3", "--muon_lr=0"])
    assert "bits per byte" not in capsys.readouterr().out
    args = ["--num_samples=1", "--temperature=0", "--max_new_tokens=4", "--start=The river", "--device=cpu"]
    sample.main([f"--run={tmp_path / 'run'}", *args])
    run = open_run(tmp_path / "run", "cpu")
    start = torch.tensor(run.tokenizer.encode("The river"))[None]
    new = run.model.generate(start, 4, temperature=0)[0].tolist()
    whole = auto.decode(new, clean_up_tokenization_spaces=False)
    said = whole[len(auto.decode(start[0].tolist())) :].partition(end)[0]
    assert f"The river{said}\n" in capsys.readouterr().out
    assert "river" in make_page(run, ["river"], "The")
    # out into a folder for transformers, and back
    convert.main([f"--source={tmp_path / 'run'}", "--to=hf", f"--dest={tmp_path / 'hf'}"])
    name = "tokenizer.json"
    assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    plain = {"add_special_tokens": False}
    assert [again.encode(t, **plain) for t in ENGLISH] == [auto.encode(t, **plain) for t in ENGLISH]
    assert again.eos_token == end
    convert.main([f"--source={tmp_path / 'hf'}", f"--dest={tmp_path / 'back'}"])
    specs = [load_checkpoint(tmp_path / name)["meta"]["tokenizer"] for name in ("run", "back")]
    assert specs[0] == specs[1] == read_tokenizer(folder)


@pytest.mark.parametrize("kind", ["char", "bpe", "old bpe", "gpt2"])
def test_ours_as_a_file_and_back(kind, tmp_path):
    """The same ids, also for prepare_data.py, and the same kind, so that a run fits its dataset."""
    texts = lines(60)
    spec = {"kind": "gpt2"}
    if kind == "char":
        spec = {"kind": "char", "chars": "".join(sorted(set("".join(texts))))}
    if kind == "bpe":
        spec = learn_bpe(texts, 400)
    if kind == "old bpe":  # it cuts words as GPT-2 does
        spec = {"kind": "bpe", "model": train_by_hand(texts, 400)}
    if kind != "char":
        texts.append("It's 2,000 naïve 漢字 🙂\n\n  x\t किताब كِتَابٌ 1\u0301 ")
    own = load_tokenizer(spec)
    written = for_transformers(own)
    found = Tokenizer.from_str(written)
    for text in texts:
        ids = found.encode(text).ids
        assert ids == own.encode(text).tolist()
        assert found.decode(ids) == text
    (tmp_path / "tokenizer.json").write_text(written)
    assert prepare_data.given_tokenizer(str(tmp_path / "tokenizer.json")) == spec


def learned(key=None, value=None):
    """The tokenizer.json of a learned BPE, parsed; with another value for a key."""
    parsed = learn_bpe(ENGLISH, 300)["model"]
    return parsed | ({key: value} if key else {})


# the tokenizers library ends in a panic of Rust
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def changed(what):
    """A learned BPE of which something is changed, so that it is not ours."""
    parsed = learned()
    if what == "merges":  # in another order
        parsed["model"]["merges"].reverse()
    elif what == "normalizer":
        parsed["normalizer"] = {"type": "Lowercase"}
    elif what == "words":
        parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r" ?\p{L}+|[^\p{L}]"
    elif what == "added":
        token = parsed["added_tokens"][0]
        parsed["added_tokens"].append(token | {"id": 300, "content": "ship", "special": False})
    return parsed


@pytest.mark.parametrize("what", ["merges", "normalizer", "words", "added"])
def test_what_is_almost_ours_has_its_own_ids(what, tmp_path):
    parsed = changed(what)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    spec = read_tokenizer(tmp_path)
    assert spec["kind"] == "library"
    library = Tokenizer.from_str(json.dumps(parsed))
    ours = load_tokenizer(spec)
    for text in ENGLISH:
        assert ours.encode(text).tolist() == library.encode(text).ids


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": null}', "is not a tokenizer.json"),
        (
            '{"model": {"type": "WordLevel", "vocab": {"a": "b"}, "unk_token": "a"}}',
            "is not a tokenizer.json",
        ),
        ('{"model": {"type": "WordLevel", "vocab": {"ab": 0}, "unk_token": "ab"}}', "has no token '<|endof"),
        ('{"model": {"type": "Unigram", "vocab": [], "unk_id": 4}}', "is not a tokenizer.json"),
        ("[" * 100_000, "is not a tokenizer.json"),
        (json.dumps(learned("normalizer", PANICS)), "is not a tokenizer.json: PanicException"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, content, message):
    folder = source(tmp_path / "hf", random_hf())
    (folder / "tokenizer.json").write_text(content)
    refused(tmp_path, folder, f"tokenizer.json {message}".replace("|", r"\|"))


def test_an_end_is_found_or_given(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_bpe().save(str(path))
    with pytest.raises(UserError, match="has no token .*: give one that it has by --end_token=TOKEN"):
        read_tokenizer(path)
    with pytest.raises(UserError, match="has no token 'x y' to end a document"):
        read_tokenizer(path, "x y")
    assert read_tokenizer(path, "<|end|>")["end"] == "<|end|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    assert read_tokenizer(path)["end"] == "<|end|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}')
    with pytest.raises(UserError, match="has no token"):
        read_tokenizer(path)


# -----------------------------------------------------------------------------
# the tokenizer of weights of others


def gpt2_source(folder, rows):
    """A GPT-2 of one layer whose E has so many rows, as transformers saves it."""
    sizes = {"n_embd": D, "n_layer": 1, "n_head": 3, "n_positions": 8}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, **sizes))
    net.save_pretrained(folder)
    return folder


def imported_tokenizer(folder, tmp_path, *args):
    convert.main([f"--source={folder}", f"--dest={tmp_path / 'run'}", "--overwrite", *args])
    meta = load_checkpoint(tmp_path / "run")["meta"]
    return load_tokenizer(meta["tokenizer"]), meta["vocab_size"]


def test_a_gpt2_of_another_language(tmp_path, monkeypatch):
    """It has as many tokens as GPT-2, and none of them is taken for GPT-2's."""
    codec = byte_bpe()
    V = codec.get_vocab_size()
    folder = gpt2_source(tmp_path / "theirs", V)
    (folder / "vocab.json").write_text(json.dumps(codec.get_vocab()))
    with monkeypatch.context() as patch:
        patch.setattr(convert, "GPT2_ROWS", (V,))  # as 50,257 take seconds
        with pytest.raises(UserError, match="vocab.json is not GPT-2's vocabulary: make a tokenizer.json"):
            imported_tokenizer(folder, tmp_path)
        codec.save(str(folder / "tokenizer.json"))
        ours, size = imported_tokenizer(folder, tmp_path, "--end_token=<|end|>")
    assert ours.decode(codec.encode("The river is wide").ids) == "The river is wide"
    assert size == V
    folder = gpt2_source(tmp_path / "gpt2", 50257)
    (folder / "vocab.json").write_text(json.dumps(gpt2_vocabulary()))
    ours, _ = imported_tokenizer(folder, tmp_path)
    assert ours.spec == {"kind": "gpt2"}


def gpt2_vocabulary():
    """What GPT-2's own vocab.json says: each token, its bytes written as characters."""
    character = {byte: char for char, byte in byte_characters().items()}
    codec = load_tokenizer({"kind": "gpt2"}).codec
    vocab = {END: 50256}
    for id in range(50256):
        vocab["".join(character[byte] for byte in codec.decode_single_token_bytes(id))] = id
    return vocab


def test_rows_that_no_token_has_are_dropped(tmp_path):
    """Of a vocabulary that was padded; a tokenizer of another size is not this model's."""
    codec = byte_bpe()
    V = codec.get_vocab_size()
    folder = gpt2_source(tmp_path / "theirs", V + 46)
    codec.save(str(folder / "tokenizer.json"))
    _, size = imported_tokenizer(folder, tmp_path, "--end_token=<|end|>")
    assert size == V
    x = torch.tensor([[1, V - 1, 7]])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = Backpack.from_checkpoint(tmp_path / "run")(x)[0]
        assert torch.allclose(found, theirs(x).logits[..., :V], atol=1e-5)
    for rows in (V - 2, V + 140):
        folder = gpt2_source(tmp_path / f"theirs{rows}", rows)
        codec.save(str(folder / "tokenizer.json"))
        with pytest.raises(UserError, match=f"tokenizer has {V} tokens, but wte.weight {rows} rows"):
            imported_tokenizer(folder, tmp_path, "--end_token=<|end|>")


def test_a_run_without_a_tokenizer_trains_on(tmp_path):
    """Imported without one; its dataset has none, either."""
    save_run(tmp_path / "run", Backpack(BackpackConfig(**SIZES)))
    folder = tmp_path / "ids"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 40, 2000).astype("<u2")
    ids.tofile(folder / "train.bin")
    ids.tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "tokenizer": None, "vocab_size": 40}))
    data = [f"--data_dir={tmp_path}", "--dataset=ids", f"--out_dir={tmp_path / 'on'}"]
    schedule = "--tokens_per_step=64 --batch_size=4 --max_iters=3 --warmup_iters=1 --eval_iters=1".split()
    train.main([f"--init_from={tmp_path / 'run'}", *data, *schedule, "--device=cpu"])
    assert load_checkpoint(tmp_path / "on")["meta"]["tokenizer"] is None
