"""Tables in files that are damaged, or whose files do not agree: an error that names the row, never other numbers."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc, parquet
from sklearn.preprocessing import StandardScaler
from tables import everything, opened

from raytorch.errors import DataError


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("first", "other", "row", "told"),
    [
        ([0, 1, 2, 1], [2.0, 1.7], 2, "expected one of the 3 values of the training files, found 1.7"),
        ([0, 1, 2, 1], [1.0, float("nan")], 2, "the target is missing; leave the row out of the file"),
        ([True, False, True], [0, 5], 2, "expected one of the 2 values of the training files, found 5"),
        (pa.array([1, 2], pa.int64()), pa.array([2**63 + 1], pa.uint64()), 1, "found 9223372036854775809"),
    ],
)
def test_a_class_that_is_none_of_the_first_files_type_is_not_cut_down_to_one(
    tmp_path: Path, first: Any, other: Any, row: int, told: str
) -> None:
    write(tmp_path / "train/a.parquet", x=[0.0] * len(first), y=first)
    write(tmp_path / "test/a.parquet", x=[0.0] * len(other), y=other)
    table = opened(tmp_path, "test")
    with pytest.raises(DataError, match=rf"test/a.parquet: row {row}: column y: .*{told}"):
        table.batch(torch.arange(len(table)))


def test_a_class_of_another_type_that_is_the_same_number_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "train/a.parquet", x=[0.0, 1.0, 2.0], y=[3, 1, 2])
    write(tmp_path / "train/b.parquet", x=[3.0, 4.0], y=pa.array([2.0, 3.0]))
    table = opened(tmp_path, test=0.1)
    assert table.facts["classes"] == [1, 2, 3]
    assert everything(table)[1].tolist() == [2, 0, 1, 1, 2]


def test_categories_in_dictionaries_of_any_text_are_taken(tmp_path: Path) -> None:
    names = pa.array(["b", "a", "c"])
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 1], pa.uint32()), names.cast(kind))
        table = pa.table({"x": column, "y": [0, 1, 0, 1]})
        path = tmp_path / str(kind) / "train/a.arrow"
        path.parent.mkdir(parents=True)
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        assert everything(opened(path.parent.parent, test=0.3))[0].ravel().tolist() == [1, 0, 2, 0]


def test_a_column_that_varies_by_rounding_alone_is_zero(tmp_path: Path) -> None:
    numbers = np.full(1000, 0.1)
    path = tmp_path / "train/a.parquet"
    path.parent.mkdir()
    parquet.write_table(pa.table({"x": numbers, "y": np.arange(1000) % 2}), path, row_group_size=300)
    write(tmp_path / "test/a.parquet", x=[0.1, 0.2], y=[0, 1])
    scaler = StandardScaler().fit(numbers.reshape(-1, 1))
    features, _ = everything(opened(tmp_path, "test", standardize=True))
    np.testing.assert_allclose(features, scaler.transform([[0.1], [0.2]]), atol=1e-7)


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_has_not_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train/a.parquet", x=[0.0, 1e200, 1.0], y=[0, 1, 0])
    with pytest.raises(DataError, match=r"row 2: column x: 1e\+200 is too large for the numbers of a batch"):
        everything(opened(tmp_path, test=0.3))
    with pytest.raises(DataError, match="column x of the training files has numbers that are too large"):
        opened(tmp_path, test=0.3, standardize=True)
    write(tmp_path / "train/a.parquet", x=[0.0, 1.0, 2.0], y=[0.5, -1e300, 1.0])
    with pytest.raises(DataError, match=r"row 2: column y: -1e\+300 is too large for the numbers of a batch"):
        everything(opened(tmp_path, test=0.3))


def test_damaged_arrow_files_give_errors_and_end_no_process(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        import numpy as np, pyarrow as pa
        from pyarrow import ipc
        from raytorch.errors import DataError
        from tables import everything, opened

        root = Path(sys.argv[1])
        path = root / "train/a.arrow"
        path.parent.mkdir()
        text = pa.array([f"v{n % 5}" for n in range(300)])
        table = pa.table({"x": np.arange(300.0), "c": text, "d": text.dictionary_encode(), "y": np.arange(300) % 2})
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, 100)
        whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
        for _ in range(300):
            content = bytearray(whole)
            content[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
            path.write_bytes(content)
            try:
                everything(opened(root, test=0.3))
            except DataError as error:
                assert str(path) in str(error) or "column" in str(error), error
                refused += 1
        print(refused)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 50
