"""Anomaly detection: patches of photos that no normal photo has."""
