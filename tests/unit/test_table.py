"""Tables in files, compared with what pandas and scikit-learn make of the same."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sklearn.preprocessing import LabelEncoder, OneHotEncoder, OrdinalEncoder, StandardScaler
from tables import config, everything, frame, opened, write

from raytorch.datasets import load_splits
from raytorch.errors import ConfigError, DataError, UserError
from raytorch.sources import csv_tables

CPU = torch.device("cpu")
NUMBERS = ["wide", "whole", "yes"]
FORMATS = ["parquet", "csv", "csv.gz", "tsv", "feather", "arrow", "ipc"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "train/a.parquet", frame())
    write(tmp_path / "test/a.parquet", frame(60, seed=1))
    return tmp_path


def expected_numbers(data: pandas.DataFrame) -> np.ndarray[Any, Any]:
    return data[NUMBERS].astype("float64").to_numpy()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_what_scikit_learn_makes_of_it(tmp_path: Path, kind: str) -> None:
    data, more = frame(), frame(60, seed=1)
    write(tmp_path / f"train/a.{kind}", data[:150])
    write(tmp_path / f"train/b.{kind}", data[150:])
    write(tmp_path / f"test.{kind}", more)
    keys = {"missing": "mean", "standardize": True, "categories": "one_hot", "test": f"test.{kind}"}
    scaler, cities, classes = StandardScaler(), OneHotEncoder(sparse_output=False), LabelEncoder()
    scaler.fit(expected_numbers(data))
    cities.fit(data[["city"]])
    classes.fit(data["y"])
    for split, part in (("train", data), ("test", more)):
        features, targets = everything(opened(tmp_path, split, **keys))
        scaled = np.nan_to_num(scaler.transform(expected_numbers(part)))
        expected = np.hstack([scaled, cities.transform(part[["city"]])])
        np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-6)
        assert (features.dtype, targets.dtype) == (np.float32, np.int64)
        assert targets.tolist() == classes.transform(part["y"]).tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_the_same_in_any_order_and_after_a_way_to_another_process(tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"train/a.{kind}", frame(), rows=16)
    table = opened(tmp_path, test=0.1)
    features, targets = everything(table)
    rng = np.random.default_rng(0)
    for size in (1, 7, 300, 300):
        indices = torch.from_numpy(rng.integers(0, 250, size))
        for each in (table, pickle.loads(pickle.dumps(table))):
            found = each.batch(indices)
            assert (found[0].numpy() == features[indices]).all()
            assert (found[1].numpy() == targets[indices]).all()
    assert int(table.blocks.sum()) == 250


def test_rows_are_read_one_by_one_from_many_mapped_blocks(tmp_path: Path) -> None:
    """Those of numbers that are all there, with others that lack some beside them."""
    data = frame(4000).assign(full=range(4000), small=np.arange(4000, dtype=np.int8))
    for file in range(2):
        write(tmp_path / f"train/{file}.arrow", data[file * 2000 : (file + 1) * 2000], rows=700)
    table = opened(tmp_path, features=["full", "wide", "small", "whole", "city"], test=0.1)
    indices = torch.from_numpy(np.random.default_rng(0).permutation(4000)[:50])
    features, targets = table.batch(indices)
    expected = data.iloc[indices.numpy()]
    cities = expected["city"].map({"Oslo": 0, "a,b": 1, "Århus": 2})
    numbers = expected[["full", "wide", "small", "whole"]].astype("float64").fillna(0)
    assert np.array_equal(features, np.column_stack([numbers, cities]).astype(np.float32))
    assert targets.tolist() == expected["y"].map({"no": 0, "perhaps": 1, "yes": 2}).tolist()


def test_facts_are_all_that_turns_a_row_into_a_models_input(root: Path) -> None:
    data = frame()
    keys = {"missing": "mean", "standardize": True, "categories": "one_hot", "unknown": "other"}
    for split in ("train", "test"):
        facts = opened(root, split, **keys).facts
        assert facts["input_shape"] == [7]
        assert facts["feature_names"] == [*NUMBERS, "city=Oslo", "city=a,b", "city=Århus", "city (other)"]
        assert facts["feature_categories"] == {"city": ["Oslo", "a,b", "Århus"]}
        assert (facts["num_classes"], facts["classes"]) == (3, ["no", "perhaps", "yes"])
        numbers = data[NUMBERS].astype("float64")
        assert facts["feature_means"] == pytest.approx(numbers.mean().to_dict(), rel=1e-12)
        assert facts["feature_deviations"] == pytest.approx(numbers.std(ddof=0).to_dict(), rel=1e-9)


def test_categories_become_their_numbers_and_unknown_ones_one_of_their_own(root: Path) -> None:
    more = frame(60, seed=1)
    more.loc[3, "city"] = "Rome"
    more.loc[5, "city"] = None
    write(root / "test/a.parquet", more)
    features, _ = everything(opened(root, "test", features=["city"], unknown="other"))
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=3, encoded_missing_value=3)
    encoder.fit(frame()[["city"]])
    assert features.tolist() == encoder.transform(more[["city"]]).tolist()


def test_a_column_that_does_not_vary_is_zero(root: Path) -> None:
    write(root / "train/a.parquet", frame().assign(wide=3.5))
    assert not everything(opened(root, features=["wide"], standardize=True))[0].any()


def test_columns_are_chosen_by_name_and_pattern_in_their_order(root: Path) -> None:
    data = frame().assign(id=range(250))
    data.index = data.index + 7
    write(root / "train/a.parquet", data)
    parquet.write_table(pa.Table.from_pandas(data.reset_index(names="__index_level_0__")), root / "train/a.parquet")
    named = [
        (opened(root, test=0.1, **keys).facts["feature_names"])
        for keys in ({"ignore": ["id"]}, {"features": ["yes", "w*"]}, {"features": ["*"], "ignore": ["i*", "_*"]})
    ]
    assert named == [[*NUMBERS, "city"], ["yes", "wide", "whole"], [*NUMBERS, "city"]]


@pytest.mark.parametrize(
    ("values", "keys", "kind", "classes"),
    [
        ([1, 0, 5], {}, torch.int64, [0, 1, 5]),
        ([True, False, True], {}, torch.int64, [False, True]),
        (["b", "a", "b"], {}, torch.int64, ["a", "b"]),
        (pandas.Categorical(["b", "a", "b"]), {}, torch.int64, ["a", "b"]),
        ([1.5, 0.5, 2.0], {}, torch.float32, None),
        ([1.0, 0.0, 1.0], {"task": "classification"}, torch.int64, [0.0, 1.0]),
        ([1, 0, 5], {"task": "regression"}, torch.float32, None),
    ],
)
def test_the_task_follows_from_the_target(root: Path, values: Any, keys: Any, kind: torch.dtype, classes: Any) -> None:
    write(root / "train/a.parquet", pandas.DataFrame({"x": [1.0, 2.0, 3.0], "y": values}))
    table = opened(root, **keys)
    _, targets = table.batch(torch.tensor([0, 1, 2]))
    assert targets.dtype == kind
    assert table.facts.get("classes") == classes
    assert table.facts.get("num_classes") == (classes and len(classes))
    expected = values if classes is None else [classes.index(value) for value in values]
    assert targets.tolist() == expected
    assert table.labels is None if classes is None else table.labels.tolist() == expected


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"target": "z"}, "train/a.parquet: no column z, for data.target; it has 'wide', 'whole', 'yes', 'city', 'y'"),
        ({"features": ["wde"]}, "no column wde, for data.features; it has .* \\(did you mean 'wide'\\?\\)"),
        ({"ignore": ["x*"]}, r"no column x\*, for data.ignore; "),
        ({"categories": "error"}, "column city is of large_string; set data.categories to codes or one_hot, or leave"),
        ({"task": "regression"}, "column y is of large_string, which is no number; data.task: regression"),
        ({"ignore": ["*"]}, "no column is left as a feature"),
        ({"train": "more/header.csv", "features": ["a"], "test": 0.1}, "Table is empty"),
        ({"train": "more/bad.parquet"}, "bad.parquet: expected a parquet file, whole and undamaged: "),
        ({"train": "more/bad.arrow"}, r"bad.arrow: expected an Arrow IPC \(Feather 2\) file, whole and undamaged: "),
        ({"train": "more/short.parquet"}, "short.parquet: expected a parquet file, whole and undamaged: "),
        ({"train": "more/times.parquet"}, r"column time is of timestamp.*; expected numbers or text, or leave it out"),
        ({"train": ["train", "more/text.parquet"]}, "text.parquet: expected numbers in column wide, of double in the "),
        ({"train": ["train", "more/few.parquet"]}, "few.parquet: no column city; it has 'wide', 'whole', 'yes', 'y'"),
        ({"train": "more/none.csv"}, "none.csv: expected comma-separated values below a line of names: Empty CSV"),
        ({"train": "more/a.txt"}, "a.txt: expected a table, of a name that ends with .parquet, .pq, .arrow, "),
        ({"train": "more/empty.parquet", "missing": "mean"}, "the training files have no number in column wide"),
        ({"train": "more/endless.parquet", "standardize": True}, "column wide of the training files has infinite"),
    ],
)
def test_what_is_not_in_order_is_told_at_the_start(root: Path, data: Any, told: str) -> None:
    write(root / "more/times.parquet", frame().assign(time=pandas.Timestamp("2026-01-01")))
    write(root / "more/text.parquet", frame().assign(wide="1.0"))
    write(root / "more/few.parquet", frame().drop(columns="city"))
    write(root / "more/empty.parquet", frame().assign(wide=np.nan))
    write(root / "more/endless.parquet", frame().assign(wide=np.inf))
    for name in ("bad.parquet", "bad.arrow", "a.txt"):
        (root / "more" / name).write_bytes(b"PAR1 but not really")
    (root / "more/none.csv").write_bytes(b"")
    (root / "more/header.csv").write_bytes(b"a,y\n")
    (root / "more/short.parquet").write_bytes((root / "train/a.parquet").read_bytes()[:-300])
    with pytest.raises(UserError, match=told) as caught:
        load_splits(config(root, **data), CPU)
    assert "\n" not in str(caught.value)


def test_many_whole_numbers_are_no_classes_unless_that_is_said(root: Path) -> None:
    write(root / "train/a.parquet", pandas.DataFrame({"x": range(1200), "y": range(1200)}))
    with pytest.raises(DataError, match=r"column y .* has more than 1,000 different values: say data.task: regression"):
        opened(root)
    assert opened(root, task="classification").facts["num_classes"] == 1200


@pytest.mark.parametrize(
    ("change", "keys", "told"),
    [
        ({"wide": np.nan}, {}, "column wide: a number is missing; set data.missing to mean or zero, or leave the row"),
        ({"whole": None}, {}, "column whole: a number is missing; "),
        ({"city": None}, {}, "column city: a value is missing; set data.missing to zero and data.unknown to other "),
        ({"city": None}, {"missing": "mean"}, "column city: a value is missing; set data.unknown to other to give it"),
        ({"city": None}, {"unknown": "other"}, "column city: a value is missing; set data.missing to zero to give it"),
        ({"city": "Rome"}, {}, "column city: expected one of the 3 values of the training files, found 'Rome'; set d"),
        ({"y": None}, {"missing": "mean"}, "column y: the target is missing; leave the row out of the file"),
        ({"y": "never"}, {"unknown": "other"}, "column y: expected one of the 3 values of .*, found 'never'$"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_that_cannot_be_taken_is_named_when_it_is_read(
    tmp_path: Path, kind: str, change: dict[str, Any], keys: Any, told: str
) -> None:
    data = frame().dropna().reset_index(drop=True)
    write(tmp_path / "train.parquet", data)
    for name, value in change.items():
        data.loc[45, name] = value
    write(tmp_path / f"test/1.{kind}", data[:10])
    write(tmp_path / f"test/2.{kind}", data[10:], rows=20)
    table = opened(tmp_path, "test", **{"train": "train.parquet", "missing": "error"} | keys)
    assert len(table.batch(torch.tensor([44, 46, 3]))[1]) == 3
    with pytest.raises(DataError, match=rf"/test/2.{kind}: row 36: {told}"):
        table.batch(torch.tensor([44, 46, 45, 3]))


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_cell_of_another_type_than_the_first_ones_is_told_with_its_line(tmp_path: Path, gzipped: bool) -> None:
    name = "b.csv.gz" if gzipped else "b.csv"
    data = frame(30).astype({"wide": object})
    write(tmp_path / "train/a.csv", data)
    data.loc[20, "wide"] = "12,5"
    write(tmp_path / "train" / name, data)
    with pytest.raises(DataError, match=rf"{name}: line 22: expected a number, as in the first lines .*'12,5'$"):
        opened(tmp_path)


def test_a_line_of_too_few_cells_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,y\n1,2.5\n2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.csv: line 3: .*Expected 2 columns, got 1: 2"):
        opened(tmp_path, train="train.csv")


def test_whole_numbers_at_the_start_of_a_file_may_be_followed_by_fractions(tmp_path: Path) -> None:
    rows = "".join(f"{number},0.5\n" for number in range(1_000_000))  # more than is read at once
    (tmp_path / "train.csv").write_text(f"a,y\n{rows}0.25,1.5\n", encoding="utf-8")
    table = opened(tmp_path, train="train.csv")
    assert [each.tolist() for each in table.batch(torch.tensor([1_000_000, 7]))] == [[[0.25], [7.0]], [1.5, 0.5]]


def test_a_file_is_converted_once_for_all_splits_and_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train/a.csv", frame())
    table = opened(tmp_path, test=0.1)
    moved = pickle.dumps(table)
    monkeypatch.setattr(csv_tables, "_blocks", None)
    test = opened(tmp_path, "test", test=0.1)
    for other in (test, pickle.loads(moved), pickle.loads(pickle.dumps(pickle.loads(moved)))):
        assert (everything(other)[0] == everything(table)[0]).all()


def test_a_file_is_converted_anew_where_the_process_that_did_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "train/a.csv", frame())
    table = opened(tmp_path, test=0.1)
    moved = pickle.dumps(table)
    of_another = re.sub(rb"/fd/\d+", lambda found: b"/fd/".ljust(len(found[0]), b"0"), moved)  # of the same length
    for gone in (moved.replace(b"/proc/", b"/none/"), of_another):
        assert gone != moved
        assert (everything(pickle.loads(gone))[0] == everything(table)[0]).all()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"features": ["y", "wide"]}, "data.features: y is the target, and cannot be a feature as well"),
        ({"categories": "error", "unknown": "other"}, "unknown: other goes with categories: codes or one_hot"),
        ({"target": ""}, "data.target: "),
        ({"features": []}, "data.features: "),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_is_read(data: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(Path("nowhere"), **data)
    assert told in str(caught.value)
