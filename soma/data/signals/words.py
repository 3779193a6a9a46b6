"""Words of a text by the rules of spaCy's English tokenizer, cut once for each different run of non-blank characters.

A text has few different chunks (what lies between white space): each is cut by the rules when it is first met and
looked up afterwards, so a text becomes an array of word numbers at the speed of a dictionary. The rules follow
spaCy 3.8, `spacy/lang/punctuation.py` and `spacy/lang/en` (MIT); `tests/data/test_signals.py` holds expected cuts and
`benchmarks/data.py` compares the decisions that rest on them. Other languages are cut by the same punctuation rules.
"""

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

MAX_TYPES = 300_000  # chunks remembered, some 150 MB; then a batch begins with an empty table, which changes no figure
LONG_CHUNK = 400  # a longer chunk is cut at punctuation only, in one pass

# A sentence may end with one of these (Unicode's Sentence_Terminal and its like); those after the blank end lines, but
# spaCy's sentencizer does not know them.
SENTENCE_ENDS = frozenset(
    "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"
    "𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈"
)
LINE_ENDS = SENTENCE_ENDS | frozenset(
    "\u061d\u061e\u0837\u0839\u083d\u083e\u17d4\u17d5\u17d6\u17d9\u17da\u1b7d\u1b7e\u2e53\u2e54"
)
# What datatrove's Gopher filter counts as symbols rather than as characters of a word.
SYMBOLS = LINE_ENDS | frozenset(
    "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

LETTER = r"[^\W\d_]"
CURRENCY = r"\$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
PUNCT = r"…,:;!?¿؟¡()\[\]{}<>_#*&。？！，、；：～·।،۔؛٪"
QUOTES = r"'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
UNITS = (
    "km²|km³|km/h|kmh|km|m²|m³|m/s|mph|mbar|mb|MB|mm²|mm³|mm|mg|m|dm²|dm³|dm|cm²|cm³|cm|ha|hPa|µm|µg|nm|yd|in|ft|kg|kb|KB|"
    "g|t|lb|oz|Pa|gb|GB|tb|TB|T|G|M|K|%"
)  # fmt: skip
PREFIX = re.compile(rf"\.\.+|US\$|C\$|A\$|\+(?![0-9])|[§%=—–{PUNCT}{QUOTES}{CURRENCY}]")
SUFFIX = re.compile(
    rf"(?:\.\.+|['’][sS]|[—–{PUNCT}{QUOTES}]|(?<=[0-9])\+|(?<=°[FfCcKk])\.|(?<=[0-9])(?:[{CURRENCY}]|{UNITS})"
    rf"|(?<=[0-9%²\-+{PUNCT}{QUOTES}])\.)$"
)
INFIX = re.compile(
    rf"\.\.+|…|(?<=[0-9])[+\-*^](?=[0-9-])|(?<={LETTER}),(?={LETTER})"
    rf"|(?<=[^\W_])(?:---?|--|—+|[-–~])(?={LETTER})|(?<=[^\W_])[:<>=/](?={LETTER})"
)
FULL_STOP = re.compile(rf"(?<=[^\W\d_{QUOTES}])\.(?=[^\W\d_{QUOTES}])|(?<=[{QUOTES}])\.|\.(?=[{QUOTES}])")
URL = re.compile(
    r"(?:[a-zA-Z][a-zA-Z0-9+.-]+:)?(?://)?(?:\S+(?::\S*)?@)?(?:\d{1,3}(?:\.\d{1,3}){3}"
    r"|(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62}\.)+[a-z\u00df-\uffff]{2,63})"
    r"(?::\d{2,5})?(?:[/?#]\S*)?"
)
TIME = re.compile(r"(1[0-2]|[1-9])([ap]\.?m\.?)")


def _list(words: str) -> list[str]:
    return words.split()


WHOLE = frozenset(
    _list(
        "Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla. "
        "Ga. Gen. Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. "
        "Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. "
        "Okla. Ore. Pa. Ph.D. Prof. Rep. Rev. S.C. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a.m. and/or co. e.g. i.e. "
        "p.m. v.s. vs. w/o ma'am Ma'am o'clock O'clock o'er y' 'em 'til 'cause 'bout 'Cause 'S 's ‘s ‘S ’s ’S '' C++ "
        "°C. °F. °K. :) :-) ;) ;-) :( :-( :D :-D :P :-P :/ :-/ :| :-| :* :-* :O :o :0 :3 :> :] :} :x :X :p =) =( =D "
        "=] =3 =/ =| <3 </3 <33 :)) :))) :(( :((( ^_^ ^__^ >.< -_- ;_; o_O O_O O.O o.O xD XD (: (; ): ;D 8) 8D :'( "
        ":') Doin' doin' Goin' goin' Lovin' lovin' Nothin' nothin' Somethin' somethin' Havin' havin' Nuthin' nuthin' "
        "Ol' ol'"
    )
) | frozenset(f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyzäöü")
PRONOUNS = _list("i you he she it we they")
ASKERS = _list("who what when where why how there that this these those")
VERBS = _list("could do does did had may might must need ought sha should wo would")
NOT_WORDS = frozenset(
    _list("ill its hell shell shed were well whore")
)  # contractions without apostrophe that are words


@lru_cache(maxsize=1)
def contractions() -> dict[str, tuple[str, ...]]:
    """`don't` → `do n't`, also without the apostrophe, as spaCy has them; small and capitalised."""
    found: dict[str, tuple[str, ...]] = {}

    def add(*parts: str) -> None:
        for first in (parts[0], parts[0].title()):
            found[first + "".join(parts[1:])] = (first, *parts[1:])
            bare = tuple(part.replace("'", "") for part in parts[1:])
            if parts[0] + "".join(bare) not in NOT_WORDS:
                found.setdefault(first + "".join(bare), (first, *bare))

    for word in PRONOUNS + ASKERS:
        for ending in (["'ll"], ["'ll", "'ve"], ["'d"], ["'d", "'ve"]):
            add(word, *ending)
        if word in ("i", "you", "we", "they") or (word in ASKERS and word not in ("there", "that", "this")):
            add(word, "'ve")
        if word in ("you", "we", "they") or (word in ASKERS and word not in ("that", "this")):
            add(word, "'re")
        if word in ("he", "she", "it") or (word in ASKERS and word not in ("these", "those")):
            add(word, "'s")
    add("i", "'m")
    add("i", "'m", "a")
    for verb in [*VERBS, "ca"]:
        add(verb, "n't")
        add(verb, "n't", "'ve")
    for verb in ("ai", "are", "is", "was", "were", "have", "has", "dare"):
        add(verb, "n't")
    for verb in ("could", "might", "must", "should", "would", "not"):
        add(verb, "'ve")
    for parts in (("can", "not"), ("gon", "na"), ("got", "ta"), ("let", "'s"), ("y", "'all"), ("c'm", "on")):
        found["".join(parts)] = found.setdefault("".join(parts), parts)
        found["".join(parts).capitalize()] = (parts[0].capitalize(), *parts[1:])
    found.pop("lets", None)
    found |= {key.replace("'", "’"): tuple(p.replace("'", "’") for p in value) for key, value in found.items()}
    return found


def special(chunk: str) -> tuple[str, ...] | None:
    """The cut of a chunk that is an exception of its own."""
    if chunk in WHOLE:
        return (chunk,)
    if found := contractions().get(chunk):
        return found
    time = TIME.fullmatch(chunk)
    return time.groups() if time else None


def cut_chunk(chunk: str) -> tuple[str, ...]:
    """The words of a chunk. `cut_chunk('("Don\\'t"...') == ('(', '"', 'Do', "n't", '"', '...')`."""
    if chunk.isalpha() and chunk.isascii():
        return contractions().get(chunk) or (chunk,)
    if len(chunk) > LONG_CHUNK:
        return tuple(re.findall(r"[^\W_]+|[\W_]", chunk))
    front: list[str] = []
    back: list[str] = []
    while chunk:
        if known := special(chunk):
            front.extend(known)
            break
        before = chunk
        if end := _prefix(chunk):
            front.append(chunk[:end])
            chunk = chunk[end:]
            if chunk and special(chunk):
                continue
        if chunk and (start := _suffix(chunk)) < len(chunk):
            back.append(chunk[start:])
            chunk = chunk[:start]
        if chunk == before:
            front.extend([chunk] if "." in chunk and URL.fullmatch(chunk) else _middle(chunk))
            break
    return (*front, *reversed(back))


def _prefix(chunk: str) -> int:
    found = PREFIX.match(chunk)
    if found:
        return found.end()
    return int(not chunk[0].isascii() and unicodedata.category(chunk[0]) == "So")


def _suffix(chunk: str) -> int:
    """Where the last piece starts, or the chunk's length."""
    found = SUFFIX.search(chunk)
    if found:
        return found.start()
    last = chunk[-1]
    if last == "." and len(chunk) > 1:  # after a small letter, or after two capitals
        if chunk[-2].islower() or (len(chunk) > 2 and chunk[-2].isupper() and chunk[-3].isupper()):
            return len(chunk) - 1
    elif not last.isascii() and unicodedata.category(last) == "So":
        return len(chunk) - 1
    return len(chunk)


def _middle(chunk: str) -> list[str]:
    cuts = [found.span() for found in INFIX.finditer(chunk)]
    for found in FULL_STOP.finditer(chunk):  # a full stop between a small letter or quote and a capital or quote
        place = found.start()
        left, right = chunk[place - 1] if place else "", chunk[place + 1 : place + 2]
        if (left.islower() or left in QUOTES) and (right.isupper() or (right and right in QUOTES)) and left:
            cuts.append((place, place + 1))
    if not chunk.isascii():
        icons = (i for i, c in enumerate(chunk) if not c.isascii() and unicodedata.category(c) == "So")
        cuts += [(i, i + 1) for i in icons]
    pieces, start = [], 0
    for begin, end in sorted(cuts):
        if begin >= start:
            pieces += [chunk[start:begin], chunk[begin:end]]
            start = end
    return [piece for piece in [*pieces, chunk[start:]] if piece]


FIELDS = (
    ("hashes", np.uint64), ("chars", np.int64), ("symbol", bool), ("alpha", bool), ("stop", np.uint8), ("ends", bool),
    ("punct", bool),
)  # fmt: skip


class Table(dict[str, int]):
    """Chunks by number, each with its words, and words by number: `table[chunk]` cuts and adds a chunk that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, int] = {}
        self.rows: list[tuple[Any, ...]] = []
        self.chunks: list[tuple[int, int]] = []  # words, characters
        self.flat: list[int] = []

    def __missing__(self, chunk: str) -> int:
        pieces = cut_chunk(chunk)
        for piece in pieces:
            number = self.words.get(piece)
            if number is None:
                number = self.words[piece] = len(self.rows)
                self.rows.append(_facts(piece))
            self.flat.append(number)
        self[chunk] = found = len(self.chunks)
        self.chunks.append((len(pieces), len(chunk)))
        return found


class Columns:
    """The table's facts as arrays, as of now; built upon those of an earlier batch, so only what is new is converted.

    Of chunks `chunk_words` (how many words), `chunk_first` (its first place in `pieces`), `chunk_chars`; of words
    `hashes` (uint64, the same in every process), `chars`, `symbol` (only symbols), `alpha` (has a letter), `stop` (bit
    i: is `STOP_WORDS[i]`), `ends` (ends a sentence), `punct` (only punctuation).
    """

    hashes: np.ndarray
    chars: np.ndarray
    symbol: np.ndarray
    alpha: np.ndarray
    stop: np.ndarray
    ends: np.ndarray
    punct: np.ndarray
    chunk_words: np.ndarray
    chunk_chars: np.ndarray
    pieces: np.ndarray

    def __init__(self, table: Table, before: "Columns | None") -> None:
        words, chunks, flat = (len(before.chars), len(before.chunk_words), len(before.pieces)) if before else (0, 0, 0)
        columns = list(zip(*table.rows[words:], strict=True)) or [()] * len(FIELDS)
        for (name, kind), values in zip(FIELDS, columns, strict=True):
            new = np.array(values, kind)
            setattr(self, name, np.concatenate([getattr(before, name), new]) if before else new)
        sizes = np.array(table.chunks[chunks:], np.int64).reshape(-1, 2)
        pieces = np.array(table.flat[flat:], np.int64)
        self.chunk_words = np.concatenate([before.chunk_words, sizes[:, 0]]) if before else sizes[:, 0]
        self.chunk_chars = np.concatenate([before.chunk_chars, sizes[:, 1]]) if before else sizes[:, 1]
        self.pieces = np.concatenate([before.pieces, pieces]) if before else pieces
        self.chunk_first = np.cumsum(self.chunk_words) - self.chunk_words


def _facts(word: str) -> tuple[Any, ...]:
    digest = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    stop = 1 << STOP_WORDS.index(word) if word in STOP_WORDS else 0
    punct = all(unicodedata.category(letter)[0] == "P" for letter in word)
    alpha = any(map(str.isalpha, word))
    return digest, len(word), SYMBOLS.issuperset(word), alpha, stop, word in SENTENCE_ENDS, punct
