"""Known corpora: what they are, under which licence, how to get them, what it costs; each with a recipe's source block.

Sizes are those that the makers (or the reference named) state; None where they state none. Costs are reckoned from the
size: a download at 100 Mbit/s, reading at `READ_MB_S` a core, and disk for the files, the partitions and the corpus.
"""

from dataclasses import dataclass, field
from typing import Any

DOWNLOAD_MB_S = 12.5  # 100 Mbit/s
READ_MB_S = 3.3  # text read, cleaned, measured and signed by one core (docs/lab.md)
DISK = 1.7  # for each byte of text: compressed partitions and sorted corpus, beside the downloaded files


@dataclass(frozen=True)
class Known:
    """A corpus. `text_gb`: of plain text; `download_gb`: what is fetched; `data`: the recipe's block, empty where it
    cannot be fetched without asking somebody."""

    name: str
    title: str
    licence: str
    languages: str
    how: str
    reference: str
    text_gb: float | None = None
    download_gb: float | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def cost(self, cores: int = 1) -> dict[str, float] | None:
        """Disk (GB) and hours of download and of reading; None where no size is stated."""
        text = self.text_gb
        if text is None:
            return None
        fetched = self.download_gb or text
        return {
            "disk_gb": fetched + DISK * text, "download_hours": fetched * 1000 / DOWNLOAD_MB_S / 3600,
            "read_hours": text * 1000 / READ_MB_S / 3600 / cores,
        }  # fmt: skip


def _hub(path: str) -> list[str]:
    return [f"hf://datasets/{path}"]


CATALOGUE = {
    known.name: known
    for known in (
        Known(
            "wikitext-2", "WikiText-2, good and featured articles", "CC BY-SA 3.0", "English", "Hugging Face, open",
            "Merity et al. 2016, arXiv 1609.07843", 0.013, 0.005,
            {"sources": _hub("Salesforce/wikitext/wikitext-2-raw-v1/train-*.parquet")},
        ),
        Known(
            "wikitext-103", "WikiText-103, good and featured articles", "CC BY-SA 3.0", "English", "Hugging Face, open",
            "Merity et al. 2016, arXiv 1609.07843", 0.54, 0.31,
            {"sources": _hub("Salesforce/wikitext/wikitext-103-raw-v1/train-*.parquet")},
        ),
        Known(
            "wikipedia", "Wikipedia dumps, any language (pages-articles, XML)", "CC BY-SA 4.0 and GFDL", "over 300",
            "dumps.wikimedia.org, open; Simple English here, put another wiki's name in its place",
            "dumps.wikimedia.org",
            data={"sources": [
                "https://dumps.wikimedia.org/simplewiki/latest/simplewiki-latest-pages-articles.xml.bz2"
            ]},
        ),
        Known(
            "wiki40b", "Wiki-40B, cleaned Wikipedia (40 billion characters)", "CC BY-SA 3.0", "over 40",
            "Hugging Face, open; English here, put another language's folder in its place",
            "Guo et al. 2020, LREC, 2020.lrec-1.297",
            data={"sources": _hub("google/wiki40b/en/train-*.parquet")},
        ),
        Known(
            "europarl", "Europarl v7, proceedings of the European Parliament", "no known restriction",
            "21 of the European Union", "statmt.org, open: one archive; unpack it and name its text files",
            "Koehn 2005, MT Summit X; statmt.org/europarl", None, 1.5, {"sources": ["europarl/txt/en/**/*.txt"]},
        ),
        Known(
            "common-crawl-wet", "Common Crawl, text of pages (WET), the first file of each segment of a monthly crawl",
            "Common Crawl's terms of use; pages belong to their publishers", "over 160",
            "S3 with any AWS account; or the https addresses that wet.paths.gz of the crawl lists",
            "commoncrawl.org/get-started",
            data={"sources": [
                "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/*/wet/*-00000.warc.wet.gz"
            ], "filters": ["fineweb"]},
        ),
        Known(
            "common-crawl-warc",
            "Common Crawl, pages as they were (WARC), the first file of each segment of a monthly crawl",
            "Common Crawl's terms of use; pages belong to their publishers", "over 160",
            "S3 with any AWS account; or the https addresses that warc.paths.gz of the crawl lists",
            "commoncrawl.org/get-started",
            data={"sources": [
                "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/*/warc/*-00000.warc.gz"
            ], "filters": ["fineweb"]},
        ),
        Known(
            "openwebtext", "OpenWebText, pages linked from Reddit", "CC0 (packaging); pages belong to their publishers",
            "English", "Hugging Face, open", "Gokaslan and Cohen 2019", 38.0,
            data={"sources": _hub("Skylion007/openwebtext/**/*.parquet")},
        ),
        Known(
            "c4", "C4, English, cleaned Common Crawl of April 2019", "ODC-BY 1.0", "English", "Hugging Face, open",
            "Raffel et al. 2020; Dodge et al. 2021, arXiv 2104.08758", 305.0,
            data={"sources": _hub("allenai/c4/en/c4-train.*.json.gz")},
        ),
        Known(
            "pile", "The Pile, 22 sets of books, code, papers, web", "differs by set; its host took it down in 2023",
            "English", "no longer offered by its makers: name the .jsonl.zst files that you have",
            "Gao et al. 2020, arXiv 2101.00027", 886.0, None, {"sources": ["pile/train/*.jsonl.zst"]},
        ),
        Known(
            "redpajama", "RedPajama 1T, LLaMA's training data made anew", "differs by set", "English, Wikipedia in 20",
            "data.together.xyz, open: 2,084 files, listed in urls.txt; this is the arXiv and web part on Hugging Face",
            "Together 2023; size: simonwillison.net/2023/Apr/17/redpajama-data", 2670.0, None,
            {"sources": _hub("togethercomputer/RedPajama-Data-1T-Sample/*.jsonl")},
        ),
        Known(
            "oscar", "OSCAR 22.01, Common Crawl by language, whole documents",
            "CC0 (packaging); pages belong to their publishers", "151",
            "Hugging Face, after agreeing to its conditions (HF_TOKEN); Latin here",
            "Abadji et al. 2022, arXiv 2201.06642",
            data={"sources": _hub("oscar-corpus/OSCAR-2201/compressed/la_meta/*.jsonl.gz"), "text_field": "content"},
        ),
        Known(
            "fineweb", "FineWeb, filtered Common Crawl, sample of 10 billion tokens", "ODC-BY 1.0", "English",
            "Hugging Face, open", "Penedo et al. 2024, arXiv 2406.17557",
            data={"sources": _hub("HuggingFaceFW/fineweb/sample/10BT/*.parquet")},
        ),
        Known(
            "stdlib", "The standard library of this Python", "PSF License", "Python, English", "on this machine",
            "docs.python.org/3/license.html", 0.012, 0.0, {"sources": ["stdlib:"]},
        ),
    )
}  # fmt: skip


def find(name: str) -> Known:
    """The corpus of that name. Raises UserError with the nearest names."""
    import difflib

    from soma.base.errors import UserError

    if name not in CATALOGUE:
        close = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.4) or sorted(CATALOGUE)
        raise UserError(f"{name}: not in the catalogue; did you mean {', '.join(close)}?")
    return CATALOGUE[name]


def block(known: Known) -> str:
    """The `data:` block of a recipe that reads this corpus, as YAML."""
    import yaml

    comment = f"# {known.title} ({known.licence}); {known.how}\n"
    return comment + str(yaml.safe_dump({"data": known.data}, sort_keys=False, allow_unicode=True, width=200))
