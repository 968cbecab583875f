"""Text files to files of tokens: what ``raytorch data tokenize`` does. Imports no torch."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

from raytorch.errors import DataError
from raytorch.sources.documents import SUFFIXES, Documents
from raytorch.sources.files import File, Root
from raytorch.sources.token_files import SUFFIX, Header, TokenWriter
from raytorch.sources.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from raytorch.system.regular_files import open_regular

Watch = Callable[[int], None]
"""Called with how many bytes of the text have been read."""
TOKENIZER_FILE = "tokenizer.json"
_LOCK = ".tokenize.lock"
_AT_ONCE = 2**21
"""Characters that are encoded at once, by all cores."""
_MOST_TEXTS = 2**13


def open_tokenizer(name: str, root: Root, end_token: str | None = None) -> Tokenizer:
    """The one of that name: ``bytes``, or a file below the root. Raises DataError, and MissingPackageError."""
    if name == "bytes":
        if end_token is not None:
            raise DataError(f"the tokenizer bytes ends documents with a token of its own, and not with {end_token!r}")
        return ByteTokenizer()
    return JsonTokenizer(root.read(name), root.place(name), end_token)


def split_path(path: str) -> tuple[str, Root]:
    """The last name of a path, and what it is below.

    Example:
        >>> name, root = split_path("texts/books")
        >>> name, str(root)
        ('books', 'texts')
    """
    folder, _, name = path.rstrip("/").rpartition("/")
    if name in ("", ".", ".."):
        return "", Root(path)
    return name, Root(folder or ("/" if path.startswith("/") else "."))


def found(paths: Sequence[str]) -> list[tuple[Root, File]]:
    """The text files that are named, and those of folders at any depth, each once. Raises DataError."""
    named = [split_path(path) for path in paths]
    files = [(root, file) for name, root in named for file in root.find([name], SUFFIXES)]
    return list({root.place(file.name): (root, file) for root, file in files}.values())


def tokenize(
    texts: Iterable[Documents],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shares: Mapping[str, float] = {},
    seed: int = 0,
    watch: Watch = lambda position: None,
) -> dict[str, Header]:
    """Write ``train.tokens`` into a folder, and of each of the ``shares`` of the documents a file of its name.

    All get their names when they are complete. One process at a time: others wait, and are refused then, as files that
    are there are not replaced. Raises DataError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _LOCK):
        if there := sorted(path.name for path in folder.glob(f"*{SUFFIX}")):
            raise DataError(f"{folder}: has {', '.join(there)}; delete them, or name another folder")
        with ExitStack() as stack:
            names = ["train", *shares]
            writers = {name: stack.enter_context(TokenWriter(folder / f"{name}{SUFFIX}", tokenizer)) for name in names}
            write_tokens(texts, tokenizer, writers, shares=shares, seed=seed, watch=watch)
            headers = {name: writer.header for name, writer in writers.items()}
            require_documents(headers, shares)
            if tokenizer.file is not None:  # for what decodes the tokens
                (folder / TOKENIZER_FILE).write_bytes(tokenizer.file)
    return headers


def write_tokens(
    texts: Iterable[Documents],
    tokenizer: Tokenizer,
    writers: Mapping[str, TokenWriter],
    *,
    shares: Mapping[str, float] = {},
    seed: int = 0,
    watch: Watch = lambda position: None,
) -> None:
    """Write the documents by the writers, of which ``train`` has those that no share has drawn."""
    draws, left = {}, Fraction(1)
    for name, share in shares.items():  # each is one of all documents, and drawn of those that are left for it
        draws[name] = _Draw(Fraction(repr(share)) / left, seed, name)
        left -= Fraction(repr(share))
    waiting: list[tuple[TokenWriter, str | None]] = []
    size = before = 0
    for text in texts:
        writer = None
        for piece, ends in text.pieces():
            if piece:
                writer = writer or writers[next((name for name, draw in draws.items() if draw.next()), "train")]
                waiting.append((writer, piece))
                size += len(piece)
            if ends and writer:
                waiting.append((writer, None))
                writer = None
            if size >= _AT_ONCE or len(waiting) >= _MOST_TEXTS:
                _write(waiting, tokenizer)
                waiting, size = [], 0
                watch(before + text.position)
        before += text.position
        watch(before)
    _write(waiting, tokenizer)


def require_documents(headers: Mapping[str, Header], shares: Mapping[str, float]) -> None:
    """Refuse a split without documents. Raises DataError."""
    documents = sum(header.documents for header in headers.values())
    if not documents:
        raise DataError("the files hold no text")
    for name, header in headers.items():
        if not header.documents:
            share = f" for a share of {shares[name]:g}" if name in shares else ""
            raise DataError(
                f"{documents:,} documents leave none for the split {name}{share}; take another share, or make "
                "more of them, a document per line, say"
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for other processes that are in such a block."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(waiting: Sequence[tuple[TokenWriter, str | None]], tokenizer: Tokenizer) -> None:
    encoded = iter(tokenizer.encode([text for _, text in waiting if text is not None]))
    for writer, text in waiting:
        if text is None:
            writer.end_document()
        else:
            writer.add(next(encoded), len(text) if text.isascii() else len(text.encode()))


class _Draw:
    """A share of documents of unknown number: one of each stretch of them."""

    def __init__(self, share: Fraction, seed: int, name: str) -> None:
        self._held_out, self._of = share.numerator, share.denominator
        self._seed, self._number = f"{seed} {name}", 0
        self._chosen = -1, -1

    def next(self) -> bool:
        """Tell whether the next document is drawn."""
        number, self._number = self._number, self._number + 1
        stretch = number * self._held_out // self._of
        if stretch != self._chosen[0]:
            self._chosen = stretch, self._drawn(stretch)
        return number == self._chosen[1]

    def _drawn(self, stretch: int) -> int:
        start, stop = (-(-each * self._of // self._held_out) for each in (stretch, stretch + 1))
        digest = hashlib.blake2b(f"{self._seed} {stretch}".encode(), digest_size=8).digest()
        return start + int.from_bytes(digest, "little") % (stop - start)
