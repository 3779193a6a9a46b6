"""Filters: rules over the signals, each threshold a named field with its published value; None switches a rule off.

A rule drops a document whose attribute lies beyond the threshold. The order of families and of their fields is that
in which a document's reason is looked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Signal = Literal["gopher_quality", "gopher_repetition", "c4", "c4_any", "fineweb", "refinedweb", "language", "personal"]
Preset = Literal["gopher", "c4", "fineweb", "refinedweb"]


@dataclass(frozen=True)
class Rule:
    """A document with `column` below `threshold` (`least`) or above it is dropped as `name`."""

    name: str
    column: str
    least: bool
    threshold: float


class Family(BaseModel):
    """Rules by field: `min_X` and `max_X` of the attribute that `columns` names, or X itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    columns: ClassVar[dict[str, str]] = {}

    def column(self, field: str) -> str:
        """The attribute that a field is a threshold of."""
        return self.columns.get(field, field[4:])

    def rules(self, family: str) -> Iterator[Rule]:
        """The rules that are on."""
        for field in type(self).model_fields:
            value = getattr(self, field)
            if field[:4] in ("min_", "max_") and value is not None:
                yield Rule(f"{family}.{field}", self.column(field), field.startswith("min_"), value)


class GopherQuality(Family):
    """Rae et al. 2021, section A1.1. Words of symbols alone do not count for `min_words` and `max_words`."""

    columns: ClassVar[dict[str, str]] = {"min_words": "plain_words", "max_words": "plain_words"}
    min_words: int | None = Field(50, description="Words in a document.")
    max_words: int | None = Field(100_000, description="Words in a document.")
    min_mean_word_chars: float | None = Field(3, description="Mean length of a word.")
    max_mean_word_chars: float | None = Field(10, description="Mean length of a word.")
    max_hashes_per_word: float | None = Field(0.1, description="Hash signs per word.")
    max_ellipses_per_word: float | None = Field(0.1, description="Ellipses per word.")
    max_bullet_lines: float | None = Field(0.9, description="Share of lines that begin with a bullet.")
    max_ellipsis_lines: float | None = Field(0.3, description="Share of lines that end with an ellipsis.")
    min_alpha_words: float | None = Field(0.8, description="Share of words with a letter.")
    min_stop_words: int | None = Field(2, description="How many of: the be to of and that have with.")


class GopherRepetition(Family):
    """Rae et al. 2021, table A1."""

    max_dup_paragraphs: float | None = Field(0.3, description="Share of paragraphs that have been there before.")
    max_dup_paragraph_chars: float | None = Field(0.2, description="Their share of the characters.")
    max_dup_lines: float | None = Field(0.3, description="Share of lines that have been there before.")
    max_dup_line_chars: float | None = Field(0.2, description="Their share of the characters.")
    max_top_2gram: float | None = Field(0.2, description="Share of the most frequent two words.")
    max_top_3gram: float | None = Field(0.18, description="Share of the most frequent three words.")
    max_top_4gram: float | None = Field(0.16, description="Share of the most frequent four words.")
    max_dup_5gram: float | None = Field(0.15, description="Share of repeated five words.")
    max_dup_6gram: float | None = Field(0.14, description="Share of repeated six words.")
    max_dup_7gram: float | None = Field(0.13, description="Share of repeated seven words.")
    max_dup_8gram: float | None = Field(0.12, description="Share of repeated eight words.")
    max_dup_9gram: float | None = Field(0.11, description="Share of repeated nine words.")
    max_dup_10gram: float | None = Field(0.10, description="Share of repeated ten words.")


class C4(Family):
    """Raffel et al. 2020, section 2.2, over the lines that its line rules keep (`clean.remove_lines` takes the others
    out)."""

    terminal: bool = Field(True, description="Only lines that end in . ? ! or a quotation mark count.")
    max_lorem_ipsum: int | None = Field(0, description="Lines with `lorem ipsum`.")
    max_curly: int | None = Field(0, description="Lines with a curly bracket.")
    min_sentences: int | None = Field(5, description="Sentences.")

    def column(self, field: str) -> str:
        return ("c4_" if self.terminal else "c4_any_") + field[4:]


