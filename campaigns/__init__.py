"""Campaigns: long, seeded searches for faults that the test suite cannot afford.

``python -m campaigns --help`` lists them. Each returns a :class:`~campaigns.report.Report`; after failures the
command exits with 1. Every case is identified by a seed and a number, and can be run again alone.
"""
