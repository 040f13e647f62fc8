"""Measurements that can be believed: runs the benchmark files of the checkout, keeps records, draws reports.

plugin.py    what pytest loads: hands over every result as it comes, and times where pytest-benchmark is missing
runner.py    a process per benchmark file; leaves a record after each
machine.py   what the numbers were measured on
record.py    the record's format, and the fields that reports read of a benchmark
tables.py    what records say, as tables and rooflines
report.py    any set of records as Markdown and one HTML page
plots.py     bars of a group, and the roofline
"""
