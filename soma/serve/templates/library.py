"""A folder of prompts: `NAME/VERSION.yaml`, found as NAME, NAME@VERSION or NAME@VERSION+HASH."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma.base.errors import UserError
from soma.serve.templates.config import NAME, LibraryFile, PromptError, PromptFile, TestsFile
from soma.serve.templates.select import Embed, HttpEncoder
from soma.serve.templates.template import Messages, Rendered, Template
from soma.serve.yaml_file import read_as

if TYPE_CHECKING:
    from soma.model.tokenizer import Tokenizer

REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(@(?P<version>\d{1,9})(\+(?P<hash>[0-9a-f]{8,64}))?)?"
)
SETTINGS, TESTS, SCORES = "library.yaml", "tests.yaml", "scores.jsonl"


class Library:
    """All prompts of a folder, checked. Raises UserError that names file and key.

    embed: makes vectors, in place of the encoder of library.yaml. tokenizer: counts, in place of the one named there.
    """

    def __init__(
        self, folder: Path, *, embed: Embed | None = None, tokenizer: "Tokenizer | None" = None
    ) -> None:  # fmt: skip
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; prompts are files as {folder}/NAME/1.yaml")
        self.folder = folder
        settings = folder / SETTINGS
        given = read_as(LibraryFile, settings) if settings.exists() else LibraryFile()
        if embed is None and given.encoder is not None:
            embed = HttpEncoder(given.encoder)
        if tokenizer is None and given.tokenizer is not None:
            from soma.model.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(folder / given.tokenizer)
        self.embed, self.tokenizer = embed, tokenizer
        self.templates: dict[str, dict[int, Template]] = {}
        for path in sorted(folder.glob("*/*.yaml")):
            if path.name != TESTS:
                self._read(path)

    def _read(self, path: Path) -> None:
        name = path.parent.name
        if not NAME.fullmatch(name):
            raise UserError(f"{path.parent}: a prompt's name has letters, digits, `.`, `_`, `-`, at most 64")
        if not (path.stem.isascii() and path.stem.isdigit() and path.stem == str(int(path.stem)) and int(path.stem)):
            raise UserError(f"{path}: a version is a number from 1, as {path.with_name('1.yaml')}")
        template = Template(name, int(path.stem), read_as(PromptFile, path), str(path))
        self.templates.setdefault(name, {})[template.version] = template

    def __iter__(self) -> "Any":
        """All versions of all prompts, by name and version."""
        return (self.templates[name][version] for name in sorted(self.templates)
                for version in sorted(self.templates[name]))  # fmt: skip

    def get(self, reference: str) -> Template:
        """The version that a reference names; without one, the newest. Raises PromptError 404, 409."""
        found = REFERENCE.fullmatch(reference)
        if found is None:
            raise PromptError(f"prompt {reference[:80]!r}: expected NAME, NAME@VERSION or NAME@VERSION+HASH")
        versions = self.templates.get(found["name"])
        if versions is None:
            raise PromptError(f"there is no prompt {found['name']}", status=404)
        version = int(found["version"]) if found["version"] else max(versions)
        if version not in versions:
            have = ", ".join(map(str, sorted(versions)))
            raise PromptError(f"the prompt {found['name']} has no version {version}; it has {have}", status=404)
        template = versions[version]
        if found["hash"] and not template.hash.startswith(found["hash"]):
            raise PromptError(f"{template.name}@{version} is not what it was: its hash is {template.hash[:8]} now",
                              status=409)  # fmt: skip
        return template

    def render(self, reference: str, variables: Mapping[str, Any]) -> tuple[Template, Rendered]:
        """A prompt, filled in. Raises PromptError."""
        template = self.get(reference)
        return template, template.render(variables, embed=self.embed, count=self.count)

    @property
    def count(self) -> Callable[[Messages | str], int] | None:
        """Counts the tokens of messages (with what the chat template adds) or of a text."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        from soma.engine.prompts import encode_prompt

        def tokens(prompt: Messages | str) -> int:
            if isinstance(prompt, str):
                return len(encode_prompt(tokenizer, prompt))
            if tokenizer.has_chat_template:
                return len(tokenizer.encode_chat(prompt, True, None))
            return sum(len(tokenizer.encode(turn["content"])) for turn in prompt)

        return tokens

    def tests(self, name: str) -> TestsFile:
        """The tests of a prompt. Raises UserError."""
        path = self.folder / name / TESTS
        return read_as(TestsFile, path)
