"""Words <-> token ids, where a model is asked about a word."""

import unicodedata

import numpy as np

from configurator import UserError, check

# how Unicode's names of characters begin in scripts that have no spaces between words
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def word_ids(tokenizer, word):
    """
    The ids of a word as it occurs within a text: with a space before it (paper, section 5.2).

    No space is added for a char vocabulary, nor where one (or the dot that we print) is there, nor for a
    "word" in double quotes, which stands for exactly what they enclose, nor where the tokenizer adds it.
    UserError: it is empty.
    """
    if is_quoted(word):
        text = word[1:-1]
    elif tokenizer.end is None:
        text = word
    else:
        text = word.removeprefix("\u00b7").removeprefix(" ")
        if not adds_space(tokenizer):
            text = " " + text
    ids = tokenizer.encode(text).tolist()
    check(ids and word.strip(), f"{word!r} is not a word")
    return ids


def adds_space(tokenizer):
    """Whether a word at the start of a text has the ids that it has within a text, as in a WordPiece."""
    first = tokenizer.encode("in")
    both = tokenizer.encode("in the")
    return np.array_equal(both[len(first) :], tokenizer.encode("the"))


def is_quoted(word):
    return len(word) > 2 and word[0] == word[-1] == '"'


def word_id(tokenizer, word):
    """The id of a word that is a single token. UserError: it is several, which the message shows."""
    ids = word_ids(tokenizer, word)
    if len(ids) > 1:
        tokens = " ".join(token_text(tokenizer, i) for i in ids[:8])
        hint = 'this needs a word of one token, or one of these as "token" in double quotes'
        hint = quoted_hint(tokenizer, word) or hint
        raise UserError(f"{word!r} is {len(ids)} tokens here, {tokens}: {hint}")
    return ids[0]


def quoted_hint(tokenizer, word):
    """That a word is one token without a space before it, as in text without spaces; "" if it isn't."""
    if is_quoted(word) or len(tokenizer.encode(word)) != 1:
        return ""
    return f'"{word}", with the double quotes, is one token'


def word_forms(tokenizer, word):
    """
    The ids of a word of one token: with a space before it, and if it is a Name and one token, without.

    So it stands at the start of a text. A name only: without a space, "in" is rather a part of "captain".
    """
    forms = [word_id(tokenizer, word)]
    if word[0].isupper():
        bare = tokenizer.encode(word).tolist()
        if len(bare) == 1 and bare != forms:
            forms += bare
    return forms


def token_string(tokenizer, id):
    """The text of a token where it goes on a text, so with the space before a word."""
    if tokenizer.end is None:
        return tokenizer.decode([id])
    before = tokenizer.decode([tokenizer.end])
    return tokenizer.decode([tokenizer.end, id]).removeprefix(before)


def is_unspaced(text):
    """Whether a text begins in a script that has no spaces between words."""
    return unicodedata.name(text[:1] or " ", "").startswith(UNSPACED)


def begins_with_mark(text):
    """Whether a text begins with a combining mark, which belongs to the letter before it."""
    return unicodedata.category(text[:1] or " ").startswith("M")


def is_word(tokenizer, id):
    """Whether a token is a space and letters."""
    text = token_string(tokenizer, id)
    return text[:1] == " " and text[1:].isalpha()


def word_tokens(tokenizer, vocab_size):
    """The ids of all tokens of a vocabulary that are words: see is_word."""
    return [id for id in range(vocab_size) if is_word(tokenizer, id)]


def token_text(tokenizer, id):
    """A token as text to print: on one line, with dots for spaces."""
    return repr(token_string(tokenizer, id))[1:-1].replace(" ", "\u00b7")
