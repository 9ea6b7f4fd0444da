"""The check of a GPU, as a dry run on the CPU."""

import pandas as pd
import pytest
import torch

from benchmarks import gpu_check


@pytest.fixture
def few_models(monkeypatch):
    names = ("mlp", "gru")
    monkeypatch.setattr(gpu_check, "CASES", {name: gpu_check.CASES[name] for name in names})


def run(folder):
    return gpu_check.main(["--device", "cpu", "--quick", "--out", str(folder)])


def test_the_dry_run_passes_and_writes_its_tables(few_models, tmp_path, capsys):
    assert run(tmp_path) == 0
    table = pd.read_csv(tmp_path / "gpu_check.csv")
    assert set(table["within"].dropna()) == {"yes"}
    assert table["note"].str.contains("not measured").sum() == 4
    assert {"mlp", "gru"} == set(table["case"])
    page = (tmp_path / "gpu_check.md").read_text()
    assert torch.__version__ in page
    assert page.count("\n") > len(table)
    assert "within their tolerances" in capsys.readouterr().out


def test_a_kernel_outside_its_tolerance_fails_the_run(few_models, tmp_path, monkeypatch):
    key = ("exact", torch.float32)
    monkeypatch.setitem(gpu_check.TOLERANCES, key, 1e-12)
    assert run(tmp_path) == 1
    table = pd.read_csv(tmp_path / "gpu_check.csv").set_index("what")
    assert set(table.loc["exact matrix, float32", "within"]) == {"NO"}
    assert set(table.loc["exact matrix, float64", "within"]) == {"yes"}


def test_what_raises_is_a_line_of_the_table(few_models, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_check, "build_exact_kernel", refuse)
    assert run(tmp_path) == 1
    table = pd.read_csv(tmp_path / "gpu_check.csv")
    raised = table[table["what"] == "kernels: raised"]
    assert raised["note"].tolist() == ["RuntimeError: no kernel image is available"] * 2
    assert (raised["within"] == "NO").all()
