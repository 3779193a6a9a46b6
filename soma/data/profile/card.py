"""The data card that lies in every corpus: `README.md` with the header that Hugging Face reads
(huggingface.co/docs/hub/ datasets-cards), written from what the corpus stage knows. It holds nothing that would differ
between two equal runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from soma.base.axes import number, percent
from soma.base.secrets import redact_url
from soma.base.units import human_bytes
from soma.data.catalogue import CATALOGUE, Known
from soma.data.config import DataConfig

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
         (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip
# Licences of the catalogue as the hub names them; what it has no name for is `other`.
HUB_LICENCES = {
    "CC BY-SA 3.0": "cc-by-sa-3.0", "CC BY-SA 4.0 and GFDL": "cc-by-sa-4.0", "ODC-BY 1.0": "odc-by",
    "PSF License": "psfl",
}  # fmt: skip
UNKNOWN = "not known to Soma: find out and write it here before you pass this corpus on"
REASONS = 15
FILES = 5


def known_source(source: str) -> Known | None:
    """The corpus of the catalogue that a source is from."""
    return next((known for known in CATALOGUE.values() if source in known.data.get("sources", [])), None)


def data_card(config: DataConfig, report: dict[str, Any]) -> str:
    """Markdown with a YAML header, of a corpus's settings and its `report.json`."""
    known = [(source, known_source(source)) for source in config.sources]
    documents = sum(facts["documents"] for facts in report["splits"].values())
    parts = [
        _header(known, report, documents),
        "# Text corpus\n\nMade by Soma from the sources below. "
        f"{documents:,} documents, {human_bytes(sum(facts['bytes'] for facts in report['splits'].values()))} of text. "
        f"Corpus hash `{report['corpus_hash']}`.",
        "## Sources and licences\n\n" + _table(["Source", "Corpus", "Licence"], list(_sources(known, report))),
        "## Splits\n\n" + _table(
            ["Split", "Documents", "Bytes", "Characters", "Lines"],
            [[split, *(f"{facts[key]:,}" for key in ("documents", "bytes", "chars", "lines"))]
             for split, facts in report["splits"].items()],
        ),
        "Columns: `id` (hash of the text), `text`, `source`, `meta` (JSON), `kind`, `n_bytes`, `n_chars`, `cluster` "
        "(documents that are alike share it and lie in one split).",
        "## How it was made\n\n" + _table(
            ["After", "Documents", "Bytes"],
            [[step["step"], f"{step['documents']:,}", f"{step['bytes']:,}"] for step in report["steps"]],
        ),
        "\n".join(f"* {line}" for line in _choices(config)),
        "## What was set aside\n\n" + (_table(["Reason", "Count"], [
            [one["reason"].replace("_", " "), f"{one['count']:,}"] for one in report["dropped"][:REASONS]
        ]) if report["dropped"] else "Nothing."),
        "## What is in it\n\n" + "\n".join(f"* {line}" for line in _content(report)),
        "## Personal data\n\n" + _personal(config),
        "## Known limits\n\n" + "\n".join(f"* {line}" for line in _limits(config)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _header(known: Sequence[tuple[str, Known | None]], report: dict[str, Any], documents: int) -> str:
    licences = {HUB_LICENCES.get(one.licence, "other") if one else "unknown" for _, one in known}
    splits = [split for split, facts in report["splits"].items() if facts["documents"]]
    header: dict[str, Any] = {
        "pretty_name": "Text corpus", "license": sorted(licences), "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if documents < limit), "n>1B")],
        "tags": ["soma"],
        "configs": [
            {"config_name": "default",
             "data_files": [{"split": split, "path": f"{split}-[0-9]*.parquet"} for split in splits]}
        ],
        "dataset_info": {
            "splits": [
                {"name": split, "num_bytes": report["splits"][split]["bytes"],
                 "num_examples": report["splits"][split]["documents"]} for split in splits
            ]
        },
    }  # fmt: skip
    return "---\n" + str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True)) + "---"


