"""What the data stages can be told. Plain pydantic models: no torch, no pyarrow."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from soma.data.expect import Bounds, read_expectations
from soma.data.signals.config import Filters, Signal


def _as_list(value: Any) -> Any:
    """One source may be written without the list around it."""
    return [value] if isinstance(value, str) else value


Sources = Annotated[list[str], BeforeValidator(_as_list)]


class Block(BaseModel):
    """A block of the recipe: unknown keys are errors, values do not change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CleanConfig(Block):
    """What is done to a document's text, and which documents are set aside."""

    unicode: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normal form of the text.")
    mojibake: bool = Field(
        False, description="Repair text that was decoded as the wrong encoding (`schÃ¶n` → `schön`), by ftfy."
    )
    remove_lines: list[Literal["c4", "c4_any", "refinedweb"]] = Field(
        default_factory=list,
        description="Take out the lines that C4's rules refuse (`c4_any`: without that on line ends) or RefinedWeb's.",
    )
    mask_personal: bool = Field(
        False, description="Replace e-mail and IP addresses, phone, card and account numbers, keys by `<email>`, …"
    )
    min_chars: int = Field(16, ge=1, description="Documents with fewer characters after cleaning are dropped.")
    max_chars: int = Field(
        1_000_000,
        ge=1000,
        description="Longer documents are cut at line ends into parts of at most this many characters.",
    )
    max_control_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Documents with a larger share of control and replacement characters are dropped as binary.",
    )


class SubstringConfig(Block):
    """Text that stands in several documents."""

    length: int = Field(50, ge=2, description="Spans of at least this many units that stood before are repeated.")
    unit: Literal["words", "bytes"] = Field(
        "words", description="What is counted: words, or bytes for languages that are written without spaces."
    )
    action: Literal["remove", "count"] = Field(
        "remove", description="Cut repeated spans out of all documents but the first, or only count them."
    )


class LinesConfig(Block):
    """Lines that stand in many documents, such as menus, notices and licences."""

    documents: int = Field(10, ge=2, description="Lines that stand in at least so many documents are repeated.")
    min_chars: int = Field(
        20, ge=1, description="Shorter lines are left alone (of source code `return None` stands everywhere)."
    )
    keep_first: bool = Field(False, description="The first document, by id, keeps its line.")
    action: Literal["remove", "count"] = Field("remove", description="Take repeated lines out, or only count them.")


class SemanticConfig(Block):
    """Documents that say the same in other words, by their embeddings (SemDeDup)."""

    url: str = Field(min_length=1, description="An endpoint of OpenAI's shape: its base address, or …/v1/embeddings.")
    model: str = Field(min_length=1, description="The embedding model's name there.")
    api_key_env: str | None = Field(None, description="Name of the environment variable with the endpoint's key.")
    threshold: float = Field(0.95, gt=-1, le=1, description="Documents whose cosine is at least this are duplicates.")
    clusters: int | None = Field(
        None, ge=1, description="Clusters within which documents are compared; default: the root of their number."
    )
    max_chars: int = Field(8000, ge=1, description="Only so much of a document's start is embedded.")
    batch: int = Field(32, ge=1, le=2048, description="Documents in a request.")
    concurrency: int = Field(4, ge=1, le=256, description="Requests at once.")
    seed: int = Field(0, ge=0, description="Of the clusters' first centres.")


class DedupConfig(Block):
    """Exact and near-duplicate removal (MinHash with banding, verified by the true Jaccard similarity)."""

    exact: bool = Field(True, description="Drop documents that are equal up to white space.")
    near: bool = Field(True, description="Drop near-duplicates.")
    threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Documents whose Jaccard similarity over word n-grams is at least this are near-duplicates.",
    )
    straddle_threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Documents at least this similar are both kept but never split between train and validation.",
    )
    ngram: int = Field(5, ge=1, le=50, description="Words in a shingle.")
    num_hashes: int = Field(128, ge=16, le=1024, description="Length of a MinHash signature.")
    keep: Literal["longest", "smallest_id"] = Field(
        "longest", description="Which document of a near-duplicate cluster stays; ties go to the smallest id."
    )

    against: Sources = Field(
        default_factory=list,
        description="Corpus folders, or indexes made by `soma data index`: what is like their documents is dropped.",
    )
    semantic: SemanticConfig | None = Field(None, description="Also drop documents that say the same in other words.")
    substring: SubstringConfig | None = Field(None, description="Also remove, or count, repeated substrings.")
    lines: LinesConfig | None = Field(None, description="Also remove, or count, lines that stand in many documents.")

    @model_validator(mode="after")
    def _ordered(self) -> "DedupConfig":
        if self.straddle_threshold > self.threshold:
            raise ValueError(
                f"straddle_threshold ({self.straddle_threshold}) must not be above threshold ({self.threshold})"
            )
        return self


