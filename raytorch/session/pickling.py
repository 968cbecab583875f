"""Pickles of what may be code of the user's own: by value, where the other side cannot import it."""

import io
from types import CodeType
from typing import Any

import cloudpickle


class Pickler(cloudpickle.Pickler):
    """Pickles code with the name of the file that it was written in, for tracebacks and ``inspect.getsource``.

    Of itself cloudpickle 3.1.3 puts ``<dynamic-code>`` in its place, older ones do not.
    """

    def reducer_override(self, value: Any) -> Any:
        """How ``value`` is pickled."""
        if type(value) is CodeType:
            _, parts = self.dispatch_table[CodeType](value)
            return _code, (value.co_filename, parts)
        return super().reducer_override(value)


def dumps(value: Any, pickler: type[Pickler] = Pickler) -> bytes:
    """``value`` as bytes, for ``pickle.loads``."""
    file = io.BytesIO()
    pickler(file).dump(value)
    return file.getvalue()


def _code(file: str, parts: tuple[Any, ...]) -> CodeType:
    return CodeType(*parts).replace(co_filename=file)
