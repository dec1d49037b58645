"""Forecasting: training, backtests on the standard protocol, baselines, `titans forecast`."""
