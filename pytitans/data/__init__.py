"""Text, time series and DNA: files and hub names -> batches that a run can stop in and resume."""