class FineWeb(Family):
    """Penedo et al. 2024, section 3.6."""

    columns: ClassVar[dict[str, str]] = {"max_dup_line_chars": "dup_line_chars_flat"}
    min_lines_ending_sentence: float | None = Field(0.12, description="Share of lines that end in a sentence end.")
    max_short_lines: float | None = Field(0.67, description="Share of lines of at most 30 characters.")
    max_dup_line_chars: float | None = Field(0.01, description="Share of characters in repeated lines.")
    max_line_ends_per_word: float | None = Field(0.3, description="Line ends per word.")


class RefinedWeb(Family):
    """Penedo et al. 2023, appendix G.2."""

    max_flagged_words: float | None = Field(0.05, description="Share of words in lines of navigation and the like.")


class Language(Family):
    """Which languages stay."""

    columns: ClassVar[dict[str, str]] = {"min_probability": "language_probability"}
    keep: list[str] = Field(default_factory=list, description="ISO 639-1 codes (`en`); empty: all.")
    min_probability: float | None = Field(0.65, ge=0, le=1, description="How sure the identifier must be.")


class Quality(Family):
    """The figure of a `Scorer`: the run's own, or the one named here."""

    columns: ClassVar[dict[str, str]] = {"min_score": "score", "max_score": "score"}
    scorer: str | None = Field(
        None,
        description="`words:PATH` (share of the words in that list), `linear:PATH` (probability by a classifier of "
        "`soma data quality`), `model:PATH` (perplexity of a language model) or an http address.",
    )
    min_score: float | None = Field(None, description="Documents with a lower score are dropped.")
    max_score: float | None = Field(None, description="Documents with a higher score are dropped (perplexity).")


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "gopher": {"gopher_repetition": {}, "gopher_quality": {}},
    "c4": {"c4": {}},
    # FineWeb's pipeline: language, Gopher, C4 without the rule on line ends, its own rules.
    "fineweb": {
        "language": {"keep": ["en"]}, "gopher_repetition": {}, "gopher_quality": {}, "c4": {"terminal": False},
        "fineweb": {},
    },
    "refinedweb": {
        "language": {"keep": ["en"]}, "gopher_repetition": {}, "gopher_quality": {}, "refinedweb": {},
    },
}  # fmt: skip


def _as_presets(value: Any) -> Any:
    """`filters: gopher` and `filters: [gopher, c4]` name presets."""
    if isinstance(value, str):
        value = [value]
    return {"presets": value} if isinstance(value, list) else value


class FiltersConfig(BaseModel):
    """Which documents stay, by their attributes. A preset turns families on; a family's own block overrides it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    presets: list[Preset] = Field(
        default_factory=list, description="Published filters: gopher, c4, fineweb, refinedweb."
    )
    language: Language | None = Field(None, description="By language.")
    gopher_repetition: GopherRepetition | None = Field(None, description="Gopher's repetition rules.")
    gopher_quality: GopherQuality | None = Field(None, description="Gopher's quality rules.")
    c4: C4 | None = Field(None, description="C4's rules for pages.")
    fineweb: FineWeb | None = Field(None, description="FineWeb's own rules.")
    refinedweb: RefinedWeb | None = Field(None, description="RefinedWeb's rule on flagged lines.")
    quality: Quality | None = Field(None, description="By the score of a model.")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names = value.get("presets") or []
        value = dict(value)
        for name in [names] if isinstance(names, str) else names:
            for family, settings in PRESETS.get(name, {}).items():
                own = value.get(family) or {}
                value[family] = {**settings, **own} if isinstance(own, dict) else own
        return value

    @property
    def families(self) -> list[str]:
        """The families that are on, in order."""
        return [name for name in type(self).model_fields if name != "presets" and getattr(self, name) is not None]

    @property
    def signals(self) -> list[str]:
        """The signals that they need; C4 without its rule on line ends is one of its own."""
        any_c4 = self.c4 is not None and not self.c4.terminal
        return ["c4_any" if name == "c4" and any_c4 else name for name in self.families]

    def rules(self) -> list[Rule]:
        """All rules that are on, in order."""
        return [rule for name in self.families for rule in getattr(self, name).rules(name)]


Filters = Annotated[FiltersConfig, BeforeValidator(_as_presets)]
