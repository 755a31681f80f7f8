"""Curves on a terminal."""

from dantegpu.cli.metrics import sparkline


def test_a_curve_goes_from_zero_to_the_largest_value():
    assert sparkline([0.0, 2.0, 4.0]) == "▁▅█"
    assert sparkline([0.5, 1.0], top=1.0) == "▅█"
    assert sparkline([3.0], top=1.0) == "█"


def test_nothing_used_is_a_flat_line():
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""


def test_of_many_values_the_peaks_stay():
    values = [0.0] * 1000
    values[500] = 1.0
    curve = sparkline(values, width=10)
    assert len(curve) == 10
    assert curve.count("█") == 1
