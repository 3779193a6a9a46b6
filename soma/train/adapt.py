"""Start from a finished model and go on with text, conversations or preference pairs of one's own."""

from pathlib import Path
from typing import Literal

from soma.base import progress
from soma.base.artefact import building, json_hash
from soma.base.errors import UserError
from soma.data.config import DataConfig, InstructConfig
from soma.data.corpus import build_corpus
from soma.data.instruct import build_instruct
from soma.data.readers import READ_ERRORS, Dropped, decompress, json_rows
from soma.data.shapes import RowError, shape_of
from soma.data.sources import Item, list_items, source_fingerprint
from soma.data.tokens import tokenize_corpus, tokenize_instruct
from soma.model.folder import local_folder
from soma.model.tokenizer import Tokenizer
from soma.train.config import PreferenceConfig, TrainConfig, TuneConfig
from soma.train.tracking import Tracker
from soma.train.trainer import TrainResult, train

Kind = Literal["text", "instruct", "preference"]
CONFIGS: dict[Kind, type[TrainConfig]] = {"text": TrainConfig, "instruct": TuneConfig, "preference": PreferenceConfig}


def adapt(
    model: str | Path, data: str, config: TrainConfig | None, out: Path, work: Path, tracker: Tracker | None = None
) -> TrainResult:
    """Fine-tune all weights of `model` (a folder, `hf:…`, `registry:…`) on `data` (what `DataConfig.sources` takes).

    What the data is decides what happens: JSON rows of conversations are instruction-tuned on their answers, rows with
    `chosen` and `rejected` go through DPO, all else is read as text. `config` None takes that stage's defaults; else
    it must be of that stage's type. The data is split, cleaned and tokenized with the model's own tokenizer in `work`,
    where a killed run finds it again. Fills `out` as `train` does. Raises UserError as `train` and the data stages do.
    """
    start, kind = local_folder(model), data_kind(data)
    config = config or CONFIGS[kind]()
    if type(config) is not CONFIGS[kind]:
        raise UserError(f"{data} is {kind}, which takes a {CONFIGS[kind].__name__}, not a {type(config).__name__}")
    progress.current().note(f"adapt: {data} is read as {kind}")
    corpus_config = DataConfig(sources=[data], seed=config.seed)
    pairs_config = InstructConfig(sources=[data], seed=config.seed)
    chosen = corpus_config if kind == "text" else pairs_config
    key = json_hash([kind, chosen.model_dump(mode="json"), source_fingerprint([data]), Tokenizer.load(start).hash])[:12]
    corpus, tokens = work / f"corpus-{key}", work / f"tokens-{key}"
    if not corpus.exists():
        with building(corpus) as folder:
            if kind == "text":
                build_corpus(corpus_config, folder)
            else:
                build_instruct(pairs_config, None, folder)
    if not tokens.exists():
        with building(tokens) as folder:
            (tokenize_corpus if kind == "text" else tokenize_instruct)(corpus, start, folder)
    return train(config, out, work / "train", tokens=tokens, tokenizer=start, model=start, tracker=tracker)


def data_kind(data: str) -> Kind:
    """What the first JSON row of the data is; "text" where there is none, or its fields are no known shape."""
    for item in list_items([data]):
        if not isinstance(item, Item) or item.kind != "jsonl":
            continue
        try:
            with item.open() as raw:
                for _, row in json_rows(item, decompress(raw, item.compression)):
                    if isinstance(row, Dropped) or not isinstance(row, dict):
                        continue
                    return "preference" if shape_of(row) == "preference" else "instruct"
        except (*READ_ERRORS, RowError):
            return "text"
    return "text"
