"""The workbook as a whole: run, refresh, check, export, doctor, bench. Imports nothing."""
