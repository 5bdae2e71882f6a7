"""Helpers of the workbook: everything that would make its notebooks long."""
