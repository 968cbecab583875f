"""Text in tables: categories, and numbers of which some cells are none."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from tables import config, everything, opened, write

from raytorch.errors import ConfigError, DataError
from raytorch.sources import csv_tables


def areas(rows: int = 2500, **spoiled: Any) -> pandas.DataFrame:
    """A column of numbers as text, and what takes their place in rows such as ``r7``."""
    areas = pandas.Series(np.arange(rows) % 1100 / 4 + 20).astype(str)
    for row, value in spoiled.items():
        areas[int(row[1:])] = value
    return pandas.DataFrame({"area": areas, "y": np.arange(rows) % 7})


@pytest.mark.parametrize("categories", ["error", "codes", "one_hot"])
@pytest.mark.parametrize(("kind", "place"), [("csv", "line 2,001"), ("parquet", "row 2,000"), ("arrow", "row 2,000")])
def test_a_cell_that_is_no_number_is_named_and_makes_no_categories(
    tmp_path: Path, kind: str, place: str, categories: str
) -> None:
    write(tmp_path / f"train.{kind}", areas(r1999="n.k.", r2400="?"), rows=2500 if categories == "error" else 100)
    told = (
        rf"train.{kind}: {place}: column area: expected a number, as in most rows, found 'n.k.' "
        r"\(and in other rows '\?'\); mend it, or leave the cell empty .*, name the column in data.categorical$"
    )
    with pytest.raises(DataError, match=told):
        opened(tmp_path, train=f"train.{kind}", test=0.1, categories=categories)


@pytest.mark.parametrize("keys", [{}, {"task": "regression"}])
def test_a_target_that_is_no_number_is_named_and_makes_no_classes(tmp_path: Path, keys: Any) -> None:
    data = areas(r1999="n.k.").rename(columns={"area": "y", "y": "x"})
    write(tmp_path / "train.csv", data)
    told = r"line 2,001: column y: .* found 'n.k.'; mend it, or leave the row out; of classes set data.task: class"
    with pytest.raises(DataError, match=told):
        opened(tmp_path, train="train.csv", test=0.1, **keys)
    said = opened(tmp_path, train="train.csv", test=0.1, task="classification")
    assert said.facts["num_classes"] == 1101


def test_numbers_with_a_comma_are_no_categories(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", pandas.DataFrame({"x": [f"{each},5" for each in range(20)], "y": 0.5}))
    with pytest.raises(DataError, match=r"line 2: column x: .* found '0,5' .*; write it with a point"):
        opened(tmp_path, train="train.csv", test=0.1, categories="one_hot")


@pytest.mark.parametrize(
    "values",
    [
        ["1", "2", "3", "A"],
        ["red", "blue"],
        [str(each) for each in range(100)],
        [f"{each % 30}{each}A" for each in range(50)],
    ],
)
def test_what_is_text_otherwise_is_categories(tmp_path: Path, values: list[str]) -> None:
    write(tmp_path / "train.parquet", pandas.DataFrame({"x": values, "y": 0.5}))
    table = opened(tmp_path, train="train.parquet", test=0.1, categories="one_hot")
    assert table.facts["feature_categories"] == {"x": sorted(values)}


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
@pytest.mark.parametrize("last", [10117, "CH-1"])
def test_columns_that_are_said_to_be_categories_are(tmp_path: Path, kind: str, last: Any) -> None:
    zips = pandas.Series([20095, 10115, 10115, 7, 8, 9, last])
    zips = zips.astype(str) if isinstance(last, str) else zips
    write(tmp_path / f"train/a.{kind}", pandas.DataFrame({"zip": zips, "x": 0.5, "y": range(7)}))
    keys = {"categorical": ["z*"], "test": 0.1}
    table = opened(tmp_path, categories="one_hot", unknown="other", missing="error", **keys)
    expected = sorted({str(value) for value in zips})
    assert table.facts["feature_categories"] == {"zip": expected}
    codes = [expected.index(str(value)) for value in zips]
    assert everything(table)[0][:, :-1].argmax(1).tolist() == codes
    assert table.batch(torch.tensor([6, 1]))[0].argmax(1).tolist() == [codes[6], codes[1]]
    assert everything(opened(tmp_path, categories="codes", **keys))[0][:, 0].tolist() == codes


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"categorical": ["zip"], "categories": "error"},
            "data.categorical: categorical goes with categories: codes or",
        ),
        ({"categorical": ["y"]}, "data.categorical: y is the target; set task: classification"),
    ],
)
def test_columns_of_categories_have_to_become_numbers(keys: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(Path("nowhere"), **keys)
    assert told in str(caught.value)


def test_many_features_of_one_column_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"street {number}" for number in range(301)]
    write(tmp_path / "train.parquet", pandas.DataFrame({"x": names, "y": 0.5}))
    opened(tmp_path, train="train.parquet", test=0.1, categories="codes")
    assert not caplog.messages
    opened(tmp_path, train="train.parquet", test=0.1, categories="one_hot")
    assert caplog.messages == [
        "data table: column x has 301 different values in the training files, and categories: one_hot makes a feature "
        "of each; if that is not what you want, take categories: codes, or leave it out: data.ignore"
    ]


@pytest.mark.parametrize("rows", [3, 700_000])  # within the bytes that types follow from, and behind them
def test_text_that_is_not_utf_8_is_told_with_its_line(tmp_path: Path, rows: int) -> None:
    text = "x,city,y\n" + "12345678,Oslo,1\n" * rows + "0,M\u00fcnchen,1\n"
    (tmp_path / "train.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"train.csv: line {rows + 2:,}: expected text in UTF-8[,;] .* Latin-1"):
        opened(tmp_path, train="train.csv", test=0.1, categories="codes")


@pytest.mark.parametrize(
    ("kind", "delimiter"), [("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", ","), ("tsv.gz", ";")]
)
def test_what_stands_between_columns_is_a_key(tmp_path: Path, kind: str, delimiter: str) -> None:
    data = pandas.DataFrame({"x": [1.5, 2.5], "y": [0.5, 1.0]})
    data.to_csv(tmp_path / f"train.{kind}", index=False, sep=delimiter)
    told = rf"train.{kind}: expected '.*' between columns, found one column, 'x.*y'; set data.delimiter to "
    with pytest.raises(DataError, match=told + re.escape(json.dumps(delimiter)) + "$"):
        opened(tmp_path, train=f"train.{kind}", test=0.5)
    table = opened(tmp_path, train=f"train.{kind}", test=0.5, delimiter=delimiter)
    assert [each.tolist() for each in everything(table)] == [[[1.5], [2.5]], [0.5, 1.0]]


def test_a_file_that_is_not_in_order_leaves_no_thread_that_ends_the_process_badly(tmp_path: Path) -> None:
    """Arrow's threads read ahead, and must not be in Python any more when it ends."""
    (tmp_path / "train.csv").write_text(
        "x,y\n" + "1.5,0.5\n" * 2_500_000 + "n.k.,1\n" + "1.5,0.5\n" * 2_500_000, "utf-8"
    )
    sources = []
    with pytest.MonkeyPatch.context() as patched:
        made = csv_tables._Ahead.__init__
        patched.setattr(csv_tables._Ahead, "__init__", lambda self, *of: (sources.append(self), made(self, *of))[1])
        with pytest.raises(DataError, match=r"line 2,500,002: expected a number"):
            opened(tmp_path, train="train.csv", test=0.1)
    assert len(sources) == 2
    assert all(source._ended.is_set() for source in sources)


def test_rows_are_shown_by_the_names_of_their_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", pandas.DataFrame({"area": [72.25, 10], "city": ["Oslo", "Bonn"], "y": ["no", "yes"]}))
    table = opened(tmp_path, train="train.csv", test=0.5)
    assert table.describe(table.batch(torch.tensor([1, 0]))) == [
        {"y": "yes", "area": "10", "city": "0"},
        {"y": "no", "area": "72.25", "city": "1"},
    ]


def test_an_empty_cell_is_not_what_spoils_a_column(tmp_path: Path) -> None:
    rows = ["area,y", *("" if row == 5 else "n.k." if row == 100 else str(row) for row in range(200))]
    (tmp_path / "a.csv").write_text(
        "\n".join([rows[0], *(f"{row},{n % 2}" for n, row in enumerate(rows[1:]))]), encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"a.csv: line 102: column area: expected a number, .* found 'n.k.'; mend it"):
        opened(tmp_path, train="a.csv", test=0.1, categories="error")
