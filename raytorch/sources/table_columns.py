"""The columns of a table that are read, and what each of them holds."""

from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from raytorch.config.sources import TableData
from raytorch.errors import DataError
from raytorch.system.near_names import did_you_mean

Kind = Literal["numbers", "categories"]
_PANDAS_INDEX = ("", "__index_level_*__")


class Columns(NamedTuple):
    """The columns that are read, by what is in the first of the training files."""

    features: list[str]
    target: str
    types: dict[str, Any]
    """The Arrow type of each, by its name."""
    is_classification: bool
    categorical: frozenset[str] = frozenset()
    """Features that the section says are of categories, whatever their type."""
    delimiter: str | None = None
    """What stands between the columns of text, unless that follows from its name."""

    @property
    def names(self) -> list[str]:
        """All that are read."""
        return [*self.features, self.target]

    def kind(self, name: str) -> Kind:
        """What a column holds."""
        kind = "categories" if name in self.categorical else kind_of(self.types[name])
        assert kind is not None
        return kind

    def is_text(self, name: str) -> bool:
        """Tell whether a column is of text."""
        return kind_of(self.types[name]) == "categories"

    def value_type(self, name: str) -> Any:
        """The type that the values of a column of categories or classes are compared in: numbers as they are written
        where they are said to be categories.
        """
        return pa.large_string() if name in self.categorical else canonical(self.types[name])

    def require_same(self, schema: Any, place: str) -> None:
        """Refuse a file whose columns are not those of the first. Raises DataError."""
        for name in self.names:
            found = kind_of(_field(schema, name, place).type)
            if found != self.kind(name) and name not in self.categorical:
                raise DataError(
                    f"{place}: expected {self.kind(name)} in column {name}, of {self.types[name]} in the first of the "
                    f"training files, found {_field(schema, name, place).type}"
                )


def columns_of(section: TableData, schema: Any, place: str) -> Columns:
    """The columns that a section names, in a file. Raises DataError for one that it does not have or that is neither
    of numbers nor of text.
    """
    _named([section.target], schema.names, "data.target", place)
    features = _features(section, schema.names, place)
    types = {name: _field(schema, name, place).type for name in [*features, section.target]}
    for name, kind in types.items():
        _require_use(section, name, kind, place)
    target = types[section.target]
    has_classes = kind_of(target) == "categories" or pa.types.is_boolean(target) or pa.types.is_integer(target)
    is_classification = section.task == "classification" or (section.task is None and has_classes)
    if is_classification and canonical(target) is None:
        raise DataError(f"{place}: column {section.target} is of {target}, not of whole numbers or text, to be classes")
    named = _named(section.categorical, schema.names, "data.categorical", place)
    return Columns(
        features, section.target, types, is_classification, frozenset(named) & {*features}, section.delimiter
    )


def kind_of(kind: Any) -> Kind | None:
    """What a column of an Arrow type holds; None for what is neither."""
    tests = pa.types
    if tests.is_dictionary(kind):
        return "categories" if canonical(kind) is not None else None
    if tests.is_string(kind) or tests.is_large_string(kind) or tests.is_string_view(kind):
        return "categories"
    is_number = tests.is_integer(kind) or tests.is_floating(kind) or tests.is_decimal(kind)
    return "numbers" if is_number or tests.is_boolean(kind) or tests.is_null(kind) else None


def canonical(kind: Any) -> Any:
    """The type that the values of classes and categories of an Arrow type are compared in; None if they cannot be."""
    tests = pa.types
    if tests.is_dictionary(kind):
        return canonical(kind.value_type)
    if kind_of(kind) == "categories":
        return pa.large_string()
    if tests.is_boolean(kind):
        return pa.bool_()
    return pa.int64() if tests.is_integer(kind) else pa.float64() if tests.is_floating(kind) else None


def _features(section: TableData, names: list[str], place: str) -> list[str]:
    ignored = {*_named(section.ignore, names, "data.ignore", place), section.target}
    if section.features is None:
        chosen = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _PANDAS_INDEX)]
    else:
        chosen = _named(section.features, names, "data.features", place)
    features = [name for name in chosen if name not in ignored]
    if not features:
        raise DataError(f"{place}: no column is left as a feature; it has {_listed(names)}")
    return features


def _named(wanted: list[str], names: list[str], key: str, place: str) -> list[str]:
    """The columns of some names and patterns, each once, in the order of these and then of the file."""
    found: dict[str, None] = {}
    for name in wanted:
        matching = [name] if name in names else [each for each in names if "*" in name and fnmatchcase(each, name)]
        if not matching:
            raise DataError(f"{place}: no column {name}, for {key}; it has {_listed(names)}{did_you_mean(name, names)}")
        found |= dict.fromkeys(matching)
    return list(found)


def _field(schema: Any, name: str, place: str) -> Any:
    places = schema.get_all_field_indices(name)
    if not places:
        raise DataError(f"{place}: no column {name}; it has {_listed(schema.names)}{did_you_mean(name, schema.names)}")
    if len(places) > 1:
        raise DataError(f"{place}: {len(places)} columns are called {name}; give them names of their own")
    return schema.field(places[0])


def _require_use(section: TableData, name: str, kind: Any, place: str) -> None:
    is_feature = name != section.target
    rest = ", or leave it out: data.ignore" if is_feature else ""
    if kind_of(kind) is None:
        raise DataError(f"{place}: column {name} is of {kind}; expected numbers or text{rest}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown} and {len(names) - 20:,} others" if len(names) > 20 else shown