class DecontaminateConfig(Block):
    """Evaluation sets that must not be in the corpus."""

    sets: Sources = Field(
        min_length=1,
        description="The sets: JSONL, JSON or Parquet files (every string of a row counts) or text files (every "
        "paragraph), addresses as in `sources`.",
    )
    ngram: int = Field(
        13, ge=2, le=200, description="A field is found where this many words of it stand in a document, in a row."
    )
    min_words: int = Field(
        8, ge=2, le=200, description="Fields with fewer words are not looked for; those below `ngram` only as a whole."
    )
    near: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="A field is also found where this share of its `near_ngram`-word windows stands in a document.",
    )
    near_ngram: int = Field(5, ge=2, le=50, description="Words in a window for near matches.")
    action: Literal["drop", "report"] = Field(
        "drop", description="Drop documents with matches, or only list them in `contamination.parquet`."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "DecontaminateConfig":
        if not self.near_ngram <= self.min_words <= self.ngram:
            raise ValueError(
                f"near_ngram ({self.near_ngram}) must not be above min_words ({self.min_words}), "
                f"nor that above ngram ({self.ngram})"
            )
        return self


class StreamConfig(Block):
    """Token shards that lie at a URL and come here while they are trained on. Nothing here reaches the weights."""

    cache_gb: float = Field(
        50.0, gt=0, description="Most that the shards on this machine's disk may take, in 10⁹ bytes."
    )
    ahead: int = Field(4, ge=1, description="Shards that are fetched before they are needed, at most.")
    folder: str | None = Field(None, description="Where shards are kept; left out, `shards` in SOMA_CACHE.")


class DataConfig(Block):
    """Where text comes from and how it becomes a corpus."""

    sources: Sources = Field(
        min_length=1,
        description="Files, folders, globs, `stdlib:` (this Python's library), s3:// gs:// https:// hf:// addresses.",
    )
    text_field: str = Field(
        "text", min_length=1, description="Field of JSON rows, or column of Parquet files, that holds the text."
    )
    html: Literal["all", "main"] = Field(
        "all",
        description="What is taken of HTML files: all text, or the main text with its structure (as of WARC files).",
    )
    clean: CleanConfig = Field(default_factory=CleanConfig, description="Cleaning and length limits.")
    dedup: DedupConfig = Field(default_factory=DedupConfig, description="Duplicate removal.")
    filters: Filters | None = Field(
        None,
        description="Which documents stay, by their attributes: presets (`gopher`, `c4`, …) or rules of one's own.",
    )
    attributes: list[Signal] = Field(
        default_factory=list, description="Signals to measure and write beside the corpus, whether a filter needs them."
    )
    decontaminate: DecontaminateConfig | None = Field(None, description="Evaluation sets to keep out.")
    expect: Annotated[dict[str, Bounds], BeforeValidator(read_expectations)] = Field(
        default_factory=dict,
        description="Figures of the corpus with [least, most]; one that is not met stops the run: mean_length, "
        "duplicates, languages.en, attributes.words.p50 … (docs/profile.md).",
    )
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of the documents that is held out for validation."
    )
    min_documents: int = Field(
        40,
        ge=1,
        description="With fewer documents than this, long ones are cut at line ends until there are about this many, "
        "so that some text can be held out.",
    )
    seed: int = Field(0, ge=0, description="Shifts which documents are held out.")
    workers: int = Field(1, ge=1, le=1024, description="Processes that read and clean; the result is the same for any.")
    runner: Literal["local", "ray"] = Field(
        "local", description="Where they run: on this machine, or on a Ray cluster (RAY_ADDRESS) through Daft."
    )

    def content(self) -> dict[str, Any]:
        """The settings that the corpus depends on, as JSON."""
        return self.model_dump(mode="json", exclude={"workers", "runner", "expect"})

    @property
    def signals(self) -> list[str]:
        """The signals that are measured: what the filters need, and `attributes`."""
        needed = self.filters.signals if self.filters is not None else []
        return sorted({*needed, *self.attributes})

    @property
    def scorer(self) -> str | None:
        """Address of the model that the quality filter asks, where it names one."""
        return self.filters.quality.scorer if self.filters is not None and self.filters.quality is not None else None

    def of_documents(self) -> dict[str, Any]:
        """The settings that documents and their attributes depend on, as JSON; no threshold is among them."""
        near = [self.dedup.num_hashes, self.dedup.ngram] if self.dedup.near else None
        keys = {"sources", "text_field", "html", "clean", "min_documents"}
        return self.model_dump(mode="json", include=keys) | {
            "near": near,
            "signals": self.signals,
            "scorer": self.scorer,
        }


