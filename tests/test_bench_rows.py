"""The benchmark of rows against reading them: that it measures what it says; never how fast."""

from pathlib import Path

import numpy as np
import pytest
from powerinfer.runtime.cpu.bandwidth import RowReader
from powerinfer.runtime.cpu.pool import Pool, program
from powerinfer.tools import bench_rows


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_row_reader_reads_all_of_its_rows_and_no_others(n_threads: int) -> None:
    data = np.zeros((40, 100), np.uint8)
    listed = np.array([3, 4, 7, 20, 39])
    data[[2, 5, 38]] = 0xFF
    data[listed, [0, 99, 63, 64, 50]] = [1, 2, 4, 8, 16]
    reader = RowReader(data, listed, 2, n_threads)
    pool = Pool(n_threads)
    pool.run(program([reader.job]))
    pool.close()
    assert np.bitwise_or.reduce(reader.bits) == 1 | 2 | 4 | 8 | 16


def test_the_tool_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from powerinfer.tools.demo_model import demo_model

    monkeypatch.setattr(bench_rows, "SIZE", 4 << 20)
    for rates in (bench_rows.dense_rows(2, 2), bench_rows.sparse_ffn(demo_model(), 2, 2)):
        assert all(rate > 0 for rate in rates)