def _sources(known: Sequence[tuple[str, Known | None]], report: dict[str, Any]) -> Iterator[list[str]]:
    """Local paths are left out: the same texts in another folder are the same corpus."""
    for source, one in known:
        if one is not None or "://" in source:
            shown = redact_url(source) if "://" in source else source
            yield [f"`{shown}`", one.title if one else "", one.licence if one else UNKNOWN]
    if any(one is None and "://" not in source for source, one in known):
        names = ", ".join(f"`{one['source']}`" for one in report["sources"][:FILES])
        yield ["local files", f"largest: {names}", UNKNOWN]


def _choices(config: DataConfig) -> Iterator[str]:
    """What the recipe decided, in words."""
    clean, dedup = config.clean, config.dedup
    yield f"Unicode {clean.unicode}; documents of at least {clean.min_chars:,} characters, cut at {clean.max_chars:,}"
    if clean.mojibake:
        yield "Text that was decoded as the wrong encoding was repaired"
    if clean.remove_lines:
        yield f"Lines taken out by the rules of {', '.join(clean.remove_lines)}"
    if config.filters is not None:
        rules = ", ".join(f"`{rule.name}` {rule.threshold:g}" for rule in config.filters.rules())
        languages = config.filters.language.keep if config.filters.language is not None else []
        kept = f"; languages {', '.join(languages)}" if languages else ""
        yield f"Filters {', '.join(config.filters.families)}{kept}: {rules or 'none by threshold'}"
    else:
        yield "No quality filter"
    yield "Exact duplicates (up to white space) were " + ("dropped" if dedup.exact else "kept")
    yield (
        f"Near-duplicates were dropped from a Jaccard similarity of {dedup.threshold:g} over {dedup.ngram}-word "
        f"shingles; from {dedup.straddle_threshold:g} on, documents lie in one split"
        if dedup.near
        else "Near-duplicates were kept"
    )
    if dedup.semantic is not None:
        cosine = f"{dedup.semantic.threshold:g} ({dedup.semantic.model})"
        yield f"Documents that say the same were dropped from a cosine of {cosine}"
    if dedup.substring is not None:
        what = {"remove": "cut out", "count": "counted"}[dedup.substring.action]
        yield f"Repeated spans of {dedup.substring.length} {dedup.substring.unit} were {what}"
    if config.decontaminate is not None:
        sets, ngram = len(config.decontaminate.sets), config.decontaminate.ngram
        yield f"Evaluation sets were looked for: {sets} ({ngram} words in a row)"


def _content(report: dict[str, Any]) -> Iterator[str]:
    lengths = report["document_chars"]
    median, p90 = number(lengths["median"]), number(lengths["p90"])
    yield f"Length in characters: median {median}, 90 % up to {p90}, longest {lengths['max']:,}"
    total = max(1, sum(report["characters"].values()))
    classes = list(report["characters"].items())[:6]
    yield "Characters: " + ", ".join(f"{name.replace('_', ' ')} {percent(count / total)}" for name, count in classes)
    yield "Kinds: " + ", ".join(f"{kind} {facts['documents']:,}" for kind, facts in list(report["kinds"].items())[:8])


def _personal(config: DataConfig) -> str:
    if config.clean.mask_personal:
        return (
            "E-mail and IP addresses, phone, card and account numbers and keys of known services were found by their "
            "form and replaced by `<email>`, `<ip>`, …; `meta.masked` counts them. Names and postal addresses have no "
            "form: they are still there, and some of the rest will have been missed."
        )
    return "Nothing was masked (`data.clean.mask_personal`): personal data in the sources is in this corpus as it was."


def _limits(config: DataConfig) -> Iterator[str]:
    yield "Licences are those of the collections; single texts in them can be under others."
    if config.filters is None or config.filters.language is None:
        yield "Languages were neither identified nor chosen."
    if config.decontaminate is None:
        yield "Evaluation sets were not looked for: a benchmark may be part of the text."
    if not config.dedup.near:
        yield "Near-duplicates are still there."
    yield (
        "What the texts say was not checked for truth, harm or balance; `soma data report` shows whom they mention, "
        "and how."
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(names), "|" + "---|" * len(names), *map(line, rows)])
