"""Benchmark runner: runs the benchmark files of the checkout, writes records and renders reports.

plugin.py    pytest plugin: streams each result, and replaces pytest-benchmark where it is not installed
runner.py    runs each benchmark file in its own process and saves the record after each
machine.py   describes the machine: device, versions, clocks, commit
record.py    the record format, and the benchmark fields that reports use
tables.py    records as tables and rooflines
report.py    any set of records as Markdown and one HTML page
plots.py     bar charts per group, and the roofline plot
"""
