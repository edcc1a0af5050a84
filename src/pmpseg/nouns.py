"""The nouns of a caption, by one of three parsers; OVSeg took NLTK's (its issue 7). Only the chosen one is imported.

``textblob`` works offline: its pattern tagger brings its lexicon along. ``nltk`` and ``spacy`` want data of their own.
"""

import re
from collections.abc import Callable, Iterable

from .errors import InputError

WORD = re.compile(r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*")
PARSERS = ("textblob", "nltk", "spacy")
SPACY_MODEL = "en_core_web_sm"
INSTALL = "pip install 'pmpseg[mining]', or pip install {}"


def noun_parser(name: str = "textblob") -> Callable[[str], list[str]]:
    """caption -> its nouns in lower case, each once, in the order in which they stand.

    Raises InputError where the parser or its data is not there.
    """
    if name not in PARSERS:
        raise InputError(f"parser: got {name!r}, want one of {', '.join(PARSERS)}")
    tag = {"textblob": _textblob, "nltk": _nltk, "spacy": _spacy}[name]()
    return lambda caption: nouns_of(tag(caption))


def nouns_of(tagged: Iterable[tuple[str, str]]) -> list[str]:
    """The words tagged as nouns (Penn Treebank's NN, NNS, NNP, NNPS) that are words: two letters or more."""
    words = (word.lower() for word, kind in tagged if kind.startswith("NN"))
    return list(dict.fromkeys(word for word in words if len(word) > 1 and WORD.fullmatch(word)))


def _textblob() -> Callable[[str], list[tuple[str, str]]]:
    try:
        from textblob.en import tag
    except ImportError:
        raise InputError(f"parser textblob is not installed: {INSTALL.format('textblob')}") from None
    return tag


def _nltk() -> Callable[[str], list[tuple[str, str]]]:
    try:
        import nltk
    except ImportError:
        raise InputError(f"parser nltk is not installed: {INSTALL.format('nltk')}") from None

    def tag(caption: str) -> list[tuple[str, str]]:
        return nltk.pos_tag(nltk.word_tokenize(caption))

    try:
        tag("a cat")
    except LookupError:
        data = "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng"
        raise InputError(f"parser nltk lacks its data: {data}, or take the parser textblob") from None
    return tag


def _spacy() -> Callable[[str], list[tuple[str, str]]]:
    try:
        import spacy
    except ImportError:
        raise InputError("parser spacy is not installed: pip install spacy, or take the parser textblob") from None
    try:
        model = spacy.load(SPACY_MODEL)
    except OSError:
        mend = f"python -m spacy download {SPACY_MODEL}"
        raise InputError(f"parser spacy lacks its model {SPACY_MODEL}: {mend}, or take the parser textblob") from None
    return lambda caption: [(token.text, token.tag_) for token in model(caption)]