class MixturePart(Block):
    """One corpus of a mixture: text of its own (`data`), tokens that are there (`tokens`), or neither: the recipe's
    `data`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$", description="Its name; stages carry it.")
    data: DataConfig | None = Field(None, description="Text sources, cleaning, deduplication, split.")
    tokens: str | None = Field(
        None, min_length=1, description="A tokens folder, or its URL: then its shards come while they are trained on."
    )
    weight: float | None = Field(
        None, gt=0, description="Its share of the sequences. Left out: as many as it has, times its `epochs`."
    )
    epochs: float | None = Field(
        None, gt=0, description="At most so many passes over it; then the others take its place. Left out: any number."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "MixturePart":
        if self.data is not None and self.tokens is not None:
            raise ValueError(f"mixture: {self.name} has both `data` and `tokens`: keep one")
        return self


class TokenizerConfig(Block):
    """The tokenizer: trained on the corpus, or one that is there (`load`)."""

    type: Literal["bpe", "unigram", "wordpiece", "word", "char", "byte"] = Field(
        "bpe",
        description="bpe: byte-level BPE. unigram: SentencePiece's, with bytes for what is rare (▁ is its space). Both "
        "give back every text. wordpiece: BERT's. word: whole words, cut by `split`. char, byte: one character, one "
        "byte a token.",
    )
    load: str | None = Field(
        None,
        min_length=1,
        description="Take this tokenizer in place of training one: a folder, hf:ID, or a file (tokenizer.json, a "
        "SentencePiece .model, .tiktoken, vocab.txt). Where it has no end of text or chat template, they are added.",
    )
    vocab_size: int = Field(
        4096, ge=16, le=1_000_000, description="Entries of the vocabulary, special tokens among them."
    )
    pattern: Literal["code", "gpt4", "gpt2"] = Field(
        "code", description="bpe: how text is cut before merging: `code` keeps a line end and its indentation together."
    )
    digits: Literal["single", "three"] = Field(
        "three", description="bpe: numbers are cut into single digits or into groups of up to three."
    )
    split: Literal["whitespace", "punctuation", "regex", "dictionary"] = Field(
        "whitespace",
        description="word: at white space; there and around punctuation; what `regex` matches; or the longest words of "
        "`dictionary` from left to right (for scripts without spaces), single characters between them.",
    )
    regex: str | None = Field(None, min_length=1, description="word with split regex: what a word is.")
    dictionary: str | None = Field(
        None, min_length=1, description="word with split dictionary: a file with one word a line."
    )
    lowercase: bool = Field(False, description="wordpiece, word: all letters small, accents off (as BERT's uncased).")
    min_frequency: int = Field(
        2,
        ge=1,
        description="bpe, wordpiece: a pair must be seen this often to be merged; word, char: an entry to stay.",
    )
    max_bytes: int = Field(
        200_000_000,
        ge=1,
        description="Train on at most this many bytes of the corpus, documents taken in order of their id.",
    )

    @model_validator(mode="after")
    def _fits_its_type(self) -> "TokenizerConfig":
        given = self.model_fields_set
        of = {"pattern": "bpe", "digits": "bpe", "split": "word", "regex": "word", "dictionary": "word"}
        for name, kind in of.items():
            if name in given and getattr(self, name) is not None and self.type != kind:
                raise ValueError(f"{name} is a setting of type {kind}, not of {self.type}")
        if self.lowercase and self.type not in ("wordpiece", "word"):
            raise ValueError(f"lowercase is a setting of the types wordpiece and word, not of {self.type}")
        if self.type == "byte" and "vocab_size" in given:
            raise ValueError("the type byte has 256 entries and the special tokens: leave vocab_size out")
        if self.type in ("bpe", "unigram") and self.vocab_size < 300:
            raise ValueError(f"vocab_size {self.vocab_size} is less than 300: bytes and special tokens take 260")
        if (self.split == "regex") != (self.regex is not None):
            raise ValueError("split: regex and a `regex` go together")
        if (self.split == "dictionary") != (self.dictionary is not None):
            raise ValueError("split: dictionary and a `dictionary` go together")
        return self


class InstructConfig(Block):
    """Instruction or preference pairs: from files of one's own, or made from the docstrings of a code corpus."""

    sources: Sources = Field(
        default_factory=list,
        description="JSON or JSONL files in Alpaca, messages, ShareGPT, prompt/chosen/rejected, "
        "prompt/completion/label (KTO) or Self-Instruct's shape. Empty: docstring → function pairs from the corpus.",
    )
    shape: Literal["auto", "alpaca", "alpaca_text", "messages", "sharegpt", "preference", "kto", "seeds"] = Field(
        "auto", description="Shape of the rows; `auto` tells by the fields of the first row."
    )
    system: str | None = Field(None, description="A system message put before every conversation that has none.")
    strict: bool = Field(
        True, description="A row that does not fit the shape is an error; false: it is counted and set aside."
    )
    min_chars: int = Field(40, ge=1, description="Answers shorter than this are left out of docstring pairs.")
    max_chars: int = Field(
        4000, ge=1, description="Conversations with more characters than this are left out of docstring pairs."
    )
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share held out, for files of one's own (a corpus keeps its split)."
    )
    seed: int = Field(0, ge=0, description="Shifts which rows are held out, for files of one's own.")
