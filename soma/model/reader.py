"""The tensors of a Hugging Face folder one by one, by our names: for who wants some of them, or a piece of each."""

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from soma.base.errors import UserError
from soma.model.folder import local_folder
from soma.model.hub import check_names, check_tensor, describe, load_config, open_weights, parts_of
from soma.model.layout import Entry, disk_layout
from soma.model.safetensors_io import DTYPES
from soma.model.transformer import Transformer


class WeightReader:
    """An open folder. `config`; `dtype` of the token embedding on disk; `reader(name)` is a tensor.

    The folder is checked when it is opened: raises UserError as `hub.load_model` does, and for rounded weights.
    """

    def __init__(self, ref: str | Path) -> None:
        directory = local_folder(ref)
        self.config = load_config(directory)
        self.shapes = Transformer(self.config, device="meta").state_dict()
        self.files, self.location = open_weights(directory, self.config)
        self.parts: dict[str, list[tuple[Entry, int]]] = {}
        try:
            layout = disk_layout(self.config, self.shapes)
            check_names(self.config, directory, layout, self.location)
            for entry in layout:
                file, disk_name = self.location[entry.name]
                check_tensor(file, disk_name, entry, self.shapes)
                for place, (name, _) in enumerate(entry.parts):
                    self.parts.setdefault(name, []).append((entry, place))
            self.dtype = DTYPES[describe(self.location, layout[0].name)[0]]
        except UserError:
            self.close()
            raise

    def __call__(self, name: str) -> Tensor:
        """A whole tensor, in the dtype that it has on disk. Where it lies there as it is, only what is looked at is
        read; it must not be written to."""
        pieces = [self.piece(entry, place) for entry, place in self.parts[name]]
        return pieces[0] if pieces[0].shape == self.shapes[name].shape else torch.stack(pieces)  # experts, in order

    def piece(self, entry: Entry, place: int) -> Tensor:
        """One of our tensors (or one expert of it) out of an entry of the folder."""
        file, disk_name = self.location[entry.name]
        joined = file.mapped(disk_name)
        rows = [part.size(0) for part in parts_of(entry, self.shapes)]
        return (joined.T if entry.transposed else joined).split(rows)[place]

    def close(self) -> None:
        """Close the files. Tensors that were given stay readable."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
