"""The catalogue page lists every registered method, and equals what its generator makes from the results."""

import dataclasses
import json

import pytest

from experiments import catalogue, catalogue_page
from jflow import objectives


def test_the_page_is_up_to_date_and_holds_every_method():
    text = (catalogue_page.DOCS / "catalogue.md").read_text()
    assert text == catalogue_page.read_page(), "write it anew: python -m experiments.catalogue_page"
    for name, method in objectives.METHODS.items():
        assert f"### {name}\n" in text
        assert all(f"arxiv.org/abs/{source}" in text for source in method.source.split(", "))


def test_a_registered_method_without_a_measured_row_fails(monkeypatch):
    extra = dataclasses.replace(objectives.METHODS["lsd"], title="made up")
    monkeypatch.setitem(objectives.METHODS, "made_up", extra)
    with pytest.raises(KeyError, match="made_up"):
        catalogue_page.read_page()


def test_every_method_has_a_row_in_the_experiment():
    assert set(objectives.METHODS) <= set(catalogue.ROWS)
    assert all(row.method in objectives.METHODS for row in catalogue.ROWS.values())
    assert all(row.teacher in ("", *catalogue.ROWS) for row in catalogue.ROWS.values())


def test_a_row_below_the_mark_needs_a_reason(monkeypatch):
    results = json.loads((catalogue_page.DOCS / "catalogue.json").read_text())
    results["rows"]["lsd"]["rmse_1"] = results["rows"]["flow_matching"]["rmse_1"]
    with pytest.raises(KeyError, match="lsd"):
        catalogue_page.page(results, None)
